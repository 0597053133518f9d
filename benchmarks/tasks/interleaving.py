"""A needle in a smooth background: the background is read, needles are written, the background continues, needles
are read.

The background is a circle in a plane that is new in every row, with a little noise; needles are those of `needle`.
The second part of the background is written to the same fast weights. Only the change at their first token marks the
needles.

Letters as in `pairs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.later import torch

from tasks.curves import curve, planes
from tasks.needle import Haystack, Needle
from tasks.pairs import write


@dataclass(frozen=True)
class Interleaving(Needle):
    """before: tokens of the background before the needles; length: after them; radians: it turns per token."""

    before: int = 16
    radians: float = 0.3
    noise: float = 0.1

    name = "interleaving"

    def __post_init__(self):
        super().__post_init__()
        if self.before % self.chunk_size:
            raise ValueError(f"before must be a multiple of the chunk, {self.chunk_size}, got {self.before}")

    def batch(self, world: Any, generator: torch.Generator) -> Haystack:
        """Make a batch as Needle does, with the background as hay."""
        data = super().batch(world, generator)
        b, n = self.batch_size, self.before + self.length
        phase = 2 * math.pi * torch.rand(b, 1, generator=generator)
        speed = torch.full((b, 1), self.radians / (2 * math.pi))
        background = curve(planes(b, self.dim, generator), phase, speed, n, rise=0.0)
        return data._replace(hay=background + self.noise * torch.randn(b, n, self.dim, generator=generator))

    def answers(self, memory: torch.nn.Module, data: Haystack, state=None) -> tuple[torch.Tensor, torch.Tensor]:
        earlier, later = data.hay[:, : self.before], data.hay[:, self.before :]
        return super().answers(memory, data._replace(hay=later), write(memory, earlier, 0, state))
