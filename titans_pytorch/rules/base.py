"""UpdateRule: the protocol of an update rule.

Add an update rule
------------------
Write a subclass with `update`, and `slots` if the rule carries tensors beside the fast weights. The rule below moves
each weight by the sign of its surprise, as signSGD does:

    class SignRule(UpdateRule):
        def update(self, weights, surprise, slots, rates):
            retention = like(rates.retention, weights)
            return retention * weights + 0.01 * surprise.sign(), slots

`NeuralMemory(dim, update_rule=SignRule())` runs it, on the sequential engine: chunk by chunk, by autograd. All options
of the layer work with it (masks, heads, streaming, pages). The fast weights of `TitansRule` are linear in the
surprises, which is why it also has a chunkwise parallel form; see docs/fast_path.md.

Letters: B rows (batch and heads), m chunks, p pairs per chunk, d features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.ops.modes import eager, inner_gradients, ordinary

from .losses import Loss
from .rates import WriteRates, skip_pairs


@dataclass(frozen=True)
class UpdateRule:
    """What one chunk of key-value pairs does to the fast weights of a memory.

    Args:
        loss_fn: the inner loss (prediction, target) [... d] -> [...]; None: the mean squared error over d (Titans, eq.
            12, up to the factor d).
        max_grad_norm: soft limit of the norm of each chunk's gradient, per parameter; None: no limit.
    """

    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    max_grad_norm: float | None = None

    @property
    def slots(self) -> int:
        """Tensors carried for each parameter beside its fast weights (momentum, say). They start at zero."""
        return 0

    @property
    def momentum_rates(self) -> int:
        """Learned momentum rates eta that `update` is given, as `rates.momentum` [B momentum_rates]; 0: it is None."""
        return 0

    @property
    def step_outside(self) -> bool:
        """Whether `update` applies the learning rate, `rates.step` [B]; False: it is in the surprise already."""
        return False

    @property
    def has_closed_form(self) -> bool:
        """Whether the chunkwise engine computes it. False: it runs chunk by chunk, in the sequential engine."""
        return False

    def start(self, parameter: Tensor) -> Tensor:
        """The initial fast weights [B ...] from the learned parameter [B ...]; by default the parameter itself."""
        return parameter

    def init(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The slots that go with initial fast weights [B ...]; by default zeros."""
        return (torch.zeros_like(weights),) * self.slots

    def check_weights(self, name: str, weight: Tensor) -> None:
        """Refuse fast weights given by hand that this rule cannot continue from, with a ValueError."""

    def update(
        self, weights: Tensor, surprise: Tensor, slots: tuple[Tensor, ...], rates: WriteRates
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Write one chunk to one parameter.

        Args:
            weights: the fast weights before the chunk [B ...].
            surprise: the chunk's surprise [B ...]: minus the gradient of the sum over its pairs of learning rate times
                inner loss, at the weights where the mini-batch starts (Titans, eq. 8 and 16).
            slots: the carried tensors, each [B ...].
            rates: of this chunk, fields without the dimension m: retention [B], momentum [B momentum_rates] or None.
                The learning rate is in the surprise already, unless `step_outside`: then `rates.step` [B] is the mean
                of its pairs', and the pairs of a surprise window have their weights in the surprise.

        Returns:
            The fast weights and the slots after the chunk.
        """
        raise NotImplementedError

    def surprise(self, gradient: Tensor, modulation: Tensor | None) -> Tensor:
        """Minus the gradients of m chunks [B m ...], clamped to `max_grad_norm` and times the modulation [B m]."""
        surprise = -gradient
        if self.max_grad_norm is not None:
            square = gradient.flatten(2).square().sum(dim=-1)
            surprise = surprise * like(clamp_scale(square, self.max_grad_norm), surprise)
        return surprise if modulation is None else surprise * like(modulation, surprise)

    @property
    def learned_bound(self) -> bool:
        """Whether the inner loss takes a learned bound of each pair (rules/losses.py)."""
        return isinstance(self.loss_fn, Loss) and self.loss_fn.learned_bound

    def loss(self, prediction: Tensor, target: Tensor, bound: Tensor | None = None) -> Tensor:
        """The inner loss of each pair: [... d], [... d] -> [...]. bound: [...], of a loss that takes one."""
        if self.loss_fn is None:
            return (prediction - target).square().mean(dim=-1)
        if isinstance(self.loss_fn, Loss):
            return self.loss_fn(prediction, target, bound)
        loss = self.loss_fn(prediction, target)
        if not isinstance(loss, Tensor) or loss.shape != prediction.shape[:-1]:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            shape = tuple(prediction.shape)
            takes = f"a function that gives one value per token, {shape[:-1]} for predictions {shape}"
            raise wrong("store_memory_loss_fn", Words(got), takes)
        return loss

    def loss_and_slope(
        self,
        prediction: Tensor,
        target: Tensor,
        learning_rate: Tensor,
        threshold: float | None = None,
        bound: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inner loss of each pair, and the gradient of sum(learning rate * loss) with respect to the prediction.

        Pairs whose loss is below the threshold have no part in the sum.
        """
        if isinstance(self.loss_fn, Loss):
            loss = self.loss_fn(prediction, target, bound)
            learning_rate = skip_pairs(learning_rate, loss, threshold)
            return loss, self.loss_fn.slope(prediction, target, bound) * learning_rate.unsqueeze(-1)
        if self.loss_fn is not None:
            return self._slope_by_autograd(prediction, target, learning_rate, threshold)
        error = prediction - target
        loss = error.square().mean(dim=-1)
        learning_rate = skip_pairs(learning_rate, loss, threshold)
        return loss, error * (learning_rate * (2.0 / error.shape[-1])).unsqueeze(-1)

    @eager
    def _slope_by_autograd(self, prediction: Tensor, target: Tensor, learning_rate: Tensor, threshold: float | None):
        def total(inputs: tuple[Tensor]) -> tuple[Tensor, Tensor]:
            loss = self.loss(inputs[0], ordinary(target))
            return (loss * skip_pairs(ordinary(learning_rate), loss, threshold)).sum(), loss

        (slope,), loss = inner_gradients(total, lambda: (ordinary(prediction),))
        return loss, slope


def clamp_scale(square_norm: Tensor, limit: float) -> Tensor:
    """The factor that turns a gradient's norm x into (m/2) tanh(2x/m) + m/2, m the limit. Zero stays zero."""
    positive = square_norm > 0
    norm = torch.where(positive, square_norm, 1.0).sqrt()
    half = limit / 2
    return torch.where(positive, (half * (norm / half).tanh() + half) / norm, 0.0)


def like(rate: Tensor, other: Tensor) -> Tensor:
    """A rate [B] or [B m], shaped to multiply `other` [B ...] or [B m ...]."""
    return rate.reshape(*rate.shape, *(1,) * (other.ndim - rate.ndim))
