"""The interface of a task: data from a seed, a loss, and scores of a frozen memory on held-out data."""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import Arm, build, parameters, state_size
from .later import torch
from .timing import timed

TEST_BATCHES = 4


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    better: "lower", "higher" or None (no gain is computed). judged: gains in it end in a verdict; those in a task's
    first metric always do. Judge few metrics: each one adds chance findings. beside: a metric needed to interpret this
    one (a memory that learned nothing forgets nothing); a verdict "better" reports it.
    """

    name: str
    better: str | None = "lower"
    about: str = ""
    judged: bool = False
    beside: str | None = None


@dataclass(frozen=True)
class Setting:
    """Training and measurement settings of every arm of a run."""

    steps: int
    lr: float = 1e-2
    device: str = "cpu"
    test_batches: int = TEST_BATCHES
    clip: float = 1.0


def seed_of(*parts: Any) -> int:
    """Return a seed that depends on all parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def generator(*parts: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


class Task:
    """A task of an experiment: subclass it as a frozen dataclass whose fields are its settings.

    name, metrics (the first is the main one). `forgetting`: the metric by which a naive memory (one head, no gates,
    no pages) must be seen to forget, mean above zero with its interval; else the task is refused, with the reason: too
    easy, or nothing was learned that could be forgotten.

    A subclass defines:
        memory()                    keywords of NeuralMemory that all arms share, `dim` among them
        world(seed)                 the part that training and test share for a seed (default nothing)
        batch(world, generator)     fresh data, made on the CPU
        loss(model, batch)          the training loss
        scores(model, batch)        metric name -> number, under no_grad, slow parameters frozen, state carried
        constant(train, test)       the same metrics of the best constant prediction, learned on training batches
    and optionally:
        build(arm)                  a model other than a single NeuralMemory
        notes(model, batch)         numbers that are shown but not judged, as `scores`; arms may differ in them
    """

    name: str
    metrics: Sequence[Metric]
    forgetting: str | None = None

    def memory(self) -> dict[str, Any]:
        raise NotImplementedError

    def build(self, arm: Arm) -> torch.nn.Module:
        return arm.make(**{**self.memory(), **arm.memory})

    def world(self, seed: int) -> Any:
        return None

    def batch(self, world: Any, generator: torch.Generator) -> Any:
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        raise NotImplementedError

    def scores(self, model: torch.nn.Module, batch: Any) -> Mapping[str, float]:
        raise NotImplementedError

    def notes(self, model: torch.nn.Module, batch: Any) -> Mapping[str, float]:
        return {}

    def constant(self, train: Sequence[Any], test: Sequence[Any]) -> Mapping[str, float]:
        raise NotImplementedError

    # data: the same for every arm

    def source(self, part: str, seed: int) -> torch.Generator:
        return generator(self.name, part, seed)

    def batches(self, seed: int, part: str, count: int, device: str = "cpu"):
        """`count` batches of a part, "train" or "test"; the same for the same seed, and a prefix of a longer run."""
        world, source = self.world(seed), self.source(part, seed)
        for _ in range(count):
            yield moved(self.batch(world, source), device)

    # one arm, one seed

    def run(self, arm: Arm, seed: int, setting: Setting) -> dict[str, Any]:
        """Train the slow parameters, freeze them, and measure: metrics, notes, pages, parameters, state, training."""
        torch.manual_seed(seed_of("run", seed))  # for random numbers drawn by the model
        random.seed(seed)
        from .switches import watched

        model = build(self, arm, seed, setting.device)
        losses = self.train(model, arm, seed, setting)
        model.eval().requires_grad_(False)
        scores, notes = [], []
        with torch.no_grad():
            for batch in self.batches(seed, "test", setting.test_batches, setting.device):
                notes.append(self.notes(model, batch))
            with watched(model) as seen:
                for batch in self.batches(seed, "test", setting.test_batches, setting.device):
                    scores.append(self.scores(model, batch))
        return {
            "metrics": mean_of(scores),
            "notes": mean_of(notes),
            "pages": seen.record() if seen.written else None,
            "parameters": parameters(model),
            "state": state_size(model),
            "training": {"loss_first": losses[:1], "loss_tail": tail(losses)},
        }

    def train(self, model: torch.nn.Module, arm: Arm, seed: int, setting: Setting) -> list[float]:
        """Train all slow parameters with Adam, a fresh batch each step. Returns the loss before each step."""
        optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
        losses, every = [], max(1, setting.steps // 4)
        model.train()
        batch = None
        for i, batch in enumerate(self.batches(seed, "train", setting.steps, setting.device)):
            if arm.switch_rate is not None and i % every == 0:
                self.set_threshold(model, arm, batch)
            losses.append(self.step(model, arm, batch, optimizer, setting).item())
        if arm.switch_rate is not None and batch is not None:
            self.set_threshold(model, arm, batch)
        return losses

    def step(self, model, arm: Arm, batch, optimizer, setting: Setting) -> torch.Tensor:
        """Take one step; return the task's own loss before it."""
        from .switches import heard

        if arm.penalty is None:
            total = loss = self.loss(model, batch)
        else:
            calls: list = []
            with heard(model, calls.append):
                loss = self.loss(model, batch)
            total = loss + arm.penalty(model, calls)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        return loss.detach()

    def set_threshold(self, model: torch.nn.Module, arm: Arm, batch: Any) -> None:
        from .switches import set_thresholds

        set_thresholds(model, lambda: self.loss(model, batch), arm.switch_rate)

    # time, apart from quality

    def times(self, arm: Arm, seed: int, setting: Setting, repeats: int) -> dict[str, Any]:
        """Measure fwd_ms, train_ms: milliseconds of one evaluation and of one training step on a batch, synchronised,
        medians after warm-up; fwd_ms_calls, train_ms_calls: of each call."""

        def calls(work: Callable[[], object]) -> list[float]:
            return [timed(work, setting.device) * 1e3 for _ in range(2 + repeats)][2:]

        found = {kind: calls(work) for kind, work in self.works(arm, seed, setting).items()}
        return {**{k: statistics.median(v) for k, v in found.items()}, **{f"{k}_calls": v for k, v in found.items()}}

    def works(self, arm: Arm, seed: int, setting: Setting) -> dict[str, Callable[[], object]]:
        """Return the functions to time: fwd_ms, train_ms."""
        model = build(self, arm, seed, setting.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
        (batch,) = self.batches(seed, "train", 1, setting.device)

        @torch.no_grad()
        def forward():
            self.loss(model, batch)

        def step():
            self.step(model, arm, batch, optimizer, setting)

        return {"fwd_ms": forward, "train_ms": step}


def mean_of(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(float(s[name]) for s in scores) for name in scores[0]}


def tail(losses: Sequence[float], count: int = 10) -> float | None:
    """Return the mean of the last ten values, or of all if fewer."""
    return statistics.fmean(losses[-count:]) if losses else None


def moved(batch: Any, device: str) -> Any:
    """Move the tensors of a batch (a tensor, tuple, list or mapping) to a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(v, device) for v in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(v, device) for v in batch)
    return batch
