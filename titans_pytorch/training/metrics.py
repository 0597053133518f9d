"""Metrics of a run as JSON lines, one record for each step or validation."""

from pathlib import Path
from typing import Any

from titans_pytorch.common.files import appending, json_text, parse_json, write_text
from titans_pytorch.training.errors import TrainingError

__all__ = ["MetricsLog", "RunningMean", "read_metrics"]


class MetricsLog:
    """Appends records to a file. Resuming drops the records after the step that is resumed from."""

    def __init__(self, path: Path, resume_step: int | None = None):
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if resume_step is not None else []
        write_text(path, "".join(json_text(record) + "\n" for record in kept))
        self.file = appending(path)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json_text(record) + "\n")

    def close(self) -> None:
        self.file.close()


class RunningMean:
    """An exponential moving average, corrected for its start: the first values count as much as later ones.

    Args:
        memory: factor of a value's weight at each later value; 0.95 averages over about 20 values.
    """

    def __init__(self, memory: float = 0.95):
        self.memory, self.total, self.weight = memory, 0.0, 0.0

    def add(self, value: float) -> float:
        """Add the newest `value` and return the average."""
        self.total = self.memory * self.total + (1 - self.memory) * value
        self.weight = self.memory * self.weight + (1 - self.memory)
        return self.total / self.weight


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every complete record. An incomplete last line is left out; another invalid line raises TrainingError."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it has no step")
        except ValueError as error:
            if number == len(lines):
                break
            raise TrainingError(f"{path}: line {number} is no record of a step ({error})") from error
        records.append(record)
    return records
