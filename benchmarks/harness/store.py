"""Finished results of an unfinished run: one JSON line each, in a file that a rerun of the same command continues."""

import math
import os
from pathlib import Path
from typing import Any

from titans_pytorch.common.files import appending, json_text, parse_json


class Finished:
    """Results by key. path: None keeps them in memory only. A last line that was cut off is left out, and overwritten
    by what follows."""

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self) -> None:
        whole = 0
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    entry = parse_json(line)
                    self.results[entry["key"]] = unpacked(entry["result"])
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
        with self.path.open("r+b") as file:
            file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def __len__(self) -> int:
        return len(self.results)

    def add(self, key: str, result: Any) -> Any:
        """Write a result to disk. Returns the result as a reader of the file gets it."""
        line = json_text({"key": key, "result": packed(result)})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with appending(self.path) as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.results[key] = unpacked(parse_json(line)["result"])
        return self.results[key]

    def close(self) -> None:
        """Remove the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def packed(value: Any) -> Any:
    """Replace numbers that are not finite (an arm that diverged) by mappings that JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"not finite": str(value)}
    if isinstance(value, dict):
        return {name: packed(v) for name, v in value.items()}
    return [packed(v) for v in value] if isinstance(value, (list, tuple)) else value


def unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["not finite"]) if "not finite" in value else {k: unpacked(v) for k, v in value.items()}
    return [unpacked(v) for v in value] if isinstance(value, list) else value
