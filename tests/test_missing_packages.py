"""Without an optional package: one line that names the extra, from the library and from command lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_pytorch import NeuralMemory, gate_trace, plot_gate_trace

ROOT = Path(__file__).parents[1]


def without(package: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Runs python where the package cannot be imported."""
    (folder / f"{package}.py").write_text("raise ImportError('it is not there')\n")
    path = os.pathsep.join([str(folder), str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def test_without_matplotlib(monkeypatch, tmp_path):
    memory = NeuralMemory(8, 2, use_symplectic_gating=True)
    trace = gate_trace(memory, torch.randn(1, 8, 8))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plot_gate_trace needs matplotlib: pip install -e '.\[bench\]' in a clone"):
        plot_gate_trace(trace, tmp_path / "a.png")


def test_a_benchmark_says_so_before_it_measures(monkeypatch, capsys, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from harness import plots
    from harness.program import Benchmark

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    benchmark = Benchmark("none", "Nothing.", plan=lambda args, session: pytest.fail("it has begun"))
    assert benchmark.main(["--output-png", str(tmp_path / "a.png")]) == 1
    needed = "benchmark_none.py: a picture needs matplotlib: pip install -e '.[bench]' in a clone of this repository\n"
    assert capsys.readouterr().err == needed


@pytest.mark.parametrize("words", [["-m", "titans_pytorch.hf.convert", "a", "b"], ["-c", "import titans_pytorch.hf"]])
def test_without_transformers(tmp_path, words):
    done = without("transformers", tmp_path, *words)
    said = "titans_pytorch.hf needs transformers: pip install -e '.[hf]' in a clone of this repository"
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith(said)
    assert ("Traceback" in done.stderr) == (words[0] == "-c")
