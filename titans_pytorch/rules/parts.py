"""PartsRule: an optimizer and a retention as one update rule.

    update_t = optimizer(surprise_t)         rules/optimizers.py
    W_t = retention(W_{t-1}, update_t)       rules/retentions.py

It runs chunk by chunk, with built weights: most of these are not linear in the surprises. Momentum with a forget gate
is `TitansRule`, which also has a chunkwise parallel form.

Letters: B rows (batch and heads).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_pytorch.common.checks import of_kind, positive_number

from .base import UpdateRule
from .losses import checked_loss
from .optimizers import Optimizer
from .rates import WriteRates
from .retentions import Decay


@dataclass(frozen=True)
class PartsRule(UpdateRule):
    """An optimizer, then a retention.

    Args:
        optimizer: how surprises become an update; default plain gradient descent.
        retention: how the update joins the old fast weights; default a forget gate.

    Raises:
        ValueError: for a part of another kind.
    """

    optimizer: Optimizer = field(default_factory=Optimizer)
    retention: Decay = field(default_factory=Decay)

    def __post_init__(self):
        checked_loss(self.loss_fn, "loss_fn")
        if self.max_grad_norm is not None:
            positive_number(self.max_grad_norm, "max_grad_norm")
        of_kind(self.optimizer, Optimizer, "optimizer", "an Optimizer of titans_pytorch.rules.optimizers")
        of_kind(self.retention, Decay, "retention", "a retention of titans_pytorch.rules.retentions")

    @property
    def slots(self) -> int:
        """Those of the optimizer, then those of the retention."""
        return self.optimizer.slots + self.retention.slots

    @property
    def momentum_rates(self) -> int:
        """Those of the optimizer."""
        return self.optimizer.momentum_rates

    @property
    def step_outside(self) -> bool:
        """As in the optimizer."""
        return self.optimizer.step_outside

    def start(self, parameter: Tensor) -> Tensor:
        """The retention's initial fast weights."""
        return self.retention.start(parameter)

    def init(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Zeros for the optimizer, then the retention's slots."""
        return (torch.zeros_like(weights),) * self.optimizer.slots + self.retention.init(weights)

    def check_weights(self, name: str, weight: Tensor) -> None:
        """As the retention does."""
        self.retention.check_weights(name, weight)

    def update(
        self, weights: Tensor, surprise: Tensor, slots: tuple[Tensor, ...], rates: WriteRates
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Write one chunk to one parameter; see `UpdateRule.update`."""
        first = self.optimizer.slots
        update, own = self.optimizer.step(surprise, slots[:first], rates)
        weights, kept = self.retention.join(weights, update, slots[first:], rates)
        return weights, (*own, *kept)
