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

from titans_pytorch.training.errors import TrainingError
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


def test_a_batch_is_shared_evenly():
    processes = Together.__new__(Together)
    processes.rank, processes.count = 1, 3
    assert processes.share(12) == (4, 4)
    with pytest.raises(TrainingError, match="batch_size: got 10, takes a multiple of the 3 processes"):
        processes.share(10)
    assert Alone().share(7) == (0, 7)


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError, match="several processes need accelerate"):
        Together(torch.device("cpu"))
