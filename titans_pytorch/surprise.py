"""Which tokens are written at all: those that surprise enough. And what the memory's loss is good for in training.

A pair (key, value) is surprising where its surprise is not below a threshold. Any other has step 0, and a chunk without
a surprising pair leaves memory and momentum as they are: with one token per chunk, what does not surprise changes
nothing. Surprise is the memory's own loss of the pair at the anchor (Titans, arXiv 2501.00663, eq. 12), known to the
engine alone; or the error of a linear prediction of the token from the one before it, known beforehand.

Letters: B rows (batch and heads), b batch, n tokens, m chunks, c tokens per chunk, p pairs per chunk, d features.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor, nn

from .checks import Words, flags, of_kind, wrong
from .ops.modes import at_least_float32
from .rates import StoreRates

SOURCES = ("memory", "prediction")


def is_surprising(surprise: Tensor, threshold: float) -> Tensor:
    """Where it is not below the threshold, bool; what is not a number is no exception that may hide."""
    return ~(surprise < threshold)


def surprising_step(step: Tensor, surprise: Tensor, threshold: float | None) -> Tensor:
    """step [B m p], 0 where the pair does not surprise."""
    return step if threshold is None else step.masked_fill(surprise < threshold, 0.0)


def admit(rates: StoreRates, surprise: Tensor, threshold: float | None) -> StoreRates:
    """The rates of chunks whose pairs surprise as much, [B m p]."""
    if threshold is None:
        return rates
    active = is_surprising(surprise, threshold).any(dim=-1)
    active = active if rates.active is None else active & rates.active
    return replace(rates, step=surprising_step(rates.step, surprise, threshold), active=active)


class NextToken(nn.Module):
    """A linear guess at each token from the one before it; before the first stand zeros. It learns from its own error
    alone: tokens are cut from the graph."""

    def __init__(self, dim: int):
        super().__init__()
        self.predict = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """tokens [b n d], n >= 1, after `before` [b 1 d]: (the error's mean square over d [b n], the last token)."""
        tokens = tokens.detach()
        before = torch.zeros_like(tokens[:, :1]) if before is None else before.to(tokens.dtype)
        guess = self.predict(torch.cat((before, tokens[:, :-1]), dim=1))
        error = at_least_float32(guess) - at_least_float32(tokens)
        return error.square().mean(dim=-1), tokens[:, -1:].clone()


def of_pairs(surprise: Tensor, chunk: int, heads: int, kv_per_token: int, pairs: int) -> Tensor:
    """What is known of tokens [b m*c], of the pairs whose key each token is: [(b h) m p]."""
    every = repeat(surprise, "b (m c) -> (b h) m (c u)", c=chunk, h=heads, u=kv_per_token)
    return every[:, :, :pairs]


def of_rows(x: Tensor, batch: int) -> Tensor:
    """[(b h) m p] -> [b h m*p]."""
    return x.unflatten(0, (batch, -1)).flatten(2)


def auxiliary_loss(surprises: Sequence[Tensor], every_pair: bool = False) -> Tensor:
    """A scalar to train on beside the task's loss.

    The mean loss (eq. 12 of arXiv 2501.00663) of the pairs that were learned from (step above 0, so neither masked nor
    too little surprising ones), and the mean error of the predictor where there is one. The gradient reaches the
    initial weights, the keys and the values (which it can also shrink: give it a small weight), and the predictor,
    which learns from nothing else. 0 where nothing was learned from.

    Args:
        surprises: what a call with return_surprises = True returned last, of one NeuralMemory.
        every_pair: divide by the number of all pairs, also of those not learned from: the mean over micro-batches of
            one size is then the loss of the whole batch, also with a `surprise_threshold`.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(surprises, tuple | list) or len(surprises) not in (2, 3):
        takes = "(loss, step), as a NeuralMemory returns them with return_surprises = True"
        raise wrong("surprises", Words(type(surprises).__name__), takes)
    for part in surprises:
        of_kind(part, Tensor, "surprises", "tensors, as a NeuralMemory returns them with return_surprises = True")
    flags(every_pair=every_pair)
    loss, step, *errors = surprises
    learned = step > 0
    pairs = max(learned.numel(), 1) if every_pair else learned.sum().clamp(min=1)
    total = torch.where(learned, loss, 0.0).sum() / pairs
    for error in errors:
        total = total + error.sum() / max(error.numel(), 1)
    return total
