"""How surprises become an update: the optimizers that `PartsRule` combines with a retention.

A new one is a frozen dataclass with `slots`, `momentum_rates` and `step`.

Letters: B rows (batch and heads).
"""

from dataclasses import dataclass

from torch import Tensor

from titans_pytorch.ops.newton_schulz import newton_schulz

from .base import like
from .rates import WriteRates


@dataclass(frozen=True)
class Optimizer:
    """Plain gradient descent: the update is the surprise."""

    @property
    def slots(self) -> int:
        """Tensors carried for each parameter."""
        return 0

    @property
    def momentum_rates(self) -> int:
        """Learned momentum rates that `step` is given."""
        return 0

    @property
    def step_outside(self) -> bool:
        """Whether `step` applies the learning rate (`rates.step`)."""
        return False

    def step(self, surprise: Tensor, slots: tuple[Tensor, ...], rates: WriteRates) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A chunk's surprise [B ...] -> (the update [B ...], the slots after it)."""
        return surprise, slots


@dataclass(frozen=True)
class Momentum(Optimizer):
    """S_t = eta_t S_{t-1} + surprise_t (Titans, arXiv 2501.00663, eq. 10)."""

    @property
    def slots(self) -> int:
        return 1

    @property
    def momentum_rates(self) -> int:
        return 1

    def step(self, surprise, slots, rates):
        assert rates.momentum is not None
        momentum = like(rates.momentum[..., 0], slots[0]) * slots[0] + surprise
        return momentum, (momentum,)


@dataclass(frozen=True)
class Muon(Momentum):
    """Momentum, orthogonalised by five Newton-Schulz iterations (ops/newton_schulz.py). Vectors are not.

    Args:
        outside: apply the learning rate after the iterations, as Atlas does (arXiv 2505.23735, eq. 32), to vectors
            too. False: it weighs the pairs of a chunk, as in LaCT (arXiv 2505.23884), and every update has the same
            size.
    """

    outside: bool = False

    @property
    def step_outside(self) -> bool:
        return self.outside

    def step(self, surprise, slots, rates):
        update, slots = super().step(surprise, slots, rates)
        if update.ndim == 3:
            update = newton_schulz(update)
        return (like(rates.step, update) * update if self.outside else update), slots
