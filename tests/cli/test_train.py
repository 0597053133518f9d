"""titans train and titans search."""

import json
import re
from pathlib import Path

import pytest
import torch

from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.cli.main import main
from titans_pytorch.cli.settings import config_from
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.runs import load_run, model_of
from titans_pytorch.tasks.subject import subject_of, task_of
from titans_pytorch.training.folder import claimed
from titans_pytorch.training.metrics import read_metrics

from .. import helpers
from .conftest import tiny_yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def result(out):
    return json.loads((out / "result.json").read_text())


def test_a_run_on_text(text_run):
    out, _ = text_run
    found = result(out)
    assert found["steps"] == 3
    assert found["trained_on_bytes"] == 3 * 4 * 24
    assert 0 < found["held_out_bits_per_byte"] < 9
    assert found["command"].startswith("titans train --config")
    assert found["config"]["model"]["variant"] == "mac"
    assert (out / "loss.png").exists()
    run, model = load_run(out, torch.device("cpu"))
    assert run.to_dict() == found["config"]
    assert not model.training


def test_a_run_on_a_task(task_run):
    out, _ = task_run
    found = result(out)
    assert [row["length"] for row in found["scores"]] == [24, 48]
    assert all(0 <= row[key] <= 1 for row in found["scores"] for key in ("accuracy", "exact", "storing_off"))
    assert found["chance"] == 1 / 16
    measured = [r["copy_accuracy"] for r in read_metrics(out / "metrics.jsonl") if "copy_accuracy" in r]
    assert len(measured) == 1
    off = [r["copy_accuracy_storing_off"] for r in read_metrics(out / "metrics.jsonl") if "copy_accuracy" in r]
    run, model = load_run(out)
    task = task_of(run.data, run.training)
    with storing_off(model):
        assert off == [task.score(model, 4, batch_size=4).accuracy]
    assert found["pictures"] == ["accuracy.png", "loss.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in found["pictures"])
    assert found["config"]["data"]["settings"] == {"payload": 4, "segment_len": 8}


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "0.5", "--d-model", "32", "--payload", "6"],
        ["--training.lr=0.5", "--model.d_model", "32", "--data.settings.payload", "6"],
        ["--train.lr", "5e-1", "--d_model=32", "--data.payload=6"],
    ],
)
def test_settings_by_name(task_run, tmp_path, words):
    _, config = task_run
    out = tmp_path / "run"
    assert main(["train", "--config", config, *words, "--steps", "1", "--vocab-size", "18", "--out", str(out)]) == 0
    found = json.loads((out / "config.json").read_text())
    assert (found["training"]["lr"], found["model"]["d_model"]) == (0.5, 32)
    assert found["data"]["settings"] == {"payload": 6, "segment_len": 8}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--stesp", "3"], 2, "unknown setting --stesp; the nearest is --steps"),
        (["--model.windw", "3"], 2, "unknown setting --windw; the nearest is --window"),
        (["--steps", "many"], 2, "argument --steps: must be a whole number, got 'many'"),
        (["--lr", "-1"], 2, "lr must be a positive number, got -1.0"),
        (["--variant", "mag2"], 2, "argument --variant: must be one of ..., got 'mag2'; the nearest is mag"),
        (["--rule", "delta_net"], 2, "argument --rule: must be one of ..., got 'delta_net'; the nearest is deltanet"),
        (["--rule", "deltanet", "--chunk-size", "8"], 2, "chunk_size 8 cannot be combined with rule deltanet"),
        (["--rule", "exact", "--max-step", "2"], 2, "max_step must be at most 1 with rule exact..., got 2.0"),
        (["--n-heads", "3"], 2, "n_heads must be ..., got 3"),
        (["--task", "coyp"], 1, "unknown task coyp; the nearest is copy"),
        (["--task", "copy", "--vocab-size", "5"], 1, "vocab_size must be at least the task's 18 tokens, got 5"),
        (["--task", "copy", "--payload", "20"], 1, "length must be at least 40..., got 24"),
        (["--preset", "tiny"], 1, "preset: give --config or --preset, not both"),
        (["--data", "nothing.txt"], 1, "data: nothing.txt does not exist"),
        (["--device", "abacus"], 1, "device must be ..., got 'abacus'"),
        (["--resume"], 1, "resume: give the run's folder with --out"),
    ],
)
def test_mistakes(text_run, capsys, words, status, message):
    _, config = text_run
    try:
        found = main(["train", "--config", config, *words])
    except SystemExit as stopped:
        found = stopped.code
    error = capsys.readouterr().err
    assert found == status
    assert re.search(helpers.message(message), error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml does not exist"),
        ("model: {windw: 3}", "config.yaml: unknown setting model.windw; the nearest is window"),
        ("modle: {}", "config.yaml: unknown section modle; the nearest is model"),
        ("model: [", "config.yaml: "),
        ("data: {task: copy, test_tims: [1]}", "unknown setting data.test_tims; the nearest is test_times"),
        (
            "data: {task: copy, settings: {paylod: 1}}",
            "unknown setting paylod of the copy task; the nearest is payload",
        ),
        (
            "data: {task: copy, settings: {length: 9}}",
            "data.settings cannot be combined with length, which seq_len of training sets",
        ),
    ],
)
def test_a_broken_configuration(tmp_path, capsys, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert re.search(helpers.message(message), error)
    assert error.count("\n") == 1


def test_stopped_and_resumed(task_run, tmp_path, capsys):
    whole, config = task_run
    out = tmp_path / "run"
    arguments = ["train", "--config", config, "--vocab-size", "18", "--out", str(out)]
    assert main([*arguments, "--steps", "1"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert "steps is 3 from here on; until now it was 1" in capsys.readouterr().out
    assert result(out)["steps"] == 3
    assert main(["train", "--out", str(out), "--resume", "--d-model", "32"]) == 1
    assert "d_model: " in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--config", config]) == 1
    assert "the run has its own configuration" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "none"), "--resume"]) == 1
    assert "has no checkpoint to resume from" in capsys.readouterr().err


