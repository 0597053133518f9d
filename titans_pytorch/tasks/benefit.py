"""The change of a memory while a model reads, and its benefit over the same model with storing off.

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
    """A measure with storing on and off, over the same rows.

    measure: what is measured.
    on: its mean with storing.
    off: its mean with storing switched off.
    gain: how much better with, in the measure's unit.
    low: the lower end of the gain's 95 % interval (normal, paired by row).
    high: its upper end.
    rows: how many were measured.
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
    """on, off: one value for each row."""
    n = len(on)
    gains = [(b - a) if lower_is_better else (a - b) for a, b in zip(on, off, strict=True)]
    mean = sum(gains) / n
    deviation = math.sqrt(sum((g - mean) ** 2 for g in gains) / max(1, n - 1))
    half = 1.96 * deviation / math.sqrt(n) if n > 1 else math.inf
    return Benefit(measure, sum(on) / n, sum(off) / n, mean, mean - half, mean + half, n)


@torch.no_grad()
def benefit_on_text(model: nn.Module, windows: Tensor, skip: int = 0, batch_size: int = 8, device="cpu") -> Benefit:
    """Bits per token, with storing on and off.

    Args:
        model: ids [b n] -> logits [b n v].
        windows: ids [b n + 1].
        skip: leave out the first predictions of each, so many.
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
    """Accuracy on held-out rows of a task, with storing on and off.

    Args:
        model: ids [b n] -> logits [b n v].
        task: of `build_task`.
        rows: how many.
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
    """|M - M_0| / |M_0| of each memory of `model` after reading ids [b n], by its name."""
    return {trace.name: trace.change[-1] for trace in trace_memories(model, ids, piece=ids.shape[1])}
