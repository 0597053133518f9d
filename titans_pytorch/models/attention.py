"""Attention of the family: over a sliding window (mag, mal), and over one segment with what was retrieved for it (mac).

Both return the heads' outputs side by side, without a projection: what follows projects.

Letters: b batch, h heads, n tokens, j cached keys, p persistent tokens, d features (of a token, or of a head)
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention import KeyValueCache, RotaryPositions
from titans_pytorch.checks import positive_int, wrong
from titans_pytorch.ops.segmented_attention import attend, prepend, segmented_attention


class Projections(nn.Module):
    """Queries, keys and values of tokens that were normalised, [.. n d] -> [.. h n d], rotated by their positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if positive_int(dim, "dim") % positive_int(heads, "heads") or dim // heads % 2 or dim // heads < 4:
            raise wrong("heads", heads, f"a divisor of dim = {dim} that leaves heads of an even width of at least 4")
        self.heads, self.head = heads, dim // heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, dim * 2, bias=False)
        self.positions = RotaryPositions(self.head)

    def queries(self, x: Tensor, start: int) -> Tensor:
        return self.positions.rotate(self._split(self.to_queries(x)), start)

    def keys_values(self, x: Tensor, start: int | None) -> tuple[Tensor, Tensor]:
        """start: position of the first token; None: not rotated (persistent tokens, the same from everywhere)."""
        keys, values = self._split(self.to_keys_values(x)).chunk(2, dim=-3)
        return keys if start is None else self.positions.rotate(keys, start), values

    def persistent(self, tokens: Tensor) -> Tensor:
        """tokens [p d] -> keys and values [2 h p d], as `segmented_attention` takes them."""
        return torch.stack(self.keys_values(tokens, None))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (h d) -> ... h n d", d=self.head)


def merge(x: Tensor) -> Tensor:
    """[b h n d] -> [b n (h d)]"""
    return rearrange(x, "b h n d -> b n (h d)")


class WindowAttention(Projections):
    """A query sees the persistent tokens, its own token and `window` tokens before it."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__(dim, heads)
        self.window = positive_int(window, "window")

    def forward(
        self, x: Tensor, persistent: Tensor, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """x [b n d] after the tokens in the cache, persistent [p d]: ([b n d], the cache for the tokens after)."""
        start = 0 if cache is None else cache.position
        q, (k, v) = self.queries(x, start), self.keys_values(x, start)
        if cache is not None:
            k, v = torch.cat((cache.keys, k), dim=-2), torch.cat((cache.values, v), dim=-2)
        rule = {"window": self.window, "sliding": True, "scale": self.head**-0.5}
        out = segmented_attention(q, k, v, self.persistent(persistent), **rule)
        # copies: a view would keep the whole call's keys alive
        k, v = (t[..., max(t.shape[-2] - self.window, 0) :, :].clone() for t in (k, v))
        return merge(out), KeyValueCache(k, v, start + x.shape[1])


class SegmentCache(NamedTuple):
    """What a segment has seen: keys and values [b h j d] of its tokens and of what was retrieved for them."""

    keys: Tensor
    values: Tensor
    retrieved_keys: Tensor
    retrieved_values: Tensor


class SegmentAttention(Projections):
    """Attention over persistent || retrieved || segment (eq. 22), causal: token i sees the tokens up to i, and of what
    was retrieved only what was asked for by them. Positions are those of the joined sequence."""

    def __init__(self, dim: int, heads: int, segment: int):
        super().__init__(dim, heads)
        self.segment = positive_int(segment, "segment")

    def forward(
        self, x: Tensor, retrieved: Tensor, persistent: Tensor, cache: SegmentCache | None
    ) -> tuple[Tensor, SegmentCache]:
        """x, retrieved [b n d], the next n tokens of one segment; persistent [p d]."""
        seen, n = (0 if cache is None else cache.keys.shape[-2]), x.shape[1]
        q, (k, v) = self.queries(x, self.segment + seen), self.keys_values(x, self.segment + seen)
        rk, rv = self.keys_values(retrieved, seen)
        if cache is not None:
            k, v, rk, rv = (torch.cat(pair, dim=-2) for pair in zip(cache, (k, v, rk, rv), strict=True))
        cache = SegmentCache(k, v, rk, rv)
        mask = torch.ones(n, seen + n, dtype=torch.bool, device=x.device).tril(seen)
        mask = F.pad(mask.repeat(1, 2), (persistent.shape[0], 0), value=True)
        keys, values = torch.cat((rk, k), dim=-2), torch.cat((rv, v), dim=-2)
        keys, values = prepend(self.persistent(persistent), keys, values)
        return merge(attend(q, keys, values, mask, scale=self.head**-0.5)), cache
