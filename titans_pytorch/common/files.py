"""Atomic files (written under another name, then renamed), and JSON without NaN or Infinity."""

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

__all__ = [
    "appending",
    "json_text",
    "new_file",
    "parse_json",
    "read_json",
    "replacing",
    "replacing_folder",
    "sync",
    "write_json",
    "write_text",
]

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)  # neither exists on Windows


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Within this context, write a new file beside `path`; it takes `path`'s name at the end.

    After an error the new file is removed, and an earlier file at `path` stays. Folders are made as needed.

    Raises:
        OSError: if `path` is a folder, a pipe or a device, or the system cannot write.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a rename would replace /dev/null by a file
        raise FileExistsError(errno.EEXIST, "Not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        mode = new_file(part)
        yield part
        part.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        sync(part)
        os.replace(part, path)
    except OSError as error:
        raise about_file(error, path) from error
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Within this context, fill a new folder beside `path`; it takes `path`'s name at the end, if nothing or an empty
    folder is there. After an error the new folder is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        yield part
        for file in filter(Path.is_file, part.rglob("*")):
            sync(file)
        sync(part)
        if path.is_dir() and os.name != "posix":  # elsewhere a rename takes the place of an empty folder
            path.rmdir()
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync(path.parent)


def about_file(error: OSError, path: Path) -> OSError:
    """Return `error` with `path` as its file if it names none, as after a write on a full disk."""
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def new_file(path: Path) -> int:
    """Make an empty file and return its mode. FileExistsError if a file or a link is there."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | NO_LINK, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Return when the file, or the names in the folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def appending(path: str | os.PathLike) -> TextIO:
    """Open the file at `path` to append UTF-8 text; it is made if missing. OSError if it is a link."""
    flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY | NO_LINK
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8", newline="", buffering=1)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON text. JSON has no NaN or infinity: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` as `json_text` formats it, atomically."""
    write_text(path, json_text(value, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON `text`. ValueError if it is not JSON, has NaN or Infinity, or has a key twice."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike) -> Any:
    """Read the JSON file at `path`. ValueError as in `parse_json`, OSError if it cannot be read."""
    return parse_json(Path(path).read_bytes())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return found
