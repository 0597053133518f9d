"""Finished results of an unfinished run: one JSON line each, in a file that a rerun of the same command continues."""

import json
import os
from pathlib import Path
from typing import Any


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
                    entry = json.loads(line)
                    self.results[entry["key"]] = entry["result"]
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
        """On disk before it returns. Returns the result as a reader of the file would get it."""
        line = json.dumps({"key": key, "result": result})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.results[key] = json.loads(line)["result"]
        return self.results[key]

    def close(self) -> None:
        """The run is complete: the file goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
