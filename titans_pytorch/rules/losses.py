"""Inner losses with their slopes: what a memory network is trained on, one key and value at a time.

Each is a mean over the features, as the mean squared error of NeuralMemory is. Papers sum over features, so their
learning rate is ours divided by d. Any function (prediction, target) -> loss will do for `store_memory_loss_fn` too; it
is differentiated by autograd.

Letters: d features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, callable_or_none, wrong

SMOOTH = 1e-6  # |x| is sqrt(x^2 + SMOOTH): arXiv 2504.13173, remark 5


class Loss(ABC):
    """An inner loss whose gradient is written out.

    learned_bound: whether it takes `bound` [...], which is learned for each pair.
    has_least: whether it is least where the prediction is the target; else it has no least value.
    """

    learned_bound = False
    has_least = True

    @abstractmethod
    def __call__(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        """[... d], [... d] -> [...]."""

    @abstractmethod
    def slope(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        """The gradient with respect to the prediction: [... d]."""


def checked_loss(loss: Any, name: str) -> Callable | None:
    """An inner loss, or None. ValueError for what is neither, the argument `name`."""
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise wrong(name, Words(f"the class {loss.__name__}"), f"an object, {loss.__name__}()")
    return callable_or_none(loss, name)


@dataclass(frozen=True)
class DotProduct(Loss):
    """-(prediction . target) / d: linear attention (arXiv 2006.16236), LaCT (arXiv 2505.23884, eq. 5)."""

    has_least = False

    def __call__(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        return -(prediction * target).mean(dim=-1)

    def slope(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        return -target / target.shape[-1]


@dataclass(frozen=True)
class LpLoss(Loss):
    """|prediction - target|_p^p / d, with |x| as sqrt(x^2 + 1e-6): MIRAS (arXiv 2504.13173, eq. 10).

    The slope is that of this smooth loss. (The paper replaces the sign by tanh, and |x| in what is left.)

    Args:
        p: at least 1.

    Raises:
        ValueError: for another p.
    """

    p: float = 3.0

    def __post_init__(self):
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 1 <= self.p < math.inf:
            raise wrong("p", self.p, "a finite number of at least 1")

    def __call__(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        return ((prediction - target).square() + SMOOTH).pow(self.p / 2).mean(dim=-1)

    def slope(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        error = prediction - target
        return error * (error.square() + SMOOTH).pow(self.p / 2 - 1) * (self.p / error.shape[-1])


@dataclass(frozen=True)
class HuberLoss(Loss):
    """|e|^2 / d where the norm of the error e is at most a learned bound, else bound |e|_1 / d: Yaad (arXiv 2504.13173,
    eq. 26), with |x| as sqrt(x^2 + 1e-6).

    The paper defines the two slopes, which is all that the update needs; the value jumps where they meet.
    """

    learned_bound = True

    def __call__(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        assert bound is not None
        square = (prediction - target).square()
        near = square.sum(dim=-1) <= bound.square()
        return torch.where(near, square.mean(dim=-1), bound * (square + SMOOTH).sqrt().mean(dim=-1))

    def slope(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        assert bound is not None
        error = prediction - target
        square = error.square()
        near = square.sum(dim=-1) <= bound.square()
        far = bound.unsqueeze(-1) * (square + SMOOTH).rsqrt()
        return error * torch.where(near.unsqueeze(-1), 2.0, far) / error.shape[-1]
