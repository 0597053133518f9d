"""Reads result files; errors are one clear line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pytorch.common.files import read_json


class Unreadable(Exception):
    """A file that cannot be read: one line for the user."""


def read(path: str | Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Unreadable(f"{path}: no JSON ({error})") from error
    if not isinstance(found, Mapping):
        raise Unreadable(f"{path}: holds a {type(found).__name__}, not the result of a benchmark")
    return dict(found)


def at(record: Mapping[str, Any], *path: str) -> Any:
    """Return the entry at a path; None if there is none."""
    for step in path:
        if not isinstance(record, Mapping) or step not in record:
            return None
        record = record[step]
    return record
