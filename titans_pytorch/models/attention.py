"""Attention of the paper's models: over a sliding window (MAG, MAL), and over a segment with the memory's output (MAC).

Both return the heads' outputs side by side, [b n (h d)]; the caller projects them.

Letters: b batch, h heads, n tokens, j cached keys, p persistent tokens, d features (of a token, or of a head)
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import Words, check_tokens, positive_int, wrong
from titans_pytorch.common.identity import check_identity, identity
from titans_pytorch.decoding.steps import STEPS, silent
from titans_pytorch.layers.attention import (
    KeyValueCache,
    RotaryPositions,
    cached_attention,
    in_reach,
    position_after,
)
from titans_pytorch.ops.segmented_attention import attend, prepend


class Projections(nn.Module):
    """Projects normalised tokens [.. n d] to queries, keys and values [.. h n d], rotated by their positions."""

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
        """Return keys and values. start: position of the first token; None: no rotation (persistent tokens)."""
        keys, values = self._split(self.to_keys_values(x)).chunk(2, dim=-3)
        return keys if start is None else self.positions.rotate(keys, start), values

    def persistent(self, tokens: Tensor) -> Tensor:
        """Return keys and values [2 h p d] of tokens [p d], as `segmented_attention` takes them."""
        return torch.stack(self.keys_values(tokens, None))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (h d) -> ... h n d", d=self.head)

    def check(self, x: Tensor, persistent: Tensor, name: str = "x") -> None:
        """Raise ValueError unless x is tokens [b n d] and persistent [p d]."""
        dim = self.heads * self.head
        check_tokens(x, name, dim, getattr(self.to_queries, "weight", None))
        if not isinstance(persistent, Tensor) or persistent.ndim != 2 or persistent.shape[-1] != dim:
            got = tuple(persistent.shape) if isinstance(persistent, Tensor) else Words(type(persistent).__name__)
            raise wrong("persistent", got, f"a tensor [p {dim}]")


def merge(x: Tensor) -> Tensor:
    """[b h n d] -> [b n (h d)]"""
    return rearrange(x, "b h n d -> b n (h d)")


class WindowAttention(Projections):
    """A query sees the persistent tokens, its own token and `window` tokens before it."""

    def __init__(self, dim: int, heads: int, window: int):
        given = dict(locals())
        super().__init__(dim, heads)
        self.window = positive_int(window, "window")
        self.configuration = identity(WindowAttention.__init__, given)

    def forward(
        self, x: Tensor, persistent: Tensor, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Attend over persistent [p d] and x [b n d], which follows the cached tokens: ([b n d], next cache)."""
        self.check(x, persistent)
        start = position_after(cache, self, WindowAttention.__init__)
        q, (k, v) = self.queries(x, start), self.keys_values(x, start)
        out, cache = cached_attention(
            q,
            k,
            v,
            self.persistent(persistent),
            cache,
            window=self.window,
            sliding=True,
            scale=self.head**-0.5,
            configuration=self.configuration,
        )
        return merge(out), cache.compact()


class SegmentCache(NamedTuple):
    """Keys and values [b h j d] of a segment's tokens so far, and of the memory's output for them.
    configuration: JSON, the settings of the attention that made it; attention of other settings refuses it."""

    keys: Tensor
    values: Tensor
    retrieved_keys: Tensor
    retrieved_values: Tensor
    configuration: str | None = None


class SegmentAttention(Projections):
    """Causal attention over persistent || retrieved || segment (eq. 22). Token i sees the tokens up to i and what they
    retrieved. Positions are those of the joined sequence."""

    def __init__(self, dim: int, heads: int, segment: int):
        given = dict(locals())
        super().__init__(dim, heads)
        self.segment = positive_int(segment, "segment")
        self.configuration = identity(SegmentAttention.__init__, given)

    def forward(
        self, x: Tensor, retrieved: Tensor, persistent: Tensor, cache: SegmentCache | None
    ) -> tuple[Tensor, SegmentCache]:
        """Attend over the next n tokens of one segment: x, retrieved [b n d]; persistent [p d]."""
        self.check(x, persistent)
        self.check(retrieved, persistent, "retrieved")
        if retrieved.shape != x.shape:
            raise wrong("retrieved", tuple(retrieved.shape), f"of the shape of x, {tuple(x.shape)}")
        seen, n = self._seen(cache, x.shape[0]), x.shape[1]
        if seen + n > self.segment:
            raise wrong("x", Words(f"{n} tokens"), f"at most {self.segment - seen} tokens, the rest of the segment")
        q, (k, v) = self.queries(x, self.segment + seen), self.keys_values(x, self.segment + seen)
        rk, rv = self.keys_values(retrieved, seen)
        if cache is not None:
            k, v, rk, rv = (torch.cat(pair, dim=-2) for pair in zip(cache[:4], (k, v, rk, rv), strict=True))
        cache = SegmentCache(k, v, rk, rv, self.configuration)
        mask = torch.ones(n, seen + n, dtype=torch.bool, device=x.device).tril(seen)
        mask = F.pad(mask.repeat(1, 2), (persistent.shape[0], 0), value=True)
        keys, values = torch.cat((rk, k), dim=-2), torch.cat((rv, v), dim=-2)
        keys, values = prepend(self.persistent(persistent), keys, values)
        return merge(attend(q, keys, values, mask, scale=self.head**-0.5)), cache

    def _seen(self, cache: SegmentCache | None, batch: int) -> int:
        """Return how many tokens of the segment the cache holds."""
        if cache is None:
            return 0
        if not isinstance(cache, SegmentCache):
            raise wrong("cache", Words(type(cache).__name__), "the SegmentCache that the call before returned")
        check_identity(self.configuration, cache.configuration, "cache", SegmentAttention.__init__)
        seen = cache.keys.shape[-2]
        for name, held in zip(cache._fields[:4], cache[:4], strict=True):
            if tuple(held.shape) != (wanted := (batch, self.heads, seen, self.head)):
                raise wrong(f"cache.{name}", tuple(held.shape), f"of shape {wanted}")
        return seen


