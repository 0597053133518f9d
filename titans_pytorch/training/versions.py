"""Versions and commit, for the record of a run."""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from titans_pytorch.common.version import installed

__all__ = ["git_commit", "versions"]


def versions(packages: Sequence[str] = ()) -> dict[str, str | None]:
    """Return the versions of Python, torch, this package and further `packages`; None if not installed."""
    found = {name: installed(name) for name in ("torch", "titans-pytorch", *packages)}
    return {"python": platform.python_version(), **found}


def git_commit(mark: str = "+") -> str | None:
    """Return the commit of this package's checkout, followed by `mark` where tracked files differ; None outside a
    checkout.
    """
    head = git("rev-parse", "HEAD")
    return head and head + (mark if git("status", "--porcelain", "--untracked-files=no") else "")


def git(*words: str) -> str | None:
    """Return the output of git in this package's checkout; None where it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
