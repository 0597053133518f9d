"""torch.load with its default weights_only reads the state or cache of every model, in a process that has imported no
more than torch and the package."""

import subprocess
import sys
import zipfile

import pytest
import torch

from titans_pytorch import (
    MemoryAsContextTransformer,
    ModelConfig,
    NeuralMemory,
    SegmentedAttention,
    build_model,
    mem_state_detach,
)
from titans_pytorch.common.saved_states import STATES
from titans_pytorch.models.attention import SegmentAttention, WindowAttention

SMALL = {"vocab_size": 16, "d_model": 16, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "window": 8, "chunk_size": 4}
READ = """
import pathlib, sys
{first}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt")):
    print(path.stem, type(torch.load(path)).__name__)
"""


def states():
    """Name -> a state of every kind that is handed out."""
    x, ids = torch.randn(2, 7, 16), torch.randint(0, 16, (2, 7))
    mac = MemoryAsContextTransformer(num_tokens=16, dim=16, depth=2, segment_len=4, dim_head=8, heads=2)
    out = {
        "memory": mem_state_detach(NeuralMemory(16, 4)(x)[1]),
        "transformer": mac(ids, return_cache=True)[1],
        "attention": SegmentedAttention(16, 4, dim_head=8, heads=2)(x)[1].cached_key_values,
        "window": WindowAttention(16, 2, 4)(x, x[0])[1],
        "segment": SegmentAttention(16, 2, 8)(x, x, x[0], None)[1],
    }
    for variant in ("mac", "mag", "mal", "lmm", "baseline"):
        out[variant] = build_model(ModelConfig(variant=variant, **SMALL))(ids, return_cache=True)[1]
    return out


def kinds(value) -> set[str]:
    """The named tuples in a state."""
    parts = value if isinstance(value, tuple) else ()
    own = {type(value).__name__} if hasattr(value, "_fields") else set()
    return own.union(*map(kinds, parts))


@torch.no_grad()
def test_every_kind_is_listed():
    listed = set(STATES) - {"_rebuild", "TitansCache"}
    assert set().union(*map(kinds, states().values())) == listed


@pytest.mark.parametrize(
    "first", ["import torch, titans_pytorch", "from titans_pytorch import NeuralMemory\nimport torch"]
)
@torch.no_grad()
def test_a_fresh_process_reads_them_all(first, tmp_path):
    made = states()
    for name, state in made.items():
        torch.save(state, tmp_path / f"{name}.pt")
    command = [sys.executable, "-W", "ignore", "-c", READ.format(first=first), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == {n: type(s).__name__ for n, s in made.items()}


def test_states_saved_by_version_0_1(tmp_path):
    """Their classes were in other modules."""
    state = mem_state_detach(NeuralMemory(16, 4)(torch.randn(2, 7, 16))[1])
    torch.save(state, tmp_path / "now.pt")
    with zipfile.ZipFile(tmp_path / "now.pt") as now, zipfile.ZipFile(tmp_path / "then.pt", "w") as then:
        for name in now.namelist():
            data = now.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"titans_pytorch.memory.state", b"titans_pytorch.memory_state")
                data = data.replace(b"titans_pytorch.engines.lazy", b"titans_pytorch.memory_state")
            then.writestr(name, data)
    again = torch.load(tmp_path / "then.pt")
    assert type(again) is type(state)
    assert all(torch.equal(again.states[0][name], value) for name, value in state.states[0].items())


def test_the_cache_of_the_transformers_library(tmp_path):
    pytest.importorskip("transformers")
    from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig

    model = TitansForCausalLM(TitansHFConfig(**SMALL)).eval()
    ids = torch.randint(0, 16, (2, 7))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        torch.save(cache, tmp_path / "cache.pt")
        wanted = model(ids, past_key_values=cache, use_cache=True).logits
        again = torch.load(tmp_path / "cache.pt")
        assert type(again) is type(cache)
        assert torch.equal(model(ids, past_key_values=again, use_cache=True).logits, wanted)
        other = TitansForCausalLM(TitansHFConfig(**SMALL | {"window": 4})).eval()
        with pytest.raises(ValueError, match=r"^cache\.window must be 4, got 8$"):
            other(ids, past_key_values=torch.load(tmp_path / "cache.pt"), use_cache=True)
