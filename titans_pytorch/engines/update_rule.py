"""The update rule's options as one object, and the gradient of the memory's loss with respect to a prediction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.memory.surprise import surprising_step
from titans_pytorch.ops.modes import eager, inner_gradients, ordinary


@dataclass(frozen=True)
class UpdateRule:
    """loss_fn(prediction, target) -> [... ] over d, None for the mean squared error; max_grad_norm and spectral_norm
    as in NeuralMemory."""

    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    max_grad_norm: float | None = None
    spectral_norm: bool = False

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.loss_fn is None:
            return (prediction - target).square().mean(dim=-1)
        loss = self.loss_fn(prediction, target)
        if not isinstance(loss, Tensor) or loss.shape != prediction.shape[:-1]:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            shape = tuple(prediction.shape)
            raise wrong(
                "store_memory_loss_fn", Words(got), f"one value per token: {shape[:-1]} for predictions {shape}"
            )
        return loss

    def loss_and_slope(
        self, prediction: Tensor, target: Tensor, step: Tensor, threshold: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss per token, and the gradient of sum(step * loss) with respect to the prediction, the sum over those
        whose loss is not below the threshold."""
        if self.loss_fn is None:
            error = prediction - target
            loss = error.square().mean(dim=-1)
            step = surprising_step(step, loss, threshold)
            return loss, error * (step * (2.0 / error.shape[-1])).unsqueeze(-1)
        return self._own_loss_and_slope(prediction, target, step, threshold)

    @eager
    def _own_loss_and_slope(self, prediction: Tensor, target: Tensor, step: Tensor, threshold: float | None):
        def total(inputs: tuple[Tensor]) -> tuple[Tensor, Tensor]:
            loss = self.loss(inputs[0], ordinary(target))
            return (loss * surprising_step(ordinary(step), loss, threshold)).sum(), loss

        (slope,), loss = inner_gradients(total, lambda: (ordinary(prediction),))
        return loss, slope


def clamp_scale(square_norm: Tensor, limit: float) -> Tensor:
    """What a gradient of this squared norm is multiplied by, so that its norm x becomes (m/2) tanh(2x/m) + m/2.

    A zero gradient stays zero.
    """
    positive = square_norm > 0
    norm = torch.where(positive, square_norm, 1.0).sqrt()
    half = limit / 2
    return torch.where(positive, (half * (norm / half).tanh() + half) / norm, 0.0)
