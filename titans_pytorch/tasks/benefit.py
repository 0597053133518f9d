"""The change of a memory while a model reads, and its benefit over the same model with writing switched off.

Letters: b rows, n tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.analysis.trace import trace_memories
from titans_pytorch.common.switches import evaluating
from titans_pytorch.tasks.task import Task

__all__ = ["Benefit", "benefit_on_task", "benefit_on_text", "memory_change"]


@dataclass(frozen=True)
class Benefit:
    """A measure with writing switched on and off, over the same rows.

    measure: name of the measure.
    on: its mean with writing.
    off: its mean with writing switched off.
    gain: improvement by writing, in the measure's unit.
    low: the lower end of the gain's 95 % interval (normal, paired by row).
    high: the upper end of that interval.
    rows: number of rows measured.
    """

    measure: str
    on: float
    off: float
    gain: float
    low: float
    high: float
    rows: int

    @property
    def verdict(self) -> str:
        """ "storing helps", "storing harms", or "no difference found" where the interval holds zero."""
        if self.low > 0:
            return "storing helps"
        if self.high < 0:
            return "storing harms"
        return "no difference found"


def paired(measure: str, on: Sequence[float], off: Sequence[float], lower_is_better: bool) -> Benefit:
    """Return the Benefit of paired values. on, off: one value for each row."""
    n = len(on)
    gains = [(b - a) if lower_is_better else (a - b) for a, b in zip(on, off, strict=True)]
    mean = sum(gains) / n
    deviation = math.sqrt(sum((g - mean) ** 2 for g in gains) / max(1, n - 1))
    half = 1.96 * deviation / math.sqrt(n) if n > 1 else math.inf
    return Benefit(measure, sum(on) / n, sum(off) / n, mean, mean - half, mean + half, n)


@torch.no_grad()
def benefit_on_text(model: nn.Module, windows: Tensor, skip: int = 0, batch_size: int = 8, device="cpu") -> Benefit:
    """Measure bits per token, with writing switched on and off.

    Args:
        model: ids [b n] -> logits [b n v].
        windows: ids [b n + 1].
        skip: number of first predictions of each window to leave out.
        batch_size: rows in one forward pass.
        device: where the model computes.
    """

    def bits() -> list[float]:
        found: list[float] = []
        for rows in windows.long().split(batch_size):
            rows = rows.to(device)
            loss = F.cross_entropy(model(rows[:, :-1]).float().transpose(1, 2), rows[:, 1:], reduction="none")
            found += (loss[:, skip:].double().mean(dim=1) / math.log(2)).tolist()
        return found

    with evaluating(model):
        on = bits()
        with storing_off(model):
            off = bits()
    return paired("bits per token", on, off, lower_is_better=True)


def benefit_on_task(model: nn.Module, task: Task, rows: int, length: int, batch_size: int = 8, device="cpu") -> Benefit:
    """Measure accuracy on held-out rows of a task, with writing switched on and off.

    Args:
        model: ids [b n] -> logits [b n v].
        task: a task from `build_task`.
        rows: number of rows.
        length: tokens of a row.
        batch_size: rows in one forward pass.
        device: where the model computes.
    """

    def accuracy():
        return task.score(model, rows, length, batch_size, device).by_row

    on = accuracy()
    with storing_off(model):
        return paired("accuracy", on, accuracy(), lower_is_better=False)


def memory_change(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Return |M - M_0| / |M_0| of each memory of `model`, by its name, after the model read ids [b n]."""
    return {trace.name: trace.change[-1] for trace in trace_memories(model, ids, piece=ids.shape[1])}
