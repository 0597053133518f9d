"""The surprise of a token by a linear prediction, and the memory's inner loss as an auxiliary training loss.

Letters: b batch, n tokens, m chunks, c tokens per chunk, p pairs per chunk, d features.
"""

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, flags, of_kind, wrong
from titans_pytorch.ops.earlier_tokens import EarlierTokens
from titans_pytorch.ops.modes import at_least_float32

SOURCES = ("memory", "prediction")


class NextToken(nn.Module):
    """Predicts each token linearly from the one before it (zeros before the first). Only its own error trains it: the
    tokens are detached."""

    def __init__(self, dim: int):
        super().__init__()
        self.predict = nn.Linear(dim, dim)

    def forward(
        self, tokens: Tensor, before: Tensor | None, earlier: EarlierTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens [b n d], n >= 1, after `before` [b 1 d]: (the error's mean square over d [b n], the last token)."""
        tokens = tokens.detach()
        before = torch.zeros_like(tokens[:, :1]) if before is None else before.to(tokens.dtype)
        joined = torch.cat((before, tokens), dim=1)
        guess = self.predict(joined[:, :-1] if earlier is None else earlier.shifted(joined, 1))
        error = at_least_float32(guess) - at_least_float32(tokens)
        last = tokens[:, -1:].clone() if earlier is None else earlier.tail(joined)
        return error.square().mean(dim=-1), last


def of_pairs(surprise: Tensor, chunk: int, heads: int, kv_per_token: int, pairs: int) -> Tensor:
    """A value of each token [b m*c], repeated for the pairs whose keys are the token's: [(b h) m p]."""
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
