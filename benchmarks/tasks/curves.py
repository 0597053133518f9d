"""Sequences of vectors with noise: a curve in a plane that is new in every row, to be predicted from the tokens read so
far.

    x_t = radius (cos a_t u + sin a_t v) + rise t/n w + noise e_t,    a_t = phase + 2 pi turns t / n

u, v, w are random orthonormal directions of the row, so that the step from one vector to the next can only be learned
at test time. The memory writes x_t -> x_{t+1} within a chunk (store_with_lookahead_value); its output at t is compared
with x_{t+1} without the noise, in the later half of the sequence.

Letters: b batch, n tokens, d features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.later import torch
from harness.task import Metric, Task

from .memories import small_memory


class Curves(NamedTuple):
    """noisy, clean [b n d]."""

    noisy: torch.Tensor
    clean: torch.Tensor


@dataclass(frozen=True)
class Follow(Task):
    """turns: (fewest, most) of a whole curve, drawn for each row. rise: along a third direction over the sequence.
    batch_size: rows. Vectors have a mean square of about 1."""

    label: str = "spiral"
    dim: int = 16
    length: int = 64
    turns: tuple[float, float] = (6.0, 12.0)
    rise: float = 0.5
    noise: float = 0.1
    batch_size: int = 16
    chunk_size: int = 8
    max_step: float = 1.0

    metrics = (
        Metric("error", "lower", "mean squared error of the next vector, over the mean square of it"),
        Metric("error_first", "lower", "the same in the first half, while the curve is new"),
    )

    @property
    def name(self) -> str:
        return self.label

    def __post_init__(self):
        if self.dim < 3:
            raise ValueError(f"dim must be at least the 3 dimensions of a curve, got {self.dim}")
        if self.length % (2 * self.chunk_size):
            raise ValueError(f"length must be a multiple of two chunks, {2 * self.chunk_size}, got {self.length}")

    def memory(self) -> dict[str, Any]:
        return small_memory(self.dim, self.chunk_size, self.max_step, store_with_lookahead_value=True)

    def batch(self, world: Any, generator: torch.Generator) -> Curves:
        b, n, d = self.batch_size, self.length + 1, self.dim
        plane = planes(b, d, generator)
        low, high = self.turns
        turns = low + (high - low) * torch.rand(b, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(b, 1, generator=generator)
        clean = curve(plane, phase, turns / self.length, n, self.rise)
        return Curves(clean + self.noise * torch.randn(b, n, d, generator=generator), clean)

    def errors(self, memory: torch.nn.Module, curves: Curves, state=None) -> torch.Tensor:
        """Return the errors [n] of the outputs."""
        return relative(memory(curves.noisy[:, :-1], state=state)[0], curves.clean)

    def loss(self, model: torch.nn.Module, batch: Curves) -> torch.Tensor:
        return self.errors(model, batch).mean()

    def scores(self, model: torch.nn.Module, batch: Curves) -> Mapping[str, float]:
        first, second = self.errors(model, batch).chunk(2)
        return {"error": second.mean(), "error_first": first.mean()}

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([c.clean for c in train]).mean(dim=(0, 1))
        errors = [relative(mean.expand_as(c.clean[:, 1:]), c.clean) for c in test]
        first, second = torch.stack(errors).mean(dim=0).chunk(2)
        return {"error": second.mean().item(), "error_first": first.mean().item()}


@dataclass(frozen=True)
class FollowAnother(Follow):
    """Follow, with the state left by another curve that was read before."""

    def batch(self, world: Any, generator: torch.Generator) -> tuple[Curves, Curves]:
        return super().batch(world, generator), super().batch(world, generator)

    def errors(self, memory: torch.nn.Module, curves: tuple[Curves, Curves], state=None) -> torch.Tensor:
        _, state = memory(curves[0].noisy[:, :-1], state=state, detach_mem_state=True)
        return super().errors(memory, curves[1], state)

    def constant(self, train, test) -> Mapping[str, float]:
        return super().constant([c for _, c in train], [c for _, c in test])


def curve_tasks(length: int, carry: bool = False, **shared: Any) -> list[Follow]:
    """spiral, and helix_drift, which turns faster and drifts. carry: start from the state left by another curve."""
    kind = FollowAnother if carry else Follow
    return [
        kind("spiral", length=length, **shared),
        kind("helix_drift", length=length, turns=(9.0, 18.0), rise=2.0, **shared),
    ]


def planes(rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Draw three random orthonormal directions for each row: [b d 3]."""
    return torch.linalg.qr(torch.randn(rows, dim, 3, generator=generator)).Q


