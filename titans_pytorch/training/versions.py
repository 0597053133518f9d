"""What a run was made with, for its record."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

__all__ = ["git_commit", "versions"]


def versions() -> dict[str, str | None]:
    """Of Python, torch and this package (None where it is not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["titans-pytorch"] = importlib.metadata.version("titans-pytorch")
    except importlib.metadata.PackageNotFoundError:
        found["titans-pytorch"] = None
    return found


def git_commit() -> str | None:
    """Of this package's checkout, with '+' where files differ from it; None outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