def test_help_lists_every_setting(text_run, capsys):
    _, config = text_run
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", config, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "titans train --config" in shown
    run = TitansConfig.load(config)
    for section in (run.model, run.data, run.training, run.report):
        for name in section.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in shown
    assert re.search(r"--window N\s+.*\[8\]", shown, re.S)


def test_the_command_itself(capsys):
    assert main(["--help"]) == 0
    assert "titans memory-check RUN" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "unknown command trian; the nearest is train" in capsys.readouterr().err
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    scripts = dict(re.findall(r'^(titans[a-z-]*) = "([\w.:]+)"$', project, re.M))
    assert scripts.keys() == {"titans", "titans-train", "titans-infer", "titans-analyze"}
    module, names = "titans_pytorch.cli.main", [value.partition(":")[2] for value in scripts.values()]
    assert all(value.startswith(f"{module}:") for value in scripts.values())
    assert all(callable(getattr(__import__(module, fromlist=["x"]), name)) for name in names)


def test_search(tmp_path, capsys):
    task = "data: {task: copy, settings: {payload: 4, segment_len: 8}, test_rows: 8}"
    config = tiny_yaml(tmp_path, task, "lmm")
    out = tmp_path / "search"
    words = ["--config", config, "--vocab-size", "18", "--steps", "2", "--out", str(out), "--report-seeds", "7"]
    assert main(["search", *words, "--grid", "lr=1e-3,1e-2", "--grid", "symbols=4,16", "--seeds", "0,1"]) == 0
    found = json.loads((out / "search.json").read_text())
    settings = [one["settings"] for one in found["tried"]]
    assert {(s["lr"], s["symbols"]) for s in settings} == {(a, b) for a in (1e-3, 1e-2) for b in (4, 16)}
    means = [one["mean"] for one in found["tried"]]
    assert means == sorted(means, reverse=True)
    best = json.loads((out / "best-seed7" / "result.json").read_text())
    assert best["config"]["training"]["lr"] == settings[0]["lr"]
    assert best["config"]["training"]["seed"] == 7
    assert found["mean"] == best["scores"][-1]["accuracy"]
    before = (out / "000-seed0" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["search", *words, "--grid", "lr=1e-3,1e-2", "--grid", "symbols=4,16", "--seeds", "0,1"]) == 0
    assert (out / "000-seed0" / "result.json").stat().st_mtime_ns == before, "finished runs are kept"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "grid: give one or more --grid"),
        (["--grid", "lrr=1"], "grid: unknown setting lrr; the nearest is lr"),
        (["--grid", "lr=1,high"], "grid: lr must be a number, got 'high'"),
        (["--grid", "n_heads=2,3"], "grid: n_heads must be ..., got 3"),
        (["--grid", "use_decay=maybe"], "grid: use_decay must be true or false, got 'maybe'"),
        (["--grid", "lr=1", "--seeds", "1,2", "--report-seeds", "2"], "report_seeds must be ..., got 2"),
    ],
)
def test_mistakes_of_a_search(text_run, capsys, words, message):
    assert main(["search", "--config", text_run[1], *words]) == 1
    error = capsys.readouterr().err
    assert re.search(helpers.message(message), error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["copy", "needle"])
def test_the_committed_tasks(name):
    """What is asked for cannot be seen from where it is asked: another segment, beyond every window."""
    run = config_from(str(CONFIGS / f"{name}.yaml"), None)
    subject = subject_of(run)
    model = model_of(run.model, torch.device("cpu"))
    rows = subject.task.batch(0, 20)
    with torch.no_grad():
        assert model(rows.ids[:2]).shape == (2, run.training.seq_len, run.model.vocab_size)
    window = run.model.window
    for ids, targets in zip(rows.ids.tolist(), rows.targets, strict=True):
        asked = (targets >= 0).nonzero()[:, 0].tolist()
        if name == "copy":
            assert all(at - asked[0] < window - asked[0] % window for at in asked)
            assert subject.task.payload <= asked[0] // window * window
        else:
            assert asked[0] - (ids.index(0) + 1) > window + run.model.conv_kernel


