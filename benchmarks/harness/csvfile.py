"""CSV histories: one row per task, arm and metric of a run. A file with other columns is rejected."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pytorch.common.files import appending

COLUMNS = (
    "timestamp_utc",
    "benchmark",
    "schema",
    "tag",
    "configuration",
    "commit",
    "device",
    "task",
    "arm",
    "metric",
    "better",
    "seeds",
    "mean",
    "sd",
    "low",
    "high",
    "parameters",
    "switch_rate",
    "control",
    "gain",
    "gain_low",
    "gain_high",
    "verdict",
)


class OtherSchema(Exception):
    """The file holds other columns than these rows."""


def check_columns(path: str | Path) -> None:
    """Raise OtherSchema if the file exists with other columns."""
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if tuple(found) != COLUMNS:
        raise OtherSchema(
            f"{path} has {len(found)} columns that are not those of this program ({len(COLUMNS)}): take another file"
        )


def append_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append all rows in one write, after the header if the file is new."""
    check_columns(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerows(rows)
    with appending(path) as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
