"""The command of hints: typed as printed it starts the same program again."""

import os
import subprocess
import sys

import pytest

from titans_pytorch.training.again import started_as

PROGRAM = """import os, sys
from titans_pytorch.training.again import started_as
print(started_as())
print(sys.executable, os.path.abspath(sys.argv[0]), sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("{python} 'a folder/program.py'", " 'a folder/program.py'"),
        ("{python} -m package", " -m package"),
        ("'a folder/a-tool'", "'a folder/a-tool'"),
        ("a-tool", "a-tool"),
    ],
)
def test_typed_as_printed(tmp_path, how, ends):
    folder = tmp_path / "a folder"
    for path, first in (("program.py", ""), ("a-tool", f"#!{sys.executable}\n"), ("package/__main__.py", "")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(first + PROGRAM)
        (folder / path).chmod(0o755)
    modules = os.pathsep.join([str(folder), *sys.path])
    programs = f"{folder}{os.pathsep}{os.environ['PATH']}" if how == "a-tool" else os.environ["PATH"]
    environment = {**os.environ, "PYTHONPATH": modules, "PATH": programs}

    def lines(command):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    hint, ran = lines(f"{how.format(python=sys.executable)} --more")
    assert hint.endswith(ends)
    assert lines(f"{hint} --more") == [hint, ran]


def test_several_processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert started_as(str(tmp_path / "train.py")) == "torchrun --nproc-per-node 2 train.py"


def test_the_interpreter_on_the_path_has_its_name(monkeypatch, tmp_path):
    """A virtual environment's python is a link: in another place it is of another environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "one"))
    elsewhere = str(tmp_path.parent / "elsewhere" / "python")
    for place, typed in (("one", "python"), ("two", "two/python"), ("../elsewhere", elsewhere)):
        monkeypatch.setattr(sys, "executable", os.path.abspath(tmp_path / place / "python"))
        assert started_as("train.py") == f"{typed} train.py"
