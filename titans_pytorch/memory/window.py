"""Surprise windows (the Omega rule, arXiv 2505.23735, eq. 9): a chunk also writes the pairs before it.

Each chunk gets the key-value pairs of its window: the last k pairs before the chunk, then its own. Engines see chunks
of more pairs; nothing else changes. Before the first token of a stream a window has zeros, which are never written (a
network that is not tokenwise sees them among its keys).

Letters: b batch, h heads, B rows (b h), m chunks, p pairs of a chunk, k earlier pairs of a window, d features, w
numbers carried for a pair.
"""

from dataclasses import replace

import torch
from torch import Tensor

from titans_pytorch.engines.base import Chunks
from titans_pytorch.engines.written import Written


def with_window(chunks: Chunks, before: Tensor | None, earlier: int, heads: int) -> tuple[Chunks, Tensor]:
    """Return the chunks with the k = `earlier` pairs before each, and the pairs that the next chunks need [b h k w].

    before: those pairs from an earlier call; None at the start of a stream.
    """
    rates, (rows, _, own, d) = chunks.rates, chunks.keys.shape
    assert rates.window is not None
    written = (rates.learning_rate != 0).to(chunks.keys.dtype).unsqueeze(-1)
    parts = [chunks.keys, chunks.values, written]
    if rates.bound is not None:
        parts.append(rates.bound.unsqueeze(-1))
    new = torch.cat(parts, dim=-1).flatten(1, 2)
    old = new.new_zeros(rows, earlier, new.shape[-1]) if before is None else before.flatten(0, 1)
    pairs = torch.cat((old, new), dim=1)
    seen = pairs.unfold(1, earlier + own, own).transpose(-1, -2)  # [B m k+p w]
    weight = rates.window.repeat_interleave(earlier // rates.window.shape[-1], dim=-1)
    share = rates.learning_rate.mean(dim=-1, keepdim=True) * weight
    # of a pair that was not written the share is a constant zero, whatever the pair holds
    share = torch.where(seen[:, :, :earlier, 2 * d] != 0, share, 0.0)
    rates = replace(
        rates,
        learning_rate=torch.cat((share, rates.learning_rate), dim=-1),
        bound=None if rates.bound is None else seen[..., 2 * d + 1],
    )
    keys, values = seen[..., :d], seen[..., d : 2 * d]
    tail = pairs[:, pairs.shape[1] - earlier :].clone().unflatten(0, (-1, heads))
    return replace(chunks, keys=keys, values=values, rates=rates), tail


def step_outside(chunks: Chunks) -> Chunks:
    """Move the chunks' learning rate to `rates.step`, which the rule applies. Each pair then counts once or not."""
    rate = chunks.rates.learning_rate
    rates = replace(chunks.rates, step=rate.mean(dim=-1), learning_rate=(rate != 0).to(rate.dtype))
    return replace(chunks, rates=rates)


def own_surprises(written: Written, chunks: Chunks, pairs: int) -> tuple[Tensor, Tensor]:
    """Return (inner loss, learning rate) of each chunk's own pairs, [B m p]."""
    loss, rate = (x[:, :, x.shape[-1] - pairs :] for x in written.surprises())
    return loss, rate if chunks.rates.step is None else rate * chunks.rates.step.unsqueeze(-1)