def test_a_step_that_overshoots_is_named(task_run, tmp_path, capsys):
    """Steps up to 0.05 on keys of unit norm do not overshoot, steps up to 2 on keys of RMS norm 1 do."""
    _, config = task_run
    words = ["train", "--config", config, "--vocab-size", "18", "--steps", "1"]
    assert main([*words, "--max-step", "0.05", "--out", str(tmp_path / "unit")]) == 0
    assert "may overshoot" not in capsys.readouterr().out
    assert main([*words, "--max-step", "2", "--qk-norm", "rms", "--out", str(tmp_path / "rms")]) == 0
    said = capsys.readouterr().out
    (gain,) = result(tmp_path / "rms")["memory_gains"].values()
    assert gain > 2
    assert f"the gain of a mini-batch is {gain:.2g} in blocks.0" in said
    assert main(["analyze", str(tmp_path / "rms"), "--length", "24"]) == 0
    found = json.loads((tmp_path / "rms" / "analysis" / "memory.json").read_text())["memories"][0]["gain"]
    assert found > 2
    said = capsys.readouterr().out
    assert f"largest gain {found:.2g}\n" in said
    assert "may overshoot" in said


def test_a_loss_that_overflows_names_the_step(task_run, tmp_path, capsys):
    _, config = task_run
    words = ["--vocab-size", "18", "--qk-norm", "rms", "--max-step", "1e9", "--no-use-momentum", "--mem-layers", "1"]
    assert main(["train", "--config", config, *words, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"step 1: the (loss|gradient norm) is (nan|inf); the checkpoint of step 0 is kept in ", error)
    assert re.search(r"blocks\.\d+\S* \(NeuralMemory\)", error), "the memory is named"
    assert re.search(r"the learning rate of chunk \d+ is \S+: lower default_step_transform_max_lr", error)
    assert error.strip().count("\n") == error[: error.index("titans train:")].count("\n")


def test_text_needs_a_token_for_each_byte(text_run, tmp_path, capsys):
    words = ["train", "--config", text_run[1], "--vocab-size", "100", "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert capsys.readouterr().err == "titans train: vocab_size must be at least the 256 values of a byte, got 100\n"


def test_a_search_trains_again_what_was_cut_off(text_run, tmp_path):
    words = ["search", "--config", text_run[1], "--grid", "lr=1e-2", "--steps", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    scores = json.loads((tmp_path / "search.json").read_text())["scores"]
    (tmp_path / "best-seed100" / "result.json").write_text("{")
    assert main(words) == 0
    assert json.loads((tmp_path / "search.json").read_text())["scores"] == scores


def test_a_section_without_a_line_has_its_defaults():
    assert TitansConfig.from_yaml("model:\n") == TitansConfig()


def lone_folders(out):
    return sorted(p.name for p in out.iterdir())


def test_a_search_passes_over_what_diverges(text_run, tmp_path, capsys):
    words = ["search", "--config", text_run[1], "--grid", "lr=1e30,1e-2", "--steps", "2", "--out", str(tmp_path / "s")]
    assert main(words) == 0
    assert "1/2: lr 1e+30: diverged (step " in capsys.readouterr().out
    found = json.loads((tmp_path / "s" / "search.json").read_text())
    assert [one["mean"] is None for one in found["tried"]] == [False, True]
    assert found["tried"][1]["diverged"].startswith("step ")
    assert lone_folders(tmp_path / "s") == ["001-seed0", "best-seed100", "search.json"]
    assert lone_folders(tmp_path) == ["s"]


def test_a_search_of_which_all_diverges(text_run, tmp_path, capsys):
    words = ["--grid", "lr=1e30,2e30", "--steps", "2", "--out", str(tmp_path / "s")]
    assert main(["search", "--config", text_run[1], *words]) == 1
    assert "grid: every run diverged; lr 1e+30: step " in capsys.readouterr().err
    assert lone_folders(tmp_path / "s") == []


def test_a_search_that_was_stopped_goes_on_in_the_same_folders(text_run, tmp_path, monkeypatch, capsys):
    words = ["search", "--config", text_run[1], "--grid", "lr=1e-2,2e-2", "--out", str(tmp_path / "s")]
    words += ["--checkpoint-every", "1"]

    def stop(self, step):
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("titans_pytorch.training.text.Text.on_step", lambda self, model, step, *_: stop(self, step))
        assert main(words) == 130
    assert not (tmp_path / "s" / "000-seed0" / "result.json").exists()
    assert main(words) == 0
    assert "resuming from step 1" in capsys.readouterr().out
    assert lone_folders(tmp_path / "s") == ["000-seed0", "001-seed0", "best-seed100", "search.json"]
    assert main([*words, "--steps", "2"]) == 0
    assert lone_folders(tmp_path) == ["s"]


def test_two_searches_in_one_folder(text_run, tmp_path, capsys):
    with claimed(tmp_path):
        assert main(["search", "--config", text_run[1], "--grid", "lr=1e-2", "--out", str(tmp_path)]) == 1
    assert f"is using {tmp_path}" in capsys.readouterr().err
