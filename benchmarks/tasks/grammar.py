"""A grammar of brackets: a closing must return the value of the opening that it closes.

A sequence of openings and closings, nested. An opening is a pair: the key of its kind and a value of its own, drawn
anew each time. A closing is a query: the key of its kind. The target is the value of the opening that it closes, so a
memory must return a value after an inner bracket of the same kind has overwritten it. Kinds and their keys are fixed by
the seed; values cannot be known from training. Everything is read in one carried state; closings are not written.

Letters as in `pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.later import torch
from harness.task import Metric, Task, generator

from tasks.memories import small_memory
from tasks.pairs import unit_rows


class Brackets(NamedTuple):
    """tokens [b n d]; opening, asked bool [b n] (asked: a closing whose opening lies in a chunk before its own);
    deep bool [b n]: asked, and the same kind was opened again in between; answers [b n v], zero without a query."""

    tokens: torch.Tensor
    opening: torch.Tensor
    asked: torch.Tensor
    deep: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Grammar(Task):
    """kinds: kinds of brackets; depth: largest nesting depth; length: tokens."""

    dim: int = 32
    kinds: int = 4
    depth: int = 3
    length: int = 32
    batch_size: int = 16
    chunk_size: int = 1
    memory_batch: int = 8
    max_step: float = 1.0

    name = "grammar"
    forgetting = "covering"
    metrics = (
        Metric("error", "lower", "error of the outputs at closings, 1: predicting zero"),
        Metric("error_deep", "lower", "where the same kind was opened again in between"),
        Metric("covering", "lower", "error_deep less the error at the other closings", beside="error"),
    )

    def memory(self) -> dict[str, Any]:
        return small_memory(self.dim, self.chunk_size, self.max_step, batch_size=self.memory_batch)

    def world(self, seed: int) -> torch.Tensor:
        """Return the keys of the kinds: [kinds k]."""
        return unit_rows(self.kinds, self.dim // 2, generator=generator("kinds", seed))

    def batch(self, world: torch.Tensor, generator: torch.Generator) -> Brackets:
        b, n, v = self.batch_size, self.length, self.dim - self.dim // 2
        values = unit_rows(b, n, v, generator=generator)
        draws = torch.rand(b, n, generator=generator).tolist()
        kinds = torch.randint(self.kinds, (b, n), generator=generator).tolist()
        kind, opener = torch.zeros(b, n, dtype=torch.long), torch.full((b, n), -1)
        deep = torch.zeros(b, n, dtype=torch.bool)
        for row in range(b):
            stack: list[tuple[int, int]] = []
            opened: list[tuple[int, int]] = []
            for i in range(n):
                closes = stack and (len(stack) == self.depth or draws[row][i] < 0.5)
                if closes:
                    kind[row, i], opener[row, i] = stack.pop()
                    deep[row, i] = any(k == kind[row, i] and at > opener[row, i] for k, at in opened)
                else:
                    kind[row, i] = kinds[row][i]
                    stack.append((kinds[row][i], i))
                    opened.append((kinds[row][i], i))
        opening = opener < 0
        asked = ~opening & (opener // self.chunk_size < torch.arange(n) // self.chunk_size)
        answers = values.gather(1, opener.clamp(min=0)[..., None].expand(-1, -1, v)) * asked[..., None]
        tokens = torch.cat((world[kind], values * opening[..., None]), dim=-1)
        return Brackets(tokens, opening, asked, deep & asked, answers)

    def squares(self, memory: torch.nn.Module, batch: Brackets) -> torch.Tensor:
        """Return the mean squared error of each output over the mean square of values (which is 1): [b n]."""
        out, _ = memory(batch.tokens, store_mask=batch.opening)
        return (out[..., self.dim // 2 :] - batch.answers).square().mean(dim=-1)

    def loss(self, model: torch.nn.Module, batch: Brackets) -> torch.Tensor:
        return self.squares(model, batch)[batch.asked].mean()

    def scores(self, model: torch.nn.Module, batch: Brackets) -> Mapping[str, float]:
        return self.scored(self.squares(model, batch), batch)

    def scored(self, squares: torch.Tensor, batch: Brackets) -> dict[str, float]:
        deep, other = squares[batch.deep].mean().item(), squares[batch.asked & ~batch.deep].mean().item()
        return {"error": squares[batch.asked].mean().item(), "error_deep": deep, "covering": deep - other}

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([b.answers[b.asked] for b in train]).mean(dim=0)
        scores = [self.scored((mean - b.answers).square().mean(dim=-1), b) for b in test]
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
