"""Several processes train one model as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from titans_pytorch.cli.main import main
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.metrics import read_metrics
from titans_pytorch.training.processes import Alone, Together

pytest.importorskip("accelerate")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(arguments: list[str], count: int) -> None:
    """Runs a script as a launcher would: one process for each rank."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, **path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]


def test_two_processes_give_the_losses_of_one(tmp_path):
    """The same global batch: a task whose rows ask for unequal numbers of answers, text, and two stages of training."""
    one = two_processes.losses(tmp_path / "one")
    two = tmp_path / "two"
    two.mkdir()
    launched([str(Path(two_processes.__file__)), str(two)], 2)
    found = json.loads((two / "losses.json").read_text())
    assert found.keys() == one.keys()
    for name, values in one.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-6, atol=0.0)
    assert len(one["task"]) == 4
    assert one["text"][:2] != one["two stages"][:2]


@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_another_length_in_each_process(tmp_path, count):
    """A process whose sequence is shorter than a chunk neither fails nor keeps the others waiting."""
    launched([str(Path(__file__).with_name("unequal_lengths.py")), str(tmp_path)], count)
    first, *others = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert len(first) == 6
    assert all(other == pytest.approx(first) for other in others)


def test_a_batch_is_shared_evenly():
    processes = Together.__new__(Together)
    processes.rank, processes.count = 1, 3
    assert processes.share(12) == (4, 4)
    with pytest.raises(TrainingError, match="batch_size must be a multiple of the 3 processes, got 10"):
        processes.share(10)
    assert Alone().share(7) == (0, 7)


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ImportError, match=r"training in several processes needs accelerate: pip install -e .\.\[train\]"
    ):
        Together(torch.device("cpu"))


CONFIG = """
model: {variant: lmm, vocab_size: 40, d_model: 8, n_layers: 1, mem_heads: 1, n_heads: 1, mem_layers: 1, chunk_size: 4}
data: {task: patterns, settings: {longest_period: 8}, first_len: 12, test_rows: 8}
training: {steps: 4, batch_size: 4, seq_len: 24, lr: 1e-2, threads: 1, device: cpu, validate_every: 2,
           validate_sequences: 4, checkpoint_every: 2}
"""


def test_a_run_of_two_processes(tmp_path):
    """The whole command: one of them writes the files."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "two"
    command = ["-m", "titans_pytorch.cli", "train", "--config", str(config), "--out", str(out)]
    launched(command, 2)
    records = [read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "one", out)]
    for name in ("loss", "patterns_accuracy"):
        values = [[r[name] for r in found if name in r] for found in records]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
        assert values[0]
    result = json.loads((out / "result.json").read_text())
    assert result["processes"] == 2
    assert result["trained_on_tokens"] == 4 * 4 * 24
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()].count("two-1") == 0
