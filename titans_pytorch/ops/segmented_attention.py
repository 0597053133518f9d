"""Attention within segments, at a cost linear in the number of tokens.

`visible` defines which keys a query sees:

    block     keys of the query's own block of `window` positions, up to the query
    sliding   the query's own key and the `window` keys before it

Persistent keys stand before all others; every query sees them.

ein letters: b batch, h heads, n queries, j keys, w window, m blocks, p persistent keys, d features per head
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.ops.modes import in_transform


def visible(query: Tensor, key: Tensor, window: int, sliding: bool) -> Tensor:
    """Return whether a query sees a key, both given by position. Positions count from a block's start and broadcast."""
    if sliding:
        return (key <= query) & (query - key <= window)
    return (key <= query) & (query // window == key // window)


def naive_segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, persistent: Tensor, *, window: int, sliding: bool, scale: float
) -> Tensor:
    """The definition, with a full mask: for tests. Arguments as in `segmented_attention`."""
    j, p = k.shape[-2], persistent.shape[-2]
    keys = torch.arange(j, device=q.device)
    mask = visible(keys[j - q.shape[-2] :, None], keys, window, sliding)
    mask = F.pad(mask, (p, 0), value=True)
    k, v = prepend(persistent, k, v)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def segmented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent: Tensor,
    *,
    window: int,
    sliding: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the last n of j positions, [b h n d]; no mask is larger than window x (p + 2 window).

    Args:
        q: queries [b h n d], of the last n positions.
        k, v: keys and values [b h j d], j >= n; the j - n first are of earlier calls. In block mode they begin where a
            block begins, in sliding mode there are at most `window` earlier ones.
        persistent: keys and values [2 h p d] that every query sees.
        window: block length, or how many keys before its own a query sees.
        scale: multiplies the logits.
        dropout: probability of dropping an attention weight.
    """
    options: dict[str, Any] = {"scale": scale, "dropout": dropout}
    n, cached = q.shape[-2], k.shape[-2] - q.shape[-2]

    if cached == 0:
        whole = _sliding_window if sliding else _blocks
        return whole(q, k, v, persistent, window, options)

    if n == 1 and (sliding or cached < window):  # it sees everything that is there
        return attend(q, *prepend(persistent, k, v), **options)

    if n <= window:
        keys = torch.arange(cached + n, device=q.device)
        mask = visible(keys[cached:, None], keys, window, sliding)
        mask = F.pad(mask, (persistent.shape[-2], 0), value=True)
        return attend(q, *prepend(persistent, k, v), mask, **options)

    # a long continuation: padding queries in front make whole blocks of it
    q = F.pad(q, (0, 0, cached, 0))
    return segmented_attention(q, k, v, persistent, window=window, sliding=sliding, scale=scale, dropout=dropout)[
        ..., cached:, :
    ]


def naive_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return F.dropout(logits.softmax(dim=-1), dropout) @ v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, in plain products where its kernels have no derivative (forward mode, or twice)."""
    if not in_transform():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return naive_attend(q, k, v, mask, scale, dropout)


def prepend(persistent: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Put the persistent keys and values [2 h p d] in front of k and v [b h j d]."""
    if persistent.shape[-2] == 0:
        return k, v
    pk, pv = persistent.to(k.dtype)[:, None].expand(-1, k.shape[0], -1, -1, -1)
    return torch.cat((pk, k), dim=-2), torch.cat((pv, v), dim=-2)


def _fold(t: Tensor, window: int) -> Tensor:
    """[b h n d] -> [b m h w d], zeros at the end."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % window))
    return t.unflatten(-2, (-1, window)).transpose(1, 2)


def _unfold(t: Tensor, length: int) -> Tensor:
    """[b m h w d] -> [b h n d]"""
    return t.transpose(1, 2).flatten(2, 3)[..., :length, :]


def _causal(q: Tensor, k: Tensor, v: Tensor, persistent: Tensor, options: dict) -> Tensor:
    """Causal attention [b h w d] over the given keys and the persistent ones.

    One padding query for each persistent key keeps the mask a plain triangle, for which there are fast kernels."""
    p = persistent.shape[-2]
    q = F.pad(q, (0, 0, p, 0))
    k, v = prepend(persistent, k, v)
    return attend(q, k, v, is_causal=True, **options)[..., p:, :]


def _blocks(q: Tensor, k: Tensor, v: Tensor, persistent: Tensor, window: int, options: dict) -> Tensor:
    b, n = q.shape[0], q.shape[-2]
    if n <= window:
        return _causal(q, k, v, persistent, options)
    q, k, v = (_fold(t, window).flatten(0, 1) for t in (q, k, v))
    out = _causal(q, k, v, persistent, options)
    return _unfold(out.unflatten(0, (b, -1)), n)


def _sliding_window(q: Tensor, k: Tensor, v: Tensor, persistent: Tensor, window: int, options: dict) -> Tensor:
    """The first block sees its own keys; each other block sees its own and those of the block before."""
    b, n = q.shape[0], q.shape[-2]
    first = _causal(q[..., :window, :], k[..., :window, :], v[..., :window, :], persistent, options)
    if n <= window:
        return first

    q, k, v = (_fold(t, window) for t in (q, k, v))
    k, v = (torch.cat((t[:, :-1], t[:, 1:]), dim=-2) for t in (k, v))
    q, k, v = (t.flatten(0, 1) for t in (q[:, 1:], k, v))

    keys = torch.arange(2 * window, device=q.device)
    mask = visible(keys[window:, None], keys, window, sliding=True)
    mask = F.pad(mask, (persistent.shape[-2], 0), value=True)
    out = attend(q, *prepend(persistent, k, v), mask, **options)
    return torch.cat((first, _unfold(out.unflatten(0, (b, -1)), n - window)), dim=-2)