def curve(
    plane: torch.Tensor,
    phase: torch.Tensor,
    turns_per_token: torch.Tensor,
    tokens: int,
    rise: float,
    radius: float = 1.0,
) -> torch.Tensor:
    """Make a curve [b n d] from plane [b d 3], phase in radians and turns_per_token [b 1]. A circle has a mean
    square of 1.
    """
    t = torch.arange(tokens, device=plane.device, dtype=plane.dtype)
    angle = phase + 2 * math.pi * turns_per_token * t
    parts = torch.stack((radius * angle.cos(), radius * angle.sin(), (rise * t / tokens).expand_as(angle)), dim=-1)
    return parts @ plane.transpose(1, 2) * plane.shape[1] ** 0.5


@dataclass(frozen=True)
class Recovery(Follow):
    """A curve, another one in the same plane (faster, wider, ahead), and the first again, in one carried state.
    How well is it predicted right after its return? Each part has `length` tokens; errors are those of its last half
    before, and of its first half after. Phase errors are angles in the plane, in radians."""

    label: str = "long_horizon_recovery"
    perturbation: float = 0.8  # radians ahead, and 1.2 times as wide, as the perturbed part of a known curve

    metrics = (
        Metric("clean_mse_post", "lower", "error right after the first curve is back"),
        Metric("clean_mse_pre", "lower", "error at the end of its first part"),
        Metric("perturb_mse", "lower", "error at the end of the other curve"),
        Metric("phase_err_post", "lower", "angle between answer and curve right after, radians"),
        Metric("phase_err_pre", "lower", "that angle before"),
        Metric("mse_recovery_gain", "higher", "clean_mse_pre - clean_mse_post"),
        Metric("phase_recovery_gain", "higher", "phase_err_pre - phase_err_post"),
    )

    def batch(self, world: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        b, n = self.batch_size, self.length
        plane = planes(b, self.dim, generator)
        low, high = self.turns
        speed = (low + (high - low) * torch.rand(b, 1, generator=generator)) / n
        other = (low + (high - low) * torch.rand(b, 1, generator=generator)) / n
        phase = 2 * math.pi * torch.rand(b, 1, generator=generator)
        whole = curve(plane, phase, speed, 3 * n + 1, self.rise)
        ahead = phase + 2 * math.pi * speed * n + self.perturbation
        clean = torch.cat((whole[:, :n], curve(plane, ahead, -other, n, self.rise, 1.2), whole[:, 2 * n :]), dim=1)
        return {
            "plane": plane,
            "clean": clean,
            "noisy": clean + self.noise * torch.randn(clean.shape, generator=generator),
        }

    def answers(self, memory: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        state, out, n = None, [], self.length
        for part in range(3):
            answer, state = memory(batch["noisy"][:, part * n : (part + 1) * n], state=state)
            out.append(answer)
        return torch.cat(out, dim=1)

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        wanted = batch["clean"][:, 1:]
        return (self.answers(model, batch) - wanted).square().mean() / wanted.square().mean()

    def scores(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return self.scored(self.answers(model, batch), batch)

    def scored(self, answers: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
        n, half = self.length, self.length // 2
        error = relative(answers, batch["clean"])
        turned = angle_between(answers, batch["clean"][:, 1:], batch["plane"]).mean(dim=0)
        pre, perturbed, post = slice(half, n - 1), slice(n + half, 2 * n - 1), slice(2 * n, 2 * n + half)
        found = {
            "clean_mse_pre": error[pre].mean().item(),
            "perturb_mse": error[perturbed].mean().item(),
            "clean_mse_post": error[post].mean().item(),
            "phase_err_pre": turned[pre].mean().item(),
            "phase_err_post": turned[post].mean().item(),
        }
        found["mse_recovery_gain"] = found["clean_mse_pre"] - found["clean_mse_post"]
        found["phase_recovery_gain"] = found["phase_err_pre"] - found["phase_err_post"]
        return found

    def constant(self, train, test) -> Mapping[str, float]:
        mean = torch.cat([c["clean"] for c in train]).mean(dim=(0, 1))
        scores = [self.scored(mean.expand_as(c["clean"][:, 1:]), c) for c in test]
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def relative(answers: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each output over the mean square of its target, the next vector: [b n d] and
    [b n+1 d] -> [n]."""
    wanted = clean[:, 1:]
    return (answers - wanted).square().mean(dim=(0, 2)) / wanted.square().mean()


def angle_between(ours: torch.Tensor, theirs: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    """Return angles [b n], in [0, pi], between two [b n d] projected on the first two directions of [b d 3]."""
    a, b = ((x @ plane[:, :, :2]) for x in (ours, theirs))
    cross, dot = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(dim=-1)
    return torch.atan2(cross, dot).abs()