def window_step(attention: WindowAttention, x: Tensor, persistent: Tensor, cache: KeyValueCache | None = None):
    """Attend with one token, which sees all that is cached."""
    if cache is None or cache.configuration != attention.configuration or not _plain(attention):
        return None
    held = in_reach(cache.position, attention.window, True)
    if not cache.keys.shape == cache.values.shape == (x.shape[0], attention.heads, held, attention.head):
        return None
    new, before = _keys_values(attention, (x,), persistent)
    query, keys = _rotated(attention, attention.to_queries(x), new[:, :, 0], (cache.position,) * 2).split(1, dim=2)
    keys, values = torch.cat((cache.keys, keys), dim=2), torch.cat((cache.values, new[:, :, 1].transpose(1, 2)), dim=2)
    out = _attended(attention, query, before, (keys,), (values,))
    if held == attention.window:
        keys, values = keys[:, :, 1:].clone(), values[:, :, 1:].clone()
    return out, KeyValueCache(keys, values, cache.position + 1, attention.configuration)


STEPS[WindowAttention] = window_step


def segment_step(
    attention: SegmentAttention, x: Tensor, retrieved: Tensor, persistent: Tensor, cache: SegmentCache | None
):
    """Attend with one token of a segment, which sees all that is cached."""
    if not _plain(attention):
        return None
    seen = attention._seen(cache, x.shape[0])
    if seen >= attention.segment:
        return None
    new, before = _keys_values(attention, (retrieved, x), persistent)
    place = attention.segment + seen
    query, rk, k = _rotated(attention, attention.to_queries(x), new[:, :, 0], (place, seen, place)).split(1, dim=2)
    rv, v = new[:, :, 1].transpose(1, 2).split(1, dim=2)
    if cache is not None:
        k, v, rk, rv = (torch.cat(pair, dim=2) for pair in zip(cache[:4], (k, v, rk, rv), strict=True))
    return _attended(attention, query, before, (rk, k), (rv, v)), SegmentCache(k, v, rk, rv, attention.configuration)


STEPS[SegmentAttention] = segment_step


def _plain(attention: Projections) -> bool:
    """Return whether the map to keys and values may see several tokens at once, and the rotation may be skipped."""
    linear, positions = attention.to_keys_values, attention.positions
    return type(linear) is nn.Linear and silent(linear) and type(positions) is RotaryPositions


def _keys_values(attention: Projections, tokens: tuple[Tensor, ...], persistent: Tensor) -> tuple[Tensor, Tensor]:
    """Map tokens, each [b 1 d], and persistent ones [p d] in one product: keys (not rotated) and values of the tokens
    [b t 2 h d], of the persistent ones [b p 2 h d]."""
    b, p = tokens[0].shape[0], persistent.shape[0]
    joined = torch.cat((persistent.expand(b, -1, -1), *tokens), dim=1)
    both = attention.to_keys_values(joined).view(b, -1, 2, attention.heads, attention.head)
    return both[:, p:], both[:, :p]


def _rotated(attention: Projections, query: Tensor, keys: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Rotate a query [b 1 (h d)] and keys [b t h d], each by its position: [b h 1+t d]."""
    b, _, heads, head = keys.shape
    x = torch.cat((query.view(b, 1, heads, head), keys), dim=1)
    freqs = attention.positions.freqs
    angles = torch.outer(torch.tensor(positions, dtype=freqs.dtype), freqs)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).transpose(1, 2)


def _attended(
    attention: Projections, query: Tensor, persistent: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> Tensor:
    """Attend with a query [b h 1 d] over persistent [b p 2 h d] and further keys and values [b h j d]: [b 1 (h d)]."""
    first_keys, first_values = persistent.permute(2, 0, 3, 1, 4).unbind(0)
    all_keys, all_values = torch.cat((first_keys, *keys), dim=2), torch.cat((first_values, *values), dim=2)
    return merge(F.scaled_dot_product_attention(query, all_keys, all_values, scale=attention.head**-0.5))
