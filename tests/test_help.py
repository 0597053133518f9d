"""--help and --version of every program answer before torch, which takes seconds, is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titans_pytorch.cli.main import COMMANDS
from titans_pytorch.tasks import TASK_NAMES
from titans_pytorch.tasks.registry import TASKS

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [
    "train_mac.py",
    *(
        f"benchmarks/{path.name}"
        for path in BENCHMARKS
        if re.search("OneLineParser|^BENCHMARK", path.read_text(), re.M)
    ),
    *(f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))),
]
PROGRAM = """
import runpy, sys
kind, name = sys.argv[1:3]
sys.argv = [name, *sys.argv[3:]]
try:
    if kind == "script":
        sys.path.insert(0, name.rpartition("/")[0])
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    assert not stopped.code, stopped.code
assert "torch" not in sys.modules
"""


def shown(kind, name, *words):
    command = [sys.executable, "-c", PROGRAM, kind, name, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_titans(words):
    assert "titans" in shown("module", "titans_pytorch.cli", *words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    text = shown("script", str(ROOT / name), "--help")
    assert "usage:" in text
    assert "--version" in text


def test_names_of_tasks():
    assert tuple(TASKS) == TASK_NAMES
