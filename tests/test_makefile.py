"""What make would run (make -n): the installation says what it fetches, and has a choice of PyTorch."""

import shutil
import subprocess

import pytest

from .documents import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
CPU = "torch --index-url https://download.pytorch.org/whl/cpu"


def dry(tmp_path, *arguments: str, target: str = ".installed") -> subprocess.CompletedProcess:
    venv = tmp_path / "venv"
    command = ["make", "-n", f"VENV={venv}", f"{venv}/{target}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_says_what_it_fetches_before_it_does(tmp_path):
    lines = dry(tmp_path).stdout.splitlines()
    said = next(i for i, line in enumerate(lines) if "GB to download" in line)
    fetched = [i for i, line in enumerate(lines) if "pip install" in line]
    assert said < min(fetched)
    assert "6 GB on disk" in lines[said]
    assert "TORCH=cpu" in lines[said]


@pytest.mark.parametrize("target", [".installed", ".installed-docs"])
def test_long_downloads_show_progress(tmp_path, target):
    large = [line for line in dry(tmp_path, target=target).stdout.splitlines() if "pip install" in line]
    large = [line for line in large if not line.endswith("--upgrade pip")]
    assert large
    assert [line for line in large if "--quiet" in line or " -q" in line] == []


def test_the_cpu_build(tmp_path):
    assert CPU not in dry(tmp_path).stdout
    run = dry(tmp_path, "TORCH=cpu").stdout
    assert run.index(CPU) < run.index('-e ".[test,examples]"')
    assert "CPU build" in run


def test_constraints_hold_for_everything(tmp_path):
    run = dry(tmp_path, "TORCH=cpu", "CONSTRAINTS=configs/constraints.txt", target=".installed-docs").stdout
    installs = [line for line in run.splitlines() if "pip install" in line and "--upgrade pip" not in line]
    assert len(installs) == 3
    assert [line for line in installs if "-c configs/constraints.txt" not in line] == []


def test_another_torch_is_refused(tmp_path):
    run = dry(tmp_path, "TORCH=gpu")
    assert run.returncode != 0
    assert "TORCH must be one of: cpu default, got gpu" in run.stderr
