"""Each example, in a quick form."""

import ast
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *argv):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in argv])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog, and again: " * 40)
    return path


def test_all_are_tested():
    tested = {"quick_start", "memory_in_a_transformer", "stream_a_file", "fine_tune", "own_model"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_unknown_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, "--sead", 1)
    assert stopped.value.code == 2
    assert "the nearest is --seed" in capsys.readouterr().err


def test_quick_start(text, capsys):
    assert run("quick_start", "--steps", 2, "--text", text, "--variant", "lmm") == 0
    out = capsys.readouterr().out
    assert "step    1: 5." in out
    assert float(out.split("differ by ")[1]) < 1e-4
    assert run("quick_start", "--text", text.with_name("none.txt")) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick_start", "memory_in_a_transformer", "stream_a_file"])
def test_a_device_that_is_not_there(name, capsys):
    assert run(name, "--device", "cdua") == 1
    error = capsys.readouterr().err
    assert "device must be one that torch can use here, got 'cdua'" in error
    assert error.count("\n") == 1


def test_memory_in_a_transformer(capsys):
    pytest.importorskip("transformers")
    assert run("memory_in_a_transformer", "--steps", 2, "--phrase", 4) == 0
    assert "storing switched off" in capsys.readouterr().out


def test_own_model(capsys):
    threads = torch.get_num_threads()
    try:
        assert run("own_model", "--steps", 2, "--seed", 1, "--threads", 1) == 0
    finally:
        torch.set_num_threads(threads)
    loss, accuracies, stream = capsys.readouterr().out.splitlines()
    assert loss.startswith("step    0: loss 4.")
    on, off, chance = (float(number) for number in re.findall(r"([\d.]+)%", accuracies))
    assert chance == 6.2
    assert max(on, off) < 15
    assert float(stream.split("differ by ")[1]) < 1e-4


def test_own_model_is_shown_on_its_page():
    """The definitions, and main's blocks: accuracy with writing off, the stream."""
    page = (EXAMPLES.parent / "docs" / "in_your_own_model.md").read_text()
    source = (EXAMPLES / "own_model.py").read_text()
    parts = [part for part in ast.parse(source).body if isinstance(part, ast.ClassDef | ast.FunctionDef)]
    assert [part.name for part in parts] == ["OwnModel", "train", "main"]
    blocks = [part for part in parts[-1].body if isinstance(part, ast.With)]
    assert len(blocks) == 2
    for part in [*parts[:-1], *blocks]:
        assert textwrap.dedent(ast.get_source_segment(source, part, padded=True)) in page


def test_stream_a_file(text, tmp_path, capsys):
    """In one go, and in three with the state saved in between: the same bits."""
    assert run("stream_a_file", "--file", text, "--state", tmp_path / "whole", "--piece", 300) == 0
    whole = capsys.readouterr().out.splitlines()[0]
    for _ in range(3):
        assert run("stream_a_file", "--file", text, "--state", tmp_path / "parts", "--bytes", 801, "--piece", 100) == 0
        parts = capsys.readouterr().out.splitlines()
    assert parts[0].endswith("1,602 bytes were read before")
    assert parts[1] == whole
    assert run("stream_a_file", "--file", tmp_path / "none") == 1
    assert "none" in capsys.readouterr().err


def test_fine_tune(text, tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "tuned"
    assert run("fine_tune", "--steps", 2, "--length", 32, "--text", text, "--out", out) == 0
    assert (out / "model.safetensors").is_file()
    assert "written by the saved model" in capsys.readouterr().out
    assert run("fine_tune", "--steps", 1, "--length", 32, "--text", text, "--model", out, "--out", out) == 0
