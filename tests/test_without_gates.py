"""The core without the research packages: with titans_pytorch.gates hidden, everything else imports and runs."""

import subprocess
import sys

import pytest

HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["titans_pytorch", "gates"]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
"""

CORE = """
import torch
from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, TitansConfig, build_model, load_peer_state_dict

memory = NeuralMemory(8, 2, batch_size=4, heads=2, qkv_conv_kernel=2, output_gate="silu", surprise_threshold=0.1)
out, state = memory(torch.randn(2, 11, 8))
out.sum().backward()
again, _ = memory(torch.randn(2, 3, 8), state=state)
NeuralMemory.paper(8, 4)(torch.randn(1, 9, 8))
model = MemoryAsContextTransformer(num_tokens=8, dim=8, depth=2, segment_len=4, dim_head=4, heads=2)
model.sample(torch.randint(0, 8, (1, 5)), 9, use_cache=True, show_progress=False)
for variant in ("mac", "mag", "mal", "lmm", "baseline"):
    config = TitansConfig.tiny(variant=variant, d_model=16, n_layers=1, vocab_size=8)
    build_model(config)(torch.randint(0, 8, (1, 9)), return_loss=True).backward()
import titans_pytorch.cli.main, titans_pytorch.training.mac
assert not [name for name in sys.modules if name.startswith("titans_pytorch.gates")]
"""


@pytest.mark.parametrize("hidden", [HIDDEN, "import sys\n"], ids=["hidden", "there"])
def test_the_core_runs_and_does_not_import_gates(hidden):
    subprocess.run([sys.executable, "-c", hidden + CORE], check=True)


def test_gates_name_what_is_missing_where_they_are_asked_for():
    code = HIDDEN + "from titans_pytorch import NeuralMemory\nNeuralMemory(8, use_symplectic_gating=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: titans_pytorch.gates")
