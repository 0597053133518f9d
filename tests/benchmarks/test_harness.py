"""Workers that fail, files that are whole, records that say how to get a result again, memory that is seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import environment, resident
from harness.tables import size, table, times
from harness.timing import timed_calls
from harness.workers import Budget, Worker, WorkerFailure

FAKE = Path(__file__).with_name("fake_worker.py")


def fake(**script):
    return Worker([sys.executable, str(FAKE), json.dumps(script)])


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("die", "out of memory", "the system killed"),
        ("segfault", "killed", "SIGSEGV"),
        ("exit", "failed", "exit status 3, Fatal: no more"),
        ("raise", "failed", "RuntimeError: shapes do not fit"),
        ("lack", "out of memory", "can't allocate"),
    ],
)
def test_a_worker_that_fails_says_how(script, kind, message):
    with fake(memory=script) as worker:
        assert worker.ask({"do": "matmul"}, 30) == 1e9
        with pytest.raises(WorkerFailure) as failure:
            worker.ask({"do": "memory"}, 30)
        assert failure.value.kind == kind
        assert message in failure.value.message
        if kind == "failed" and script == "raise":
            assert worker.ask({"do": "matmul"}, 30) == 1e9  # an exception is no end
        elif script != "lack":
            with pytest.raises(WorkerFailure):
                worker.ask({"do": "matmul"}, 30)


def test_a_worker_that_takes_too_long_is_ended():
    with fake(memory="hang") as worker:
        budget = Budget(30)
        assert budget.ask(worker, {"do": "matmul"}) == 1e9
        assert 0 < budget.left < 30
        budget.left = 0.2
        with pytest.raises(WorkerFailure, match="timeout"):
            budget.ask(worker, {"do": "memory"})
        assert not worker.alive
        with pytest.raises(WorkerFailure, match="no time left"):
            budget.ask(worker, {"do": "matmul"})


def test_a_record_says_how_to_get_it_again():
    argv = ["benchmarks/benchmark_speed.py", "--peer", "/env/bin/python", "--cases", "a b"]
    script = environment.REPOSITORY / argv[0]
    shown = {"/env/bin/python": "PEER_PYTHON"}
    record = environment.run_record({"peer": argv[2], "repeats": 3}, [7], "cpu", 2, [str(script), *argv[1:]], shown)
    assert record["command"] == "python benchmarks/benchmark_speed.py --peer PEER_PYTHON --cases 'a b'"
    assert record["configuration"] == {"peer": "PEER_PYTHON", "repeats": 3}
    assert (record["seeds"], record["threads"]) == ([7], 2)
    assert (
        record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )  # not the build, as +cpu
    assert record["device"]["class"].startswith("cpu: ")
    again = environment.run_record({}, [], "cpu", 1, [str(script), "--peer=/env/bin/python"], shown)
    assert again["command"].endswith("--peer=PEER_PYTHON")


HIGH_WATER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from harness import resident
mark = resident.Watermark("cpu")
block = torch.ones(8_000_000)  # 32 MB
del block
assert 30e6 < mark.read()["over_idle"] < 100e6
if resident.reset_high_water():
    assert resident.Watermark("cpu").read()["over_idle"] < 16e6
"""


def test_the_high_water_mark_sees_what_is_gone_again():
    """In a new process: one that has freed much already need not ask for more."""
    folder = Path(resident.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", HIGH_WATER, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_calls_fill_the_time():
    calls = []
    timed_calls(lambda: calls.append(1), "cpu")
    assert len(calls) == 1
    taken = timed_calls(lambda: calls.append(1), "cpu", min_seconds=0.01)
    assert len(taken) == len(calls) - 1
    assert sum(taken) >= 0.01
    assert sum(taken[:-1]) < 0.01


def test_tables_and_numbers():
    assert table(("a", "bb"), [("xyz", "1")]) == "a    bb\n---  --\nxyz   1"
    assert [times(r) for r in (12.345, 1.0, 0.25)] == ["12.3x", "1x", "1/4"]
    assert [size(b) for b in (1.5e9, 2e6)] == ["1.5 GB", "2 MB"]
