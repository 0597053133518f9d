"""Metrics of a run as JSON lines, one record for each step or validation."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends records to a file. Resuming drops the records after the step that is resumed from."""

    def __init__(self, path: Path, resume_step: int | None = None):
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if resume_step is not None else []
        beside = path.with_name(f"{path.name}.part")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(beside, path)
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
