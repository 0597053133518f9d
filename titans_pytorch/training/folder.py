"""The folder of a run: one run writes in it at a time, and a new run moves an earlier one aside."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from titans_pytorch.training.errors import TrainingError

__all__ = ["claim_folder", "write_text"]


def claim_folder(out: Path, resume: bool, say: Callable[[str], None] = print) -> IO[str]:
    """Makes `out` ready to be written to; the lock that is returned holds until it is closed."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"out: {out} is not a folder")
    if (out / "config.json").exists() and not resume:
        lock(out).close()
        aside = next(p for i in range(1, 1_000_000) if not (p := out.with_name(f"{out.name}-{i}")).exists())
        os.rename(out, aside)
        say(f"{out} held an earlier run, which is now {aside}")
    out.mkdir(parents=True, exist_ok=True)
    return lock(out)


def lock(out: Path) -> IO[str]:
    file = (out / ".lock").open("w")
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise TrainingError(f"another run is writing in {out}") from error
    return file


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)
