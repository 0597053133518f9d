import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_script
import torch
from safetensors.torch import load_file

from titans_pytorch.training import evaluate
from titans_pytorch.training.checkpoint import load_weights
from titans_pytorch.training.data import load_data
from titans_pytorch.training.folder import claimed
from titans_pytorch.training.metrics import read_metrics

SCRIPT = Path(tiny_script.__file__)


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """(folder, arguments) of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["--data", str(text_file), "--data-dir", str(out.parent)]
    assert tiny_script.run([*arguments, "--out", str(out)]) == 0
    return out, arguments


def losses(out):
    return [(r["step"], r.get("loss"), r.get("held_out_bits_per_byte")) for r in read_metrics(out / "metrics.jsonl")]


def result(out):
    return json.loads((out / "result.json").read_text())


def last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_what_a_run_leaves(finished, text_file):
    out, arguments = finished
    found = result(out)
    assert found["config"] == json.loads((out / "config.json").read_text())
    assert found["command"].split()[-2:] == ["--out", str(out)]
    assert found["seed"] == 0
    assert found["steps"] == 24
    assert found["trained_on_bytes"] == 24 * 2 * 2 * 16
    assert found["data"]["train_bytes"] + found["data"]["held_out_bytes"] == text_file.stat().st_size
    assert {"sha256", "name"} <= found["data"].keys()
    assert {"python", "torch"} <= found["versions"].keys()
    assert found["threads"] == 1
    assert found["compared_with"].keys() == {"order-0 entropy", "gzip -9", "xz"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "written by the model" in (out / "sample.txt").read_text()

    model = tiny_script.TinyModel(16)
    load_weights(model, out / "model.safetensors")
    held_out = load_data(tiny_script.DataConfig(data=str(text_file))).held_out
    again = evaluate.bits_per_byte(model, held_out, context=16, stride=8, batch_size=4)
    assert found["held_out_bits_per_byte"] == pytest.approx(again, rel=1e-5)


def test_the_final_evaluation_is_bounded(finished, text_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny_script.run([*finished[1], "--out", str(out), "--steps", "1", "--eval-limit", "50"]) == 0
    found = result(out)
    held_out = load_data(tiny_script.DataConfig(data=str(text_file))).held_out
    model = tiny_script.TinyModel(16)
    load_weights(model, out / "model.safetensors")
    bits = evaluate.bits_per_byte(model, held_out[:50], context=16, stride=8, batch_size=4)
    assert found["held_out_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["compared_with"] == evaluate.compressors(held_out[:50])
    assert found["evaluated_bytes"] == 50
    assert f"bits per byte on the first 50 of {len(held_out):,} held-out bytes" in capsys.readouterr().out


def test_the_training_loss_that_is_shown_is_a_running_mean(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny_script.run([*finished[1], "--out", str(out)]) == 0
    shown = re.findall(r"training (\S+) bits per byte", capsys.readouterr().out)
    bits = [loss / math.log(2) for _, loss, _ in losses(out) if loss is not None]
    expected = []
    for n in (6, 12, 18, 24):
        weights = [0.95 ** (n - 1 - i) for i in range(n)]
        expected.append(sum(w * b for w, b in zip(weights, bits, strict=False)) / sum(weights))
    assert [float(value) for value in shown] == pytest.approx(expected, abs=6e-4)


def start(arguments, out, sleep, stop_at=0):
    """The script in a process of its own, after the step to stop it at: by default a random one."""
    environment = {**os.environ, "TINY_SLEEP": str(sleep), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    stop_at = random.randrange(2, 20) if stop_at == 0 else stop_at
    deadline = time.monotonic() + 60
    while stop_at is not None and process.poll() is None and time.monotonic() < deadline:
        if any(r["step"] >= stop_at for r in read_metrics(out / "metrics.jsonl")):
            break
        time.sleep(0.005)
    return process


def test_killed_and_resumed(finished, tmp_path, capsys):
    whole, arguments = finished
    out = tmp_path / "run"
    process = start(arguments, out, sleep=0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(losses(out)) < len(losses(whole))
    assert tiny_script.run([*arguments, "--out", str(out), "--resume"]) == 0
    assert "resuming from step" in capsys.readouterr().out
    assert losses(out) == losses(whole)
    assert result(out)["held_out_bits_per_byte"] == result(whole)["held_out_bits_per_byte"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "sample.txt").read_text() == (whole / "sample.txt").read_text()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed(finished, tmp_path, signum, status):
    whole, arguments = finished
    out = tmp_path / "run"
    process = start(arguments, out, sleep=0.02)
    process.send_signal(signum)
    errors = process.communicate()[1].strip().splitlines()
    assert process.returncode == status
    step = losses(out)[-1][0]
    assert 0 < step < 24
    kept = f"the checkpoint of step {step} is kept in {out / 'checkpoints'}"
    hint = f"stopped at step {step} of 24; {kept}; continue with: "
    assert hint in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert (out / "loss.png").exists()
    typed = errors[-1].partition(hint)[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(typed, shell=True, env=environment, capture_output=True).returncode == 0, typed
    assert losses(out) == losses(whole)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_final_measurements(finished, tmp_path, monkeypatch, signum, status):
    whole, arguments = finished
    out = tmp_path / "run"
    monkeypatch.setenv("TINY_SLEEP_AT_END", "1")
    process = start(arguments, out, sleep=0, stop_at=24)
    time.sleep(0.5)
    process.send_signal(signum)
    errors = process.communicate()[1]
    assert process.returncode == status
    kept = f"the checkpoint of step 24 is kept in {out / 'checkpoints'}"
    assert f"stopped in the final measurements; {kept}; continue with: " in errors
    assert errors.endswith(f"tiny_script.py --out {out} --resume\n")
    assert "Traceback" not in errors
    assert not (out / "result.json").exists()
    assert list(tmp_path.rglob("*.part")) == list(tmp_path.rglob("*.lock")) == []
    monkeypatch.delenv("TINY_SLEEP_AT_END")
    assert tiny_script.run(["--out", str(out), "--resume"]) == 0
    assert losses(out) == losses(whole)
    assert result(out)["held_out_bits_per_byte"] == result(whole)["held_out_bits_per_byte"]


@pytest.mark.parametrize("at_end", [False, True])
def test_a_second_interrupt_ends_at_once(finished, tmp_path, monkeypatch, at_end):
    monkeypatch.setenv("TINY_SLEEP_AT_END", "60")
    process = start(finished[1], tmp_path / "run", sleep=0 if at_end else 2, stop_at=24 if at_end else 1)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 20:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.poll() in (130, -signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]


def test_stopped_before_the_first_step(finished, tmp_path):
    process = start(finished[1], tmp_path / "run", sleep=0, stop_at=None)
    assert process.stdout.readline().startswith("data: ")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == "tiny_script.py: interrupted\n"
    assert process.returncode == 143


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "versions.json", "SHA256SUMS"])
def test_a_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(finished, tmp_path, name, capsys):
    whole, arguments = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    flip(out / "checkpoints" / "step_00000024" / name)
    assert tiny_script.run(["--out", str(out), "--resume"]) == 0
    said = capsys.readouterr().out
    named = r"\S+" if name == "SHA256SUMS" else name  # a hash in it is of another file
    assert re.search(rf"step_00000024/{named} is damaged.*; taking .*step_00000020, the checkpoint before it\n", said)
    assert "resuming from step 20" in said
    assert losses(out) == losses(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step_00000020", "step_00000024", "step_00000024.damaged"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def test_two_damaged_checkpoints_are_refused(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for path in (out / "checkpoints").rglob("training.pt"):
        flip(path)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert tiny_script.run(["--out", str(out), "--resume"]) == 1
    assert "step_00000024/training.pt is damaged: its sha256 is not the one in" in last_line(capsys)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_checkpoint_without_hashes_is_taken_and_said_so(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for path in [*(out / "checkpoints").rglob("SHA256SUMS"), *(out / "checkpoints").rglob("versions.json")]:
        path.unlink()
    assert tiny_script.run(["--out", str(out), "--resume"]) == 0
    assert "has no SHA256SUMS, it was written by an earlier version" in capsys.readouterr().out


def test_a_finished_run_resumes_to_its_evaluation(finished, capsys):
    out, arguments = finished
    before = result(out)["held_out_bits_per_byte"], losses(out)
    assert tiny_script.run(["--out", str(out), "--resume"]) == 0  # the settings are those of the run
    assert (result(out)["held_out_bits_per_byte"], losses(out)) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--width", "17"], "width: {} has 16, got 17"),
        (["--seed", "1"], "seed: {} has 0, got 1"),
        (["--seq-len", "8"], "seq_len: {} has 16, got 8"),
        (["--preset", "wide"], "preset must be tiny, that of {}, got 'wide'"),
    ],
)
def test_another_configuration_does_not_resume(finished, changes, message, capsys):
    out, _ = finished
    assert tiny_script.run(["--out", str(out), "--resume", *changes]) == 1
    assert message.format(out / "checkpoints" / "step_00000024") in last_line(capsys)


def test_other_data_does_not_resume(finished, tmp_path, capsys):
    out, _ = finished
    (tmp_path / "other").write_bytes(bytes(range(256)) * 20)
    assert tiny_script.run(["--out", str(out), "--resume", "--data", str(tmp_path / "other")]) == 1
    assert "has sha256" in last_line(capsys)


def test_a_longer_run_resumes_and_says_so(finished, tmp_path, capsys):
    _, arguments = finished
    out = tmp_path / "run"
    assert tiny_script.run([*arguments, "--out", str(out), "--steps", "3"]) == 0
    assert tiny_script.run(["--out", str(out), "--resume", "--steps", "5"]) == 0
    assert "steps is 5 from here on; until now it was 3" in capsys.readouterr().out
    assert result(out)["steps"] == 5
    assert json.loads((out / "config.json").read_text())["training"]["steps"] == 5


def test_nothing_to_resume(tmp_path, capsys):
    assert tiny_script.run(["--out", str(tmp_path / "none"), "--resume"]) == 1
    assert "has no checkpoint to resume from" in last_line(capsys)
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_not_finite(finished, tmp_path, capsys):
    _, arguments = finished
    assert tiny_script.run([*arguments, "--out", str(tmp_path / "run"), "--nan-at-step", "15"]) == 1
    assert "step 8: the loss is nan; the checkpoint of step 5 is kept in" in last_line(capsys)  # two batches a step


@pytest.mark.parametrize("more", [[], ["--validate-every", "0"], ["--sample-every", "1"]])
def test_a_run_that_diverges_is_no_success(finished, tmp_path, more, capsys):
    out = tmp_path / "run"
    assert tiny_script.run([*finished[1], "--out", str(out), "--lr", "1e30", "--warmup-steps", "0", *more]) == 1
    assert re.search(r"(nan|inf|not finite).*; the checkpoint of step \d+ is kept in", last_line(capsys))
    assert not (out / "result.json").exists()
    assert not (out / "model.safetensors").exists()
    for path in out.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


def test_a_final_measurement_that_is_not_finite_is_no_success(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "result.json").unlink()
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr("titans_pytorch.training.text.bits_per_byte", lambda *args, **kwargs: math.nan)
    assert tiny_script.run(["--out", str(out), "--resume"]) == 1
    assert "the final held_out_bits_per_byte is nan; the checkpoint of step 24 is kept" in last_line(capsys)
    assert not (out / "result.json").exists()
    assert (out / "model.safetensors").read_bytes() == before


def test_data_that_changes_while_training(finished, tmp_path, capsys):
    data = tmp_path / "text"
    data.write_bytes(Path(finished[1][1]).read_bytes())
    process = start(["--data", str(data)], tmp_path / "run", sleep=0.02)
    with data.open("r+b") as file:
        file.truncate(3000)
    errors = process.communicate()[1].strip().splitlines()
    assert process.returncode == 1
    assert re.search(rf"step \d+: data: {data} has changed since the run began; the checkpoint of step", errors[-1])
    assert not any("Traceback" in line for line in errors)
    assert tiny_script.run(["--out", str(tmp_path / "run"), "--resume"]) == 1
    assert "data must be what the run was started on (sha256" in last_line(capsys)


@pytest.mark.parametrize("content", [None, b"", b"x", b"xyz" * 10])
def test_unusable_data(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    out = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "f"), "--seq-len", "64", "--out", str(out)]
    assert tiny_script.run(arguments) == 1
    error = capsys.readouterr().err
    assert "data: " in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_unusable_device(finished, tmp_path, capsys):
    assert tiny_script.run([*finished[1], "--out", str(tmp_path / "run"), "--device", "abacus"]) == 1
    assert "device must be one that torch can use here, got 'abacus'" in last_line(capsys)


def test_a_new_run_moves_an_earlier_one_aside(finished, tmp_path, capsys):
    _, arguments = finished
    out = tmp_path / "run"
    for _ in range(3):
        assert tiny_script.run([*arguments, "--out", str(out), "--steps", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-1", "run-2"]
    assert all((p / "result.json").exists() for p in tmp_path.iterdir())
    assert f"{out} held an earlier run, which is now {out}-2" in capsys.readouterr().out


def test_two_runs_do_not_write_in_one_folder(finished, tmp_path, capsys):
    pytest.importorskip("fcntl")
    _, arguments = finished
    with claimed(tmp_path):
        assert tiny_script.run([*arguments, "--out", str(tmp_path)]) == 1
    assert f"another run (process {os.getpid()}) is using {tmp_path}" in last_line(capsys)


def test_without_matplotlib_only_the_curve_is_missing(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "run"
    assert tiny_script.run([*finished[1], "--out", str(out), "--steps", "1"]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (out / "result.json").exists()
    assert not (out / "loss.png").exists()


def test_sampling_and_validation_leave_training_alone(finished, tmp_path):
    whole, arguments = finished
    out = tmp_path / "run"
    assert tiny_script.run([*arguments, "--out", str(out), "--sample-every", "0", "--validate-every", "0"]) == 0
    trained = [r["loss"] for r in read_metrics(whole / "metrics.jsonl") if "loss" in r]
    assert [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r] == trained
    assert torch.get_num_threads() == 1
