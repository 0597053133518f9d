"""A needle among distractors: it is written, distractors are written, then it is read.

    write: needles (key, value), distractors (other keys, other values);  read: the needles' keys

in one carried state, scored at the queries alone. Needles are new in every row, so the slow parameters, trained on
other rows and frozen, cannot contain them. The distance of a needle is given by its position and the number of
distractors.

Letters as in `pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.later import torch
from harness.task import Metric, Task

from tasks.memories import small_memory
from tasks.pairs import ask, chosen_right, relative_error, tokens_of, unit_rows, write


class Haystack(NamedTuple):
    """keys [b u k], values [b u v] of the needles; hay [b n d], read after them; mark [1 d], before needles and
    queries."""

    keys: torch.Tensor
    values: torch.Tensor
    hay: torch.Tensor
    mark: torch.Tensor


@dataclass(frozen=True)
class Needle(Task):
    """needles: pairs to remember, after one marking token; length: distractors after them, each another pair."""

    dim: int = 32
    needles: int = 7
    length: int = 24
    batch_size: int = 16
    chunk_size: int = 8
    max_step: float = 1.0

    name = "needle"
    forgetting = "forgetting"
    metrics = (
        Metric("error", "lower", "error of the needles after the distractors, 1: answering zero"),
        Metric("forgetting", "lower", "that less the error right after writing", judged=True, beside="error"),
        Metric("error_at_once", "lower", "error right after writing"),
        Metric("found", "higher", "share of answers nearest to their own needle"),
    )

    def __post_init__(self):
        if self.dim % 2:
            raise ValueError(f"dim must be an even number (a key and a value), got {self.dim}")
        for name, tokens in (("needles", self.needles + 1), ("length", self.length)):
            if tokens % self.chunk_size:
                less = "one less than " if name == "needles" else ""
                takes = f"{less}a multiple of the chunk, {self.chunk_size}"
                raise ValueError(f"{name} must be {takes}, got {getattr(self, name)}")

    def memory(self) -> dict[str, Any]:
        return small_memory(self.dim, self.chunk_size, self.max_step)

    def batch(self, world: Any, generator: torch.Generator) -> Haystack:
        half = self.dim // 2
        keys, values = (unit_rows(self.batch_size, self.needles, half, generator=generator) for _ in range(2))
        hay = torch.cat([unit_rows(self.batch_size, self.length, half, generator=generator) for _ in range(2)], dim=-1)
        mark = torch.ones(1, self.dim)
        mark[:, ::2] = -1.0
        return Haystack(keys, values, hay, mark)

    def answers(self, memory: torch.nn.Module, data: Haystack, state=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs [b u v] right after the write, and after the distractors. state: state of earlier
        tokens.
        """
        half = self.dim // 2
        state = write(memory, tokens_of(data.mark, data.keys, data.values), 1, state)
        questions = tokens_of(data.mark, data.keys, None)
        at_once = ask(memory, questions, 1, state)[..., half:]
        return at_once, ask(memory, questions, 1, write(memory, data.hay, 0, state))[..., half:]

    def loss(self, model: torch.nn.Module, batch: Haystack) -> torch.Tensor:
        return sum(relative_error(answers, batch.values) for answers in self.answers(model, batch)) / 2

    def scores(self, model: torch.nn.Module, batch: Haystack) -> Mapping[str, float]:
        at_once, late = self.answers(model, batch)
        before, after = relative_error(at_once, batch.values), relative_error(late, batch.values)
        found = chosen_right(late, batch.values)
        return {"error": after, "forgetting": after - before, "error_at_once": before, "found": found}

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([h.values for h in train]).mean(dim=(0, 1))
        error = sum(relative_error(mean.expand_as(h.values), h.values).item() for h in test) / len(test)
        return {"error": error, "error_at_once": error, "forgetting": 0.0, "found": 1 / self.needles}
