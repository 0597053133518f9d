"""A task without a memory: what an arm gets is noise of the seed, shared by all arms, some of its own, and a planted
gain."""

from dataclasses import dataclass

import torch
from harness.task import Metric, Task, generator


@dataclass(frozen=True)
class Planted(Task):
    """gain: how much lower the error of arms with `symplectic_page_threshold` 0.1 is. shuffled: nothing helps. level:
    the error of the same answer always.
    """

    gain: float = 1.0
    shuffled: bool = False
    forgets: float = 1.0
    level: float = 9.0

    name = "planted"
    forgetting = "forgetting"
    metrics = (Metric("error"), Metric("forgetting", beside="error"), Metric("recall", "higher", judged=True))

    def run(self, arm, seed, setting):
        shared = torch.randn(1, generator=generator("seed", seed)).item()
        own = 0.1 * torch.randn(1, generator=generator(sorted(arm.memory.items()), seed)).item()
        helps = arm.memory.get("symplectic_page_threshold") == 0.1 and not self.shuffled
        error = 3 + shared + own - self.gain * helps
        pages = (
            {"events": 3, "layers": [3], "opportunities": 4, "switch_rate": 0.75, "occupancy": [0.5, 0.5]}
            if helps
            else None
        )
        return {
            "metrics": {"error": error, "recall": -error, "forgetting": self.forgets + own},
            "pages": pages,
            "parameters": 7,
            "training": {"loss_first": [], "loss_tail": 1.0},
        }

    def batches(self, seed, part, count, device="cpu"):
        return [None] * count

    def constant(self, train, test):
        return {"error": self.level, "recall": -self.level, "forgetting": 0.0}
