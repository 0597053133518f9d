"""Motifs that return: alternating segments of two curves, both new in every row.

A row draws two circles, each in a plane of its own with a speed of its own, and shows segments A, B, A, B, ... with
noise, each continuing where it stopped. The target at every token is the next vector. Training uses all tokens; scores
are taken in the last third, when both motifs have been seen, on held-out rows.

Letters: b batch, n tokens, d features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.later import torch
from harness.task import Metric, Task

from tasks.curves import curve, planes, relative
from tasks.memories import small_memory


class Motifs(NamedTuple):
    """noisy, clean [b n+1 d]; boundary bool [n]: the target of this token is among the first of a segment."""

    noisy: torch.Tensor
    clean: torch.Tensor
    boundary: torch.Tensor


@dataclass(frozen=True)
class MultiMotif(Task):
    """segments of length // segments tokens; turns: (fewest, most) radians per token, drawn for each motif; boundary:
    number of targets after a change that count as near it (without the first, which cannot be predicted)."""

    dim: int = 16
    length: int = 96
    segments: int = 6
    radians: tuple[float, float] = (0.4, 1.2)
    boundary: int = 4
    noise: float = 0.05
    batch_size: int = 16
    chunk_size: int = 8
    max_step: float = 1.0

    name = "multi_motif"
    metrics = (
        Metric("mse_total", "lower", "error of the next vector in the last third, over its mean square"),
        Metric("mse_boundary", "lower", "the same, right after a motif has come back"),
    )

    def __post_init__(self):
        if self.length % (3 * self.chunk_size) or self.length % self.segments:
            takes = f"a multiple of three chunks, {3 * self.chunk_size}, and of {self.segments} segments"
            raise ValueError(f"length must be {takes}, got {self.length}")

    def memory(self) -> dict[str, Any]:
        return small_memory(self.dim, self.chunk_size, self.max_step, store_with_lookahead_value=True)

    def batch(self, world: Any, generator: torch.Generator) -> Motifs:
        b, n, d = self.batch_size, self.length + 1, self.dim
        low, high = self.radians
        motifs = []
        for _ in range(2):
            plane = planes(b, d, generator)
            radians = low + (high - low) * torch.rand(b, 1, generator=generator)
            phase = 2 * math.pi * torch.rand(b, 1, generator=generator)
            motifs.append(curve(plane, phase, radians / (2 * math.pi), n, rise=0.0))
        step = self.length // self.segments
        second = (torch.arange(n) // step % 2).bool()
        clean = torch.where(second[:, None], motifs[1], motifs[0])
        since = torch.arange(1, n) % step  # of the target vector
        boundary = (since > 0) & (since <= self.boundary) & (torch.arange(1, n) >= step)
        return Motifs(clean + self.noise * torch.randn(b, n, d, generator=generator), clean, boundary)

    def errors(self, memory: torch.nn.Module, batch: Motifs) -> torch.Tensor:
        return relative(memory(batch.noisy[:, :-1])[0], batch.clean)

    def loss(self, model: torch.nn.Module, batch: Motifs) -> torch.Tensor:
        return self.errors(model, batch).mean()

    def scores(self, model: torch.nn.Module, batch: Motifs) -> Mapping[str, float]:
        return self.scored(self.errors(model, batch), batch)

    def scored(self, errors: torch.Tensor, batch: Motifs) -> dict[str, float]:
        held_out = torch.arange(self.length, device=errors.device) >= self.length - self.length // 3
        near = held_out & batch.boundary
        return {"mse_total": errors[held_out].mean().item(), "mse_boundary": errors[near].mean().item()}

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([m.clean for m in train]).mean(dim=(0, 1))
        scores = [self.scored(relative(mean.expand_as(m.clean[:, 1:]), m.clean), m) for m in test]
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
