"""What is done with a finished run: sample, eval, analyze, memory-check."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from titans_pytorch import MemoryAsContextTransformer, TitansConfig, TitansMAC, load_run
from titans_pytorch.cli.main import main
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.errors import TrainingError

from .. import helpers
from .conftest import tiny_yaml, train_mac


@pytest.mark.parametrize("kind", ["text_run", "mac_run"])
def test_sample(kind, tmp_path, capsys, request):
    run = str(request.getfixturevalue(kind)[0])
    capsys.readouterr()
    texts = []
    for more in ([], [], ["--seed", "1"], ["--no-storing"]):
        assert main(["sample", run, "--prompt", "memory learns", "--length", "30", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("memory learns")
    assert texts[0] == texts[1] != texts[2]
    (tmp_path / "start").write_text("time and ")
    assert main(["sample", run, "--prompt-file", str(tmp_path / "start"), "--length", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("time and ")


@pytest.mark.parametrize("kind", ["text_run", "mac_run"])
def test_eval_of_text(kind, text_file, tmp_path, capsys, request):
    folder, target = request.getfixturevalue(kind)[0], tmp_path / "eval.json"
    run = str(folder)
    assert main(["eval", run, "--json", str(target)]) == 0
    (found,) = json.loads(target.read_text())["results"]
    result = json.loads((folder / "result.json").read_text())
    assert found["length"] == 24
    assert found["bits_per_byte"] == pytest.approx(result["held_out_bits_per_byte"], rel=0.02)
    assert found["storing_off"] != found["bits_per_byte"]
    words = ["--text", str(text_file), "--limit", "200", "--length", "16", "64"]
    assert main(["eval", run, *words, "--json", str(target)]) == 0
    assert [row["length"] for row in json.loads(target.read_text())["results"]] == [16, 64]
    assert "length 64, bits per byte" in capsys.readouterr().out


def test_eval_of_a_task(task_run, tmp_path):
    target = tmp_path / "eval.json"
    assert main(["eval", str(task_run[0]), "--length", "24", "48", "--rows", "12", "--json", str(target)]) == 0
    found = json.loads(target.read_text())["results"]
    scores = json.loads((task_run[0] / "result.json").read_text())["scores"]
    assert [row["accuracy"] for row in found] == [row["accuracy"] for row in scores], "as at the end of training"
    assert [row["storing_off"] for row in found] == [row["storing_off"] for row in scores]


@pytest.mark.parametrize(("kind", "many"), [("text_run", 1), ("task_run", 1), ("mac_run", 2)])
def test_analyze(kind, many, tmp_path, capsys, request):
    run = request.getfixturevalue(kind)[0]
    assert main(["analyze", str(run), "--length", "40", "--piece", "8", "--out", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / "memory.json").read_text())
    assert (tmp_path / "a" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert len(found["memories"]) == many
    for memory in found["memories"]:
        assert len(memory["change"]) == len(memory["moved"]) == 5
        assert len(memory["surprise"]) == len(memory["step"]) == len(memory["decay"])
        assert len(memory["surprise"]) * memory["tokens_per_entry"] >= 40
        assert memory["change"][0] == pytest.approx(memory["moved"][0])
    assert "weights changed by" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["text_run", "task_run", "mac_run"])
def test_memory_check(kind, tmp_path, capsys, request):
    run = request.getfixturevalue(kind)[0]
    target = tmp_path / "check.json"
    assert main(["memory-check", str(run), "--rows", "6", "--length", "32", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert all(change > 0 for change in found["change"].values())
    assert len(found["change"]) == (2 if kind == "mac_run" else 1)
    assert found["low"] <= found["gain"] <= found["high"]
    sign = 1 if kind == "task_run" else -1
    assert found["gain"] == pytest.approx(sign * (found["on"] - found["off"]))
    assert found["verdict"] in capsys.readouterr().out


def test_without_memory(text_file, tmp_path, capsys):
    config = tiny_yaml(tmp_path, f"data: {{data: {text_file}, data_limit: 3000}}", "baseline")
    out = str(tmp_path / "run")
    assert main(["train", "--config", config, "--steps", "1", "--out", out]) == 0
    for command in ("analyze", "memory-check"):
        capsys.readouterr()
        assert main([command, out]) == 1
        assert "a baseline model has no memory" in capsys.readouterr().err
    assert main(["eval", out]) == 0


def test_train_mac_without_memory(text_file, tmp_path, capsys):
    out = str(train_mac(tmp_path / "run", text_file, "--no-memory"))
    for command in ("analyze", "memory-check"):
        capsys.readouterr()
        assert main([command, out]) == 1
        assert capsys.readouterr().err == f"titans {command}: {out}: a model trained with --no-memory has no memory\n"
    assert main(["sample", out, "--length", "3"]) == 0
    assert main(["eval", out]) == 0


def test_titans_train_resumes_a_run_of_train_mac(mac_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(mac_run[0], out)
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert json.loads((out / "result.json").read_text())["steps"] == 3
    config, model = load_run(out)
    assert (config.training.steps, type(model)) == (3, MemoryAsContextTransformer)


def test_load_run(text_run, mac_run):
    """As the command line and as anyone else calls it: the weights that were saved, in eval mode."""
    for (folder, _), settings, kind in (
        (text_run, TitansConfig, TitansMAC),
        (mac_run, RunConfig, MemoryAsContextTransformer),
    ):
        config, model = load_run(folder)
        assert (type(config), type(model), model.training) == (settings, kind, False)
        assert config.to_json() == (folder / "config.json").read_text()
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
        ids = torch.arange(40)[None]
        assert torch.equal(model(ids), load_run(str(folder), "cpu")[1](ids))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("nowhere",), TrainingError, "nowhere holds no run: there is no nowhere/config.json"),
        ((3,), ValueError, "folder must be the path of a run's folder, got int"),
        (("nowhere", "gpu0"), TrainingError, "device must be one that torch can use here, got 'gpu0'..."),
        (("nowhere", 0), ValueError, "device must be a torch.device or its name, got int"),
    ],
)
def test_load_run_of_something_else(given, error, message):
    with pytest.raises(error, match=helpers.message(message)):
        load_run(*given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "nowhere"], "nowhere holds no run: there is no nowhere/config.json"),
        (["sample", "TEXT", "--prompt", ""], "prompt"),
        (["sample", "TEXT", "--prompt-file", "none.txt"], "none.txt cannot be read"),
        (["sample", "TASK"], "needs a model of bytes (256 tokens)"),
        (
            ["sample", "TEXT", "--length", "0"],
            "argument --new-bytes/--length: must be a whole number of at least 1",
        ),
        (["eval", "TEXT", "--text", "none.txt"], "none.txt does not exist"),
        (["eval", "TASK", "--length", "3"], "length must be at least 12..., got 3"),
        (["eval", "TASK", "--lenght", "3"], "unknown setting --lenght; the nearest is --length"),
        (["analyze", "TEXT", "--length", "99999"], "text must have more than length = 99999 bytes, got 150 bytes"),
        (["memory-check", "TASK", "--text", "x"], "text needs a model of bytes (256 tokens), the run's knows 18"),
        (["sample", "TEXT", "--temperature", "-1"], "argument --temperature: must be a number of at least 0, got '-1'"),
        (
            ["sample", "TEXT", "--temperature", "nan"],
            "argument --temperature: must be a number of at least 0, got 'nan'",
        ),
        (["sample", "TEXT", "--seed", "9" * 20], "must be a whole number from 0 to 9223372036854775807"),
        (
            ["eval", "TEXT", "--limit", "1"],
            "more than length = 24 bytes, got the first 1 bytes of it (--limit)",
        ),
        (["eval", "TEXT", "--length", "99999"], "text must have more than length = 99999 bytes, got 150 bytes"),
        (["eval", "TEXT", "--json", "TEXT"], "run: Is a directory"),
        (["train", "--steps", "3", "yes"], "got 'yes', which is no setting's name and follows none that takes a value"),
        (["train", "--seed", "9" * 20], "must be at most 9223372036854775807"),
        (["train", "--lr", "nan"], "lr must be a number, got nan"),
    ],
)
def test_mistakes(text_run, task_run, capsys, words, message):
    folders = {"TEXT": str(text_run[0]), "TASK": str(task_run[0])}
    try:
        status = main([folders.get(word, word) for word in words])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    if words[-1] == "":  # an empty prompt is a line's end
        assert status == 0
        return
    assert status in (1, 2)
    assert re.search(helpers.message(message), error)
    assert error.count("\n") == 1


def test_broken_folders(text_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(text_run[0], out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["sample", str(out)]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
    weights.unlink()
    assert main(["sample", str(out), "--length", "2"]) == 0, "the last checkpoint serves"
    shutil.rmtree(out / "checkpoints")
    capsys.readouterr()
    assert main(["sample", str(out)]) == 1
    assert "holds no weights" in capsys.readouterr().err
    (out / "config.json").write_text("[1]")
    assert main(["sample", str(out)]) == 1
    assert (
        "is not a configuration of titans train or train_mac.py: "
        "configuration must be sections model, data, training, report, got list" in capsys.readouterr().err
    )
    (out / "config.json").write_text("{")
    assert main(["sample", str(out)]) == 1
    assert "is not a configuration of titans train" in capsys.readouterr().err


def test_filters_of_samples(text_run, capsys):
    run = str(text_run[0])

    def written(*more):
        assert main(["sample", run, "--prompt", "memory", "--new-bytes", "40", *more]) == 0
        return capsys.readouterr().out

    likeliest = written("--temperature", "0")
    assert written("--top-k", "1") == written("--top-p", "1e-9") == written("--min-p", "1") == likeliest
    assert written() == written("--min-p", "0.1") != likeliest
    assert written("--top-k", "256") == written("--top-p", "1") == written("--min-p", "0") != written()


@pytest.mark.parametrize("words", [["--top-k", "0"], ["--top-p", "0"], ["--top-p", "1.5"], ["--min-p", "-1"]])
def test_filters_out_of_range(text_run, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(text_run[0]), *words])
    assert f"argument {words[0]}: must be a" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "analyze", "memory-check"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tiny", "text must have more than length = "),
        (b"", "text: TINY is empty"),
        (None, "text: TINY does not exist"),
    ],
)
def test_a_text_too_small_speaks_of_the_text(text_run, tmp_path, capsys, command, content, message):
    tiny = tmp_path / "tiny.txt"
    if content is not None:
        tiny.write_bytes(content)
    assert main([command, str(text_run[0]), "--text", str(tiny)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"titans {command}: {message.replace('TINY', str(tiny))}")
    assert not re.search("train|held", error)


def test_all_of_a_text_of_ones_own_is_read(text_run, tmp_path):
    small = tmp_path / "small.txt"
    small.write_bytes(b"memory learns " * 2)  # 28 bytes, of which training would hold out one
    assert main(["eval", str(text_run[0]), "--text", str(small)]) == 0
