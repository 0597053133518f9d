"""Each example, in a quick form."""

import importlib.util
from pathlib import Path

import pytest

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
    tested = {"quick_start", "memory_in_a_transformer", "stream_a_file", "fine_tune"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


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
