"""Is there order in a sequence? Measures how well a score separates two kinds of sequences, with a control at chance.

Half of the rows obey a linear system that is new in every row: pairs of modes that each turn at their own speed, with
noise. The other half is disturbed:

    disorder  their tokens stand in another order (so every token's distribution is as before)
    change    at a token of the middle half the speeds change

area: the share of pairs of an ordered and a disturbed row in which the disturbed one has the higher score (the area
under the ROC curve): 1 separated, 0.5 chance, 0 separated in the wrong direction. In the control (`shuffled`) the
tokens of all rows are reordered first, so that its area is 0.5 for every score. Nothing is trained.

Letters: b batch, n tokens, d features, m modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.arms import Arm, build, parameters
from harness.later import torch
from harness.task import Metric, Setting, Task, mean_of

KINDS = ("disorder", "change")


@dataclass(frozen=True)
class Detect(Task):
    """kind: how rows are disturbed. noise: its size, over that of the signal. An arm's model maps sequences [b n d]
    to scores [b]; `shuffled` in its keywords makes it the control."""

    kind: str = "disorder"
    noise: float = 0.1
    dim: int = 16
    length: int = 32
    modes: int = 2
    rows: int = 128

    metrics = (
        Metric("area", "higher", "under the ROC curve: 0.5 is chance"),
        Metric("score_linear", None, "mean score of ordered rows"),
        Metric("score_disturbed", None, "mean score of disturbed rows"),
    )

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(KINDS)}, got {self.kind!r}")
        if not 1 <= self.modes <= self.dim // 2:
            raise ValueError(f"modes must be 1 to half of dim {self.dim}, got {self.modes}")
        if self.length < 8:
            raise ValueError(f"length must be at least 8 tokens, got {self.length}")

    @property
    def name(self) -> str:
        return f"{self.kind}, noise {self.noise:g}"

    def memory(self) -> dict[str, Any]:
        return {"dim": self.dim, "shuffled": False}

    def build(self, arm: Arm) -> torch.nn.Module:
        keywords = {**self.memory(), **arm.memory}
        model = arm.make(**{k: v for k, v in keywords.items() if k != "shuffled"})
        model.shuffled = keywords["shuffled"]
        return model

    def batch(self, world: Any, generator: torch.Generator) -> Mapping[str, torch.Tensor]:
        """Return ordered, disturbed [b n d]; orders long [2 b n]: random orders for the control."""
        b, n = self.rows, self.length
        kept = self.systems(generator, changes=False)
        other = self.systems(generator, changes=self.kind == "change")
        if self.kind == "disorder":
            other = in_order(other, orders(b, n, generator))
        return {"ordered": kept, "disturbed": other, "orders": torch.stack([orders(b, n, generator) for _ in range(2)])}

    def systems(self, generator: torch.Generator, changes: bool) -> torch.Tensor:
        """Make rows of turning modes [b n d], with a mean square of about 1 without noise."""
        b, n, m = self.rows, self.length, self.modes
        plane = torch.linalg.qr(torch.randn(b, self.dim, 2 * m, generator=generator)).Q
        speed = 0.2 + 1.2 * torch.rand(b, 2, m, generator=generator)  # radians per token: before, after a change
        at = torch.randint(n // 4, 3 * n // 4, (b, 1), generator=generator)
        late = (torch.arange(n) >= at) & changes
        turned = torch.where(late[..., None], speed[:, 1:], speed[:, :1]).cumsum(dim=1)
        angle = turned + 2 * math.pi * torch.rand(b, 1, m, generator=generator)
        signal = torch.cat((angle.cos(), angle.sin()), dim=-1) @ plane.mT * (self.dim / m) ** 0.5
        return signal + self.noise * torch.randn(b, n, self.dim, generator=generator)

    def scores(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        ordered, disturbed = batch["ordered"], batch["disturbed"]
        if model.shuffled:
            ordered, disturbed = (
                in_order(x, o) for x, o in zip((ordered, disturbed), batch["orders"].unbind(), strict=True)
            )
        low, high = model(ordered), model(disturbed)
        return {"area": area(low, high), "score_linear": low.mean(), "score_disturbed": high.mean()}

    def constant(self, train, test) -> Mapping[str, float]:
        return {"area": 0.5, "score_linear": 0.0, "score_disturbed": 0.0}

    def run(self, arm: Arm, seed: int, setting: Setting) -> dict[str, Any]:
        """Measure the areas; nothing is trained."""
        model = build(self, arm, seed, setting.device).eval()
        with torch.no_grad():
            batches = self.batches(seed, "test", setting.test_batches, setting.device)
            metrics = mean_of([self.scores(model, batch) for batch in batches])
        training = {"loss_first": [], "loss_tail": None}
        return {"metrics": metrics, "pages": None, "parameters": parameters(model), "state": None, "training": training}

    def works(self, arm: Arm, seed: int, setting: Setting) -> dict[str, Callable[[], object]]:
        """Return the functions to time: a score, and a score with its gradient with respect to the sequence."""
        model = build(self, arm, seed, setting.device)
        (batch,) = self.batches(seed, "test", 1, setting.device)
        seq = batch["ordered"].clone().requires_grad_()

        @torch.no_grad()
        def forward():
            model(seq)

        def step():
            model(seq).sum().backward()

        return {"fwd_ms": forward, "train_ms": step}


def orders(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(rows, tokens, generator=generator).argsort(dim=1)


def in_order(seq: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return seq.gather(1, order[..., None].expand_as(seq))


def area(low: torch.Tensor, high: torch.Tensor) -> float:
    """Return the share of pairs (one of each) in which `high` is higher, equal ones counting half. [b] x 2 ->
    number.
    """
    above = high[:, None] - low[None, :]
    return ((above > 0).double() + 0.5 * (above == 0)).mean().item()
