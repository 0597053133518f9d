"""Kinetics: a coupling of learning rate and forget gate. If a chunk's learning rate is large beside its forget gate,
the forget gate shrinks and the learning rate grows.

Letters: B rows (batch and heads), m chunks, p pairs per chunk.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from titans_pytorch.gates.stages import Gated, Span, Stage


def kinetics(keep: Tensor, step: Tensor, mix: float, eps: float, max_step: float) -> tuple[Tensor, Tensor]:
    """Couple retention `keep` = 1 - forget gate [B m] and learning rates `step` [B m p]; return both.

    With r = lr / (lr + forget gate + eps), lr the chunk's mean learning rate: forget gate *= 1 - mix r, within [0, 1];
    learning rate += mix r (max_step - learning rate), at least 0.
    """
    lr, decay = step.mean(dim=-1), 1.0 - keep
    share = mix * (lr / (lr + decay + eps))
    keep = (keep + decay * share).clamp(0.0, 1.0)
    step = (step + share.unsqueeze(-1) * (max_step - step)).clamp(min=0.0)
    return keep, step


@dataclass(frozen=True)
class Kinetics(Stage):
    """The stage that couples learning rate and forget gate."""

    mix: float
    eps: float
    max_step: float

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        keep, step = kinetics(gated.rates.retention, gated.rates.learning_rate, self.mix, self.eps, self.max_step)
        return gated._replace(rates=replace(gated.rates, retention=keep, learning_rate=step))
