"""The folder of a run: one run uses it at a time, and a new run moves an earlier one aside."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titans_pytorch.common.files import NO_LINK
from titans_pytorch.training.checkpoint import remove
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.processes import first_process

if sys.platform != "win32":  # on Windows there is no lock
    import fcntl

__all__ = ["claimed", "prepare_folder"]

OF_A_RUN = ("config.json", "checkpoints", "result.json", "model.safetensors")


class InUse(TrainingError):
    """Another run holds the folder."""


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Lock the folder `out` for this run.

    The lock is on the file `out`.lock beside the folder, so that it holds while the folder is moved. The system
    releases it when the process ends, however it ends. Processes of one run other than the first (RANK) hold none.

    Raises:
        TrainingError: if another run holds it, or `out` cannot be a folder.
        OSError: if the lock file cannot be made, for example because a link has its name.
    """
    out = out.resolve()
    if not out.name:
        raise TrainingError(f"out must be a folder of its own, got {out}")
    if out.exists() and not out.is_dir():
        raise TrainingError(f"out must be a folder, got {out}")
    if sys.platform == "win32" or not first_process():
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.lock")
    descriptor = locked(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it before sees that it is gone
        os.close(descriptor)


def locked(path: Path, out: Path) -> int:
    """Open and lock the lock file at `path`; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace")
            by = f" (process {holder})" if holder.isdigit() else ""
            os.close(descriptor)
            raise InUse(f"another run{by} is using {out}") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at `path`. (The last holder of a lock removes its file.)"""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def prepare_folder(out: Path, resume: bool, say: Callable[[str], None] = print) -> None:
    """Prepare `out`, which the caller has locked, for writing. `say` is called with a line if an earlier run is moved
    aside.
    """
    out = out.resolve()
    if not resume and any((out / name).exists() for name in OF_A_RUN):
        aside = moved_aside(out)
        say(f"{out} held an earlier run, which is now {aside}")
    out.mkdir(parents=True, exist_ok=True)
    for part in (*out.glob("*.part"), *out.glob("checkpoints/*.part")):  # of a run that was killed while it wrote
        remove(part)


def moved_aside(out: Path) -> Path:
    for i in itertools.count(1):
        aside = out.with_name(f"{out.name}-{i}")
        with suppress(InUse), claimed(aside):  # a rename would replace the empty folder of a run that begins
            if not os.path.lexists(aside):
                os.rename(out, aside)
                return aside
    raise AssertionError
