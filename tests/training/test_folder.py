"""A run's folder belongs to one run at a time."""

import multiprocessing
import os
import signal
import time

import pytest

from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.folder import claimed, prepare_folder

pytest.importorskip("fcntl")
FORK = multiprocessing.get_context("fork")


def in_processes(count, target, *args):
    """Run target(*args) in `count` processes at once, all of which must succeed."""
    processes = [FORK.Process(target=target, args=args) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def race(out, start, tried, won):
    for _ in range(20):
        start.wait()
        try:
            with claimed(out):
                prepare_folder(out, resume=False, say=lambda line: None)
                (out / "config.json").write_text("{}")
                won.value += 1  # only one process is here
                tried.wait()
        except TrainingError:
            tried.wait()


def test_of_many_claims_at_once_one_wins(tmp_path):
    """And moves the earlier run aside, once."""
    start, tried, won = FORK.Barrier(12), FORK.Barrier(12), FORK.Value("i", 0)
    in_processes(12, race, tmp_path / "run", start, tried, won)
    assert won.value == 20
    expected = {"run", *(f"run-{i}" for i in range(1, 20))}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert all((tmp_path / name / "config.json").exists() for name in expected)


def take_turns(out, inside, most, turns):
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            with claimed(out):
                with inside.get_lock():
                    inside.value += 1
                    most.value = max(most.value, inside.value)
                    turns.value += 1
                with inside.get_lock():
                    inside.value -= 1
        except TrainingError:
            pass


def test_a_claim_that_ends_lets_one_other_in(tmp_path):
    """Though the lock file goes and comes, two never hold it."""
    inside, most, turns = (FORK.Value("i", 0) for _ in range(3))
    in_processes(6, take_turns, tmp_path / "run", inside, most, turns)
    assert most.value == 1
    assert turns.value > 20
    assert list(tmp_path.iterdir()) == []


def hold(out, ready):
    with claimed(out):
        ready.set()
        time.sleep(60)


def test_a_killed_run_leaves_its_folder_free(tmp_path):
    out, ready = tmp_path / "run", FORK.Event()
    holder = FORK.Process(target=hold, args=(out, ready))
    holder.start()
    assert ready.wait(30)
    for name in (out, tmp_path / "." / "run"):
        with (
            pytest.raises(TrainingError, match=rf"^another run \(process {holder.pid}\) is using {out}$"),
            claimed(name),
        ):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with claimed(out):
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()


def test_two_names_of_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with claimed(tmp_path / "link"), pytest.raises(TrainingError, match="is using"), claimed(tmp_path / "run"):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("x")
    (tmp_path / "run.lock").symlink_to(precious)
    with pytest.raises(OSError, match="run.lock"), claimed(tmp_path / "run"):
        pass
    assert precious.read_text() == "x"


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="out must be a folder, got"), claimed(tmp_path / "file"):
        pass
    with pytest.raises(TrainingError, match="out must be a folder of its own, got /"), claimed(tmp_path.joinpath("/")):
        pass


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints" / "step_00000005.1234.part").mkdir(parents=True)
    (out / "result.json.1234.part").write_text("{")
    (out / "note").write_text("mine")
    prepare_folder(out, resume=True)
    assert sorted(p.name for p in out.rglob("*")) == ["checkpoints", "note"]


def test_the_place_for_an_earlier_run_is_not_that_of_another(tmp_path):
    """`run-1` belongs to a run that has only just begun."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with claimed(tmp_path / "run-1"), claimed(tmp_path / "run"):
        prepare_folder(tmp_path / "run", resume=False)
    assert (tmp_path / "run-2" / "config.json").exists()
    assert not (tmp_path / "run-1").exists()
