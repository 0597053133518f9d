"""Interference: two tasks with the same keys and other values. Is the first still known after the second is written?

    write A, read A (before), write B, read A (after), read B

in one carried state. Each write and each read begins with its task's context tokens, two fixed sequences of vectors for
each seed, so that a router can tell the tasks apart; context tokens and queries are not written. Slow parameters are
trained on fresh pairs (all five parts), then frozen.

Letters as in `pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.later import torch
from harness.task import Metric, Task, generator

from tasks.memories import small_memory
from tasks.pairs import ask, chosen_right, relative_error, tokens_of, unit_rows, write


class Episode(NamedTuple):
    """context [2 c d]; keys [b u k]; a, b [b u v], their values in each task."""

    context: torch.Tensor
    keys: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Interference(Task):
    """dim: features of a token, half of them the key. pairs: pairs of each task. context: context tokens.
    context_strength: how much of the context is added to each pair and query (0: they look alike in both tasks). A
    write is context + pairs tokens, a multiple of the chunk."""

    dim: int = 32
    pairs: int = 12
    context: int = 4
    context_strength: float = 0.0
    batch_size: int = 16
    chunk_size: int = 8
    max_step: float = 1.0

    name = "interference"
    forgetting = "forgetting"
    metrics = (
        Metric("error_a_after", "lower", "error of A's values after B is written, 1: answering zero", beside="error_b"),
        Metric("forgetting", "lower", "error of A after B less that before B", judged=True, beside="error_a_after"),
        Metric("error_a_before", "lower", "error of A before B is written"),
        Metric("error_b", "lower", "error of B at the end"),
        Metric("chosen_a_after", "higher", "share of A's answers nearest to their own value, after B"),
    )

    def __post_init__(self):
        if self.dim % 2:
            raise ValueError(f"dim must be an even number (a key and a value), got {self.dim}")
        if (self.context + self.pairs) % self.chunk_size:
            takes = f"so many that with {self.context} context tokens they fill chunks of {self.chunk_size}"
            raise ValueError(f"pairs must be {takes}, got {self.pairs}")

    def memory(self) -> dict[str, Any]:
        return small_memory(self.dim, self.chunk_size, self.max_step)

    def world(self, seed: int) -> torch.Tensor:
        return unit_rows(2, self.context, self.dim, generator=generator("contexts", seed))

    def batch(self, world: torch.Tensor, generator: torch.Generator) -> Episode:
        shape = (self.batch_size, self.pairs, self.dim // 2)
        keys, a, b = (unit_rows(*shape, generator=generator) for _ in range(3))
        return Episode(world, keys, a, b)

    def errors(self, memory: torch.nn.Module, episode: Episode) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the errors of A before, A after, B; and the outputs for A after B [b u v]."""
        from tasks.routers import tell

        c, k = self.context, self.dim // 2

        def tokens(which: int, values: torch.Tensor | None) -> torch.Tensor:
            return tokens_of(episode.context[which], episode.keys, values, self.context_strength)

        def asked(which: int, state) -> torch.Tensor:
            tell(memory, which, c, self.pairs)
            return ask(memory, tokens(which, None), c, state)[..., k:]

        tell(memory, 0, c, self.pairs)
        after_a = write(memory, tokens(0, episode.a), c, None)
        before = asked(0, after_a)
        tell(memory, 1, c, self.pairs)
        after_b = write(memory, tokens(1, episode.b), c, after_a)
        after, other = asked(0, after_b), asked(1, after_b)
        errors = {
            "error_a_before": relative_error(before, episode.a),
            "error_a_after": relative_error(after, episode.a),
            "error_b": relative_error(other, episode.b),
        }
        return errors, after

    def loss(self, model: torch.nn.Module, batch: Episode) -> torch.Tensor:
        return sum(self.errors(model, batch)[0].values()) / 3

    def scores(self, model: torch.nn.Module, batch: Episode) -> Mapping[str, float]:
        errors, after = self.errors(model, batch)
        forgetting = errors["error_a_after"] - errors["error_a_before"]
        return {**errors, "forgetting": forgetting, "chosen_a_after": chosen_right(after, batch.a)}

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([torch.cat((e.a, e.b)) for e in train]).mean(dim=(0, 1))
        a, b = (
            sum(relative_error(mean.expand_as(v), v).item() for v in values) / len(test)
            for values in ([e.a for e in test], [e.b for e in test])
        )
        return {
            "error_a_before": a,
            "error_a_after": a,
            "error_b": b,
            "forgetting": 0.0,
            "chosen_a_after": 1 / self.pairs,
        }
