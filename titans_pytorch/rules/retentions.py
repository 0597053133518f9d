"""How an update joins the old fast weights: the retentions that `PartsRule` combines with an optimizer.

A new one is a frozen dataclass with `slots`, `start`, `init` and `join`. All but `Decay` act on matrices; vectors
decay.

Letters: B rows (batch and heads), i and o the inputs and outputs of a matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, flags, number_at_least_0, positive_number, wrong

from .base import like
from .rates import WriteRates

TINY = 1e-12  # a norm is at least this


@dataclass(frozen=True)
class Decay:
    """W_t = retention W_{t-1} + update: a forget gate (Titans, arXiv 2501.00663, eq. 13)."""

    @property
    def slots(self) -> int:
        """Tensors carried for each parameter."""
        return 0

    def start(self, parameter: Tensor) -> Tensor:
        """The initial fast weights [B ...] from the learned parameter [B ...]."""
        return parameter

    def init(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The slots that go with initial fast weights [B ...]."""
        return ()

    def check_weights(self, name: str, weight: Tensor) -> None:
        """Refuse fast weights that it cannot continue from, with a ValueError."""

    def join(
        self, weights: Tensor, update: Tensor, slots: tuple[Tensor, ...], rates: WriteRates
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(fast weights [B ...], slots) after the update [B ...]."""
        return like(rates.retention, weights) * weights + update, slots


@dataclass(frozen=True)
class LqNorm(Decay):
    """A_t = retention A_{t-1} + update, W_t = sign(A_t) |A_t|^(q-1) / |A_t|_q^(q-2): Moneta (arXiv 2504.13173, eq. 24).

    W is the gradient of |A|_q^2 / 2, which is what the paper's penalty on W gives (section 5.2). Its eq. 24 prints A_t
    / |A_t|_q^(q-2), without the power of each element. That is `printed=True`. There W shrinks as A grows, and where a
    LayerNorm follows, both drift exponentially. A is a slot; the learned parameter holds A_0.

    Args:
        q: above 1; 2 is a forget gate.
        printed: take eq. 24 as printed. q = 3 is then refused: it does not tell the norm of A from W.

    Raises:
        ValueError: for another q.
    """

    q: float = 4.0
    printed: bool = False

    def __post_init__(self):
        if isinstance(self.q, bool) or not isinstance(self.q, (int, float)) or not 1 < self.q < math.inf:
            raise wrong("q", self.q, "a finite number above 1")
        flags(printed=self.printed)
        if self.printed and self.q == 3:
            raise wrong("q", self.q, "other than 3 with printed=True")

    @property
    def slots(self) -> int:
        return 1

    def start(self, parameter):
        return self._weights(parameter)

    def init(self, weights):
        return (self.sums(weights),)

    def sums(self, weights: Tensor) -> Tensor:
        """A, of the fast weights W [B ...]."""
        if weights.ndim != 3:
            return weights
        if self.printed:
            return weights * _norm(weights, self.q).pow((self.q - 2) / (3 - self.q))
        return _dual(weights, self.q / (self.q - 1))

    def _weights(self, sums: Tensor) -> Tensor:
        if sums.ndim != 3:
            return sums
        return sums * _norm(sums, self.q).pow(2 - self.q) if self.printed else _dual(sums, self.q)

    def join(self, weights, update, slots, rates):
        sums, _ = super().join(slots[0], update, (), rates)
        return self._weights(sums), (sums,)


def _norm(x: Tensor, q: float) -> Tensor:
    """|x|_q of matrices [B i o]: [B 1 1]."""
    largest = x.detach().abs().amax(dim=(1, 2), keepdim=True).clamp(min=TINY)  # powers neither over- nor underflow
    total = ((x / largest).square() + TINY**2).pow(q / 2).sum(dim=(1, 2), keepdim=True)
    return largest * total.clamp(min=TINY).pow(1 / q)  # of zeros alone it is less than 1


def _dual(x: Tensor, q: float) -> Tensor:
    """The gradient of |x|_q^2 / 2, of matrices [B i o]. Its inverse is that of q / (q - 1)."""
    norm = _norm(x, q)
    unit = x / norm
    return norm * unit * (unit.square() + TINY**2).pow(q / 2 - 1)


@dataclass(frozen=True)
class ElasticNet(Decay):
    """W_t = S(retention W_{t-1} + update), S(z) = sign(z) max(0, |z| - threshold): MIRAS (arXiv 2504.13173, eq. 22).

    Small weights become zero. The paper derives retention and threshold from the coefficients of two penalties; here
    the first is the learned forget gate, and the second is given.

    Args:
        threshold: at least 0.
    """

    threshold: float = 1e-4

    def __post_init__(self):
        number_at_least_0(self.threshold, "threshold")

    def join(self, weights, update, slots, rates):
        z, slots = super().join(weights, update, slots, rates)
        return (z - z.clamp(-self.threshold, self.threshold) if z.ndim == 3 else z), slots


@dataclass(frozen=True)
class KLSoftmax(Decay):
    """W_t = total softmax(retention log W_{t-1} + update) over the inputs of each output: Memora (arXiv 2504.13173,
    eq. 21 and 27).

    Fast weights are positive and sum to `total` for each output. The learned parameter holds their logits, so that
    training keeps them positive. The paper applies the softmax to slices and leaves open which.

    Args:
        total: above 0; None: the square root of the number of inputs.
    """

    total: float | None = None

    def __post_init__(self):
        if self.total is not None:
            positive_number(self.total, "total")

    def start(self, parameter):
        return self._softmax(parameter) if parameter.ndim == 3 else parameter

    def check_weights(self, name, weight):
        if weight.ndim == 3 and not (weight > 0).all():
            got = Words(f"a smallest weight of {float(weight.min()):.3g}")
            raise wrong(name, got, "positive everywhere: the retention KLSoftmax takes logarithms of fast weights")

    def join(self, weights, update, slots, rates):
        if weights.ndim != 3:
            return super().join(weights, update, slots, rates)
        floor = torch.finfo(weights.dtype).tiny  # a softmax may underflow
        return self._softmax(like(rates.retention, weights) * weights.clamp(min=floor).log() + update), slots

    def _softmax(self, logits: Tensor) -> Tensor:
        total = math.sqrt(logits.shape[1]) if self.total is None else self.total
        return total * logits.softmax(dim=1)


@dataclass(frozen=True)
class NormRescale(Decay):
    """W_t = Z |W_{t-1}| / |Z|, Z = retention W_{t-1} + update, norms over the inputs of each output: LaCT (arXiv
    2505.23884, section 3.1, and the authors' code).

    The norms are those that the fast weights started with, since no write changes them.
    """

    def join(self, weights, update, slots, rates):
        z, slots = super().join(weights, update, slots, rates)
        if z.ndim == 3:
            old, new = ((w.square().sum(dim=1, keepdim=True) + TINY**2).sqrt() for w in (weights, z))
            z = z * (old / new)
        return z, slots
