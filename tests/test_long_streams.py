"""Every memory that README, documentation, examples, configurations and presets build is finite over 20,000 tokens.

They are found by running what a reader would run, so that a new block joins by itself.
"""

import json
import sys
from contextlib import contextmanager
from functools import wraps

import pytest
import torch

from titans_pytorch import TitansConfig, build_model
from titans_pytorch.models.presets import PRESETS
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.training.mac import build_mac

from .documents import ROOT, run_blocks
from .random_models import STREAMS, stream
from .test_docs import PAGES, short
from .test_examples import run

TOKENS, PIECE = 20_000, 1000
WIDE = 128  # features; wider ones read the text alone
CPU = torch.device("cpu")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@contextmanager
def collected(monkeypatch):
    """The memories that are built inside, one for each set of keywords."""
    found: dict[str, NeuralMemory] = {}
    build = NeuralMemory.__init__

    @wraps(build)  # the constructor reads its own signature
    def note(self, *args, **kwargs):
        build(self, *args, **kwargs)
        plain = {name: value for name, value in kwargs.items() if name not in ("engine", "model")}
        found.setdefault(repr((args, type(kwargs.get("model")), sorted(plain.items(), key=str))), self)

    with monkeypatch.context() as patch:
        patch.setattr(NeuralMemory, "__init__", note)
        yield found


@torch.no_grad()
def assert_finite(memories: dict[str, NeuralMemory]) -> None:
    for settings, memory in memories.items():
        if memory.projections.to_queries.weight.is_meta:  # built to count parameters
            continue
        kinds = STREAMS if memory.dim <= WIDE else STREAMS[-1:]
        rows = torch.cat([stream(kind, TOKENS, 0, memory.dim) for kind in kinds]).to(
            memory.projections.to_queries.weight.dtype
        )
        state = None
        for at in range(0, TOKENS, PIECE):
            part = rows[:, at : at + PIECE]
            out, state = memory(part.expand(3, *part.shape) if memory.diff_views else part, state=state)
            state = state._replace(updates=None)
            lost = [kind for kind, row in zip(kinds, out, strict=True) if not row.isfinite().all()]
            assert not lost, f"{', '.join(lost)} by token {at + PIECE}: {settings}"
            assert all(weight.isfinite().all() for weight in state.states[0].values()), settings


LONG = {"models.md"}  # as to the test
PAGES = [page for page in PAGES if page.name != "stability.md"]  # it shows what diverges


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in LONG)) for p in (ROOT / "README.md", *PAGES)],
    ids=short,
)
def test_documents(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    with collected(monkeypatch) as memories:
        run_blocks(page)
    assert memories or page.name != "README.md"
    assert_finite(memories)


EXAMPLES = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("memory_in_a_transformer", "stream_a_file", "fine_tune")
]


@pytest.mark.parametrize("name", ["quick_start", "own_model", *EXAMPLES])
def test_examples(name, monkeypatch, tmp_path):
    if name in ("memory_in_a_transformer", "fine_tune"):
        pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog, and again: " * 40)
    words = {"quick_start": ["--steps", 1, "--text", text], "memory_in_a_transformer": ["--steps", 1, "--phrase", 4]}
    words["own_model"] = ["--steps", 1]
    words["stream_a_file"] = ["--file", text, "--state", tmp_path / "state", "--bytes", 100]
    words["fine_tune"] = ["--steps", 1, "--length", 32, "--text", text, "--out", tmp_path / "tuned"]
    with collected(monkeypatch) as memories:
        assert run(name, *words[name]) == 0
    assert memories
    assert_finite(memories)


@pytest.mark.slow
def test_the_notebook(monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    notebook = json.loads((ROOT / "examples" / "titans.ipynb").read_text())
    threads, scope = torch.get_num_threads(), {"__name__": "titans"}
    try:
        with collected(monkeypatch) as memories:
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    exec("".join(cell["source"]), scope)
    finally:
        torch.set_num_threads(threads)
    assert memories
    assert_finite(memories)


@pytest.mark.slow
def test_configurations(monkeypatch):
    """And the preset for a CPU. What several share is read once."""
    configs = [TitansConfig.load(path) for path in CONFIGS] + [TitansConfig.tiny()]
    assert len(CONFIGS) >= 8
    torch.manual_seed(0)
    with collected(monkeypatch) as memories:
        for config in configs:
            build_model(config.model, CPU)
    assert memories
    assert_finite(memories)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_large_presets(name, monkeypatch):
    torch.manual_seed(0)
    with collected(monkeypatch) as memories:
        build_model(TitansConfig.preset(name).replace(n_layers=1, vocab_size=256), CPU)
    assert_finite(memories)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "enwik8"])
def test_train_mac(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("train_mac", None)
    from train_mac import PRESETS as OURS

    torch.manual_seed(0)
    with collected(monkeypatch) as memories:
        build_mac(OURS[name].model, CPU)
    assert memories
    assert_finite(memories)
