"""Rows of tokens with targets, and the loss of a model on them.

Letters: b rows, n tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["IGNORE", "Rows", "answers_in", "loss_on"]

IGNORE = -100  # the target without a prediction, as in torch's cross entropy


class Rows(NamedTuple):
    """ids long [b n]; targets long [b n]: the token that ids[:, : i + 1] should be followed by, or IGNORE."""

    ids: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a `device`."""
        return Rows(*(part.to(device, non_blocking=True) for part in self))


def answers_in(rows: Rows | Tensor) -> int:
    """Return the number of predictions that the loss on `rows` averages. Plain ids [b n + 1] are predicted from the
    second token on.
    """
    if isinstance(rows, Rows):
        return int((rows.targets != IGNORE).sum())
    return rows.shape[0] * (rows.shape[1] - 1)


def loss_on(model: nn.Module, rows: Rows | Tensor, answers: float) -> Tensor:
    """Return the summed cross entropy divided by `answers`, in nats.

    Args:
        model: ids [b n] -> logits [b n v].
        rows: Rows; or plain ids [b n + 1], passed as `model(ids, return_loss=True)`.
        answers: number of answers, or its mean over processes whose gradients will be averaged.
    """
    if not isinstance(rows, Rows):
        return model(rows, return_loss=True) * (answers_in(rows) / answers)
    weight = memory_loss_weight(model)
    found = model(rows.ids, return_surprises=True) if weight else model(rows.ids)
    logits, surprises = found if weight else (found, [])
    logits, targets = logits.float().flatten(0, 1), rows.targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / answers
    if weight and surprises:
        loss = loss + unwrapped(model).memory_loss(surprises)
    return loss


def memory_loss_weight(model: nn.Module) -> float:
    """Return the weight of the inner loss in the training loss: a setting of the package's models, 0 elsewhere and
    outside training. (On plain ids these add it themselves.)"""
    return getattr(getattr(unwrapped(model), "config", None), "memory_loss_weight", 0.0) if model.training else 0.0


def unwrapped(model: nn.Module) -> Any:
    """Return the model without its wrapping for several processes."""
    return getattr(model, "module", model)
