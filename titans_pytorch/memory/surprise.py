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
    """Predicts each token linearly from the one before it (zeros before the first). The tokens are detached, so only
    its own error trains it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.predict = nn.Linear(dim, dim)

    def forward(
        self, tokens: Tensor, before: Tensor | None, earlier: EarlierTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (mean squared errors [b n], the last token) for tokens [b n d], n >= 1, after `before` [b 1 d]."""
        tokens = tokens.detach()
        before = torch.zeros_like(tokens[:, :1]) if before is None else before.to(tokens.dtype)
        joined = torch.cat((before, tokens), dim=1)
        guess = self.predict(joined[:, :-1] if earlier is None else earlier.shifted(joined, 1))
        error = at_least_float32(guess) - at_least_float32(tokens)
        last = tokens[:, -1:].clone() if earlier is None else earlier.tail(joined)
        return error.square().mean(dim=-1), last


def of_pairs(surprise: Tensor, chunk: int, heads: int, kv_per_token: int, pairs: int) -> Tensor:
    """Repeat a value of each token [b m*c] for the pairs of the token: [(b h) m p]."""
    every = repeat(surprise, "b (m c) -> (b h) m (c u)", c=chunk, h=heads, u=kv_per_token)
    return every[:, :, :pairs]


def of_rows(x: Tensor, batch: int) -> Tensor:
    """Rearrange [(b h) m p] to [b h m*p]."""
    return x.unflatten(0, (batch, -1)).flatten(2)


def auxiliary_loss(surprises: Sequence[Tensor], every_pair: bool = False) -> Tensor:
    """Return a scalar to add to the task's loss.

    It is the mean inner loss (eq. 12 of arXiv 2501.00663) of the written pairs (learning rate above 0), plus the mean
    error of the predictor if there is one. Masked pairs and pairs below a surprise threshold are not written. Its
    gradient trains the initial weights, the keys and the values; it can also shrink keys and values, so give it a small
    weight. The predictor learns from nothing else. The result is 0 if no pair was written.

    Args:
        surprises: the last result of a call of one NeuralMemory with return_surprises = True.
        every_pair: divide by the number of all pairs, written or not. The mean over micro-batches of one size is then
            the loss of the whole batch, also with a `surprise_threshold`.

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
