"""The rule of Titans (arXiv 2501.00663, eq. 9 to 14), with the options of the package titans-pytorch.

    S_i = eta_i S_{i-1} + surprise_i           momentum, eq. 10; order o repeats it on its own output
    M_i = (1 - alpha_i) M_{i-1} + S_i          forget gate, eq. 13

Letters: B rows (batch and heads), o momentum orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from titans_pytorch.ops.newton_schulz import naive_newton_schulz

from .base import UpdateRule, like
from .rates import WriteRates


def mixture(combine: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of the last k of surprise and momentum orders.

    combine: weights [B k] or [B m k]. orders: each [B ...] or [B m ...].
    """
    first, *others = zip(combine.unbind(-1), orders[-combine.shape[-1] :], strict=True)
    out = like(*first) * first[1]
    for weight, order in others:
        out = out + like(weight, order) * order
    return out


@dataclass(frozen=True)
class TitansRule(UpdateRule):
    """Momentum and a forget gate.

    Args:
        momentum_order: how often momentum is applied, each time to its own output; 0: no momentum.
        spectral_norm: orthogonalise the update of each matrix by Newton-Schulz iterations, as Muon does. The carried
            momentum is not changed.
    """

    momentum_order: int = 1
    spectral_norm: bool = False

    @property
    def momentum_rates(self) -> int:
        """One momentum rate for each order."""
        return self.momentum_order

    @property
    def has_closed_form(self) -> bool:
        """Whether this is the paper's update: a subclass that changes it runs chunk by chunk."""
        own = ("update", "surprise", "slots", "momentum_rates")
        return all(getattr(type(self), name) is getattr(TitansRule, name) for name in own)

    @property
    def slots(self) -> int:
        """One momentum of each order."""
        return self.momentum_order

    def update(
        self, weights: Tensor, surprise: Tensor, slots: tuple[Tensor, ...], rates: WriteRates
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Write one chunk to one parameter; see `UpdateRule.update`."""
        orders = [surprise]
        for order, momentum in enumerate(slots):
            assert rates.momentum is not None
            orders.append(like(rates.momentum[..., order], momentum) * momentum + orders[-1])
        update = orders[-1] if rates.combine is None else mixture(rates.combine, orders)
        if self.spectral_norm and update.ndim == 3:
            update = naive_newton_schulz(update)
        return like(rates.retention, weights) * weights + update, tuple(orders[1:])
