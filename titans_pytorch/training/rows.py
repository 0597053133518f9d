"""Rows of tokens with targets, and the loss of a model on them.

Letters: b rows, n tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["IGNORE", "Rows", "answers_in", "loss_on"]

IGNORE = -100  # the target where nothing is asked, as in torch's cross entropy


class Rows(NamedTuple):
    """ids long [b n]; targets long [b n]: the token that ids[:, : i + 1] should be followed by, or IGNORE."""

    ids: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Rows":
        """The rows, moved to a `device`."""
        return Rows(*(part.to(device, non_blocking=True) for part in self))


def answers_in(rows: Rows | Tensor) -> int:
    """The number of predictions that the loss on `rows` averages. Plain ids [b n + 1] are predicted from the second
    token on.
    """
    if isinstance(rows, Rows):
        return int((rows.targets != IGNORE).sum())
    return rows.shape[0] * (rows.shape[1] - 1)


def loss_on(model: nn.Module, rows: Rows | Tensor, answers: float) -> Tensor:
    """Summed cross entropy over `answers`, in nats.

    Args:
        model: ids [b n] -> logits [b n v].
        rows: Rows; or plain ids [b n + 1], passed as `model(ids, return_loss=True)`.
        answers: how many there are, or the mean of that number over processes whose gradients will be averaged.
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
    """The weight of the inner loss in the training loss: a setting of the package's models, 0 elsewhere and outside
    training. (On plain ids these add it themselves.)"""
    return getattr(getattr(unwrapped(model), "config", None), "memory_loss_weight", 0.0) if model.training else 0.0


def unwrapped(model: nn.Module) -> Any:
    """The model in the wrapping for several processes, if it has one."""
    return getattr(model, "module", model)
