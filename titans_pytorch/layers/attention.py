"""SegmentedAttention: attention in segments or a sliding window, with persistent keys, rotary positions and a cache.

ein letters: b batch, h heads, n tokens, d features (dim, or dim_head where there are heads), p persistent keys,
w cached keys
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, check_flags, check_tokens, flags, of_kind, positive_int, wrong
from titans_pytorch.common.identity import check_identity, identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.ops.segmented_attention import prepend, segmented_attention, visible

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:  # torch built without it
    create_block_mask = flex_attention = None  # type: ignore[assignment]  # functions, or None: callers ask which


class KeyValueCache(NamedTuple):
    """Keys and values that later calls need. Its size does not depend on how many tokens came before.

    keys, values: [b h w d], the keys rotated; w is at most the attention window or segment.
    position: absolute position of the next token.
    configuration: JSON, the settings of the attention that made it; attention of other settings refuses it. None for a
        cache made by hand.
    """

    keys: Tensor
    values: Tensor
    position: int
    configuration: str | None = None

    def compact(self) -> "KeyValueCache":
        """Copy keys and values: a view would keep the keys of the whole call in memory."""
        return self._replace(keys=self.keys.clone(), values=self.values.clone())


def in_reach(position: int, window: int, sliding: bool) -> int:
    """Return how many tokens before `position` a query at or after it can see."""
    return min(position, window) if sliding else position % window


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent: Tensor,
    cache: KeyValueCache | None,
    *,
    window: int,
    sliding: bool,
    scale: float,
    configuration: str,
    dropout: float = 0.0,
    flex: bool = False,
) -> tuple[Tensor, KeyValueCache]:
    """`segmented_attention` of n tokens [b h n d] that follow those in the cache.

    flex: use flex attention where nothing is cached. Returns the output [b h n d] and the cache for the next call,
    whose tensors are views. Raises ValueError for a cache that does not fit.
    """
    n, position = q.shape[-2], 0
    if cache is not None:
        _check_keys(cache, k, in_reach(cache.position, window, sliding))
        k, v = torch.cat((cache.keys, k), dim=-2), torch.cat((cache.values, v), dim=-2)
        position = cache.position
    if flex and cache is None:
        out = flex_segmented_attention(q, k, v, persistent, window=window, sliding=sliding, scale=scale)
    else:
        out = segmented_attention(q, k, v, persistent, window=window, sliding=sliding, scale=scale, dropout=dropout)
    position += n
    first = k.shape[-2] - in_reach(position, window, sliding)
    return out, KeyValueCache(k[..., first:, :], v[..., first:, :], position, configuration)


def _check_keys(cache: KeyValueCache, keys: Tensor, kept: int) -> None:
    b, h, _, d = keys.shape
    for name, held in (("keys", cache.keys), ("values", cache.values)):
        if tuple(held.shape) != (b, h, kept, d):
            takes = f"of shape {(b, h, kept, d)} at position {cache.position}"
            raise wrong(f"cache.{name}", tuple(held.shape), takes)
        if held.dtype != keys.dtype and not torch.is_autocast_enabled(keys.device.type):
            raise wrong(f"cache.{name}", held.dtype, f"{keys.dtype}")


def position_after(cache, attention, function: Callable) -> int:
    """Return the position of the next token, 0 without a cache. Raises ValueError for a cache that attention of other
    settings returned. function: the attention's constructor."""
    if cache is None:
        return 0
    if not isinstance(cache, KeyValueCache):
        raise wrong("cache", Words(type(cache).__name__), "the KeyValueCache that the call before returned")
    check_identity(attention.configuration, cache.configuration, "cache", function)
    return count(cache.position, "cache.position")


class AttnIntermediates(NamedTuple):
    """What attention returns beside its output.

    value_residual: this call's values [b h n d]. cached_key_values: the cache for the next call.
    """

    value_residual: Tensor
    cached_key_values: KeyValueCache


class RotaryPositions(RotaryEmbedding):
    """Rotary embedding (arXiv 2104.09864) whose frequencies stay in float32 when the model is moved to half precision.

    In bfloat16, positions beyond 256 would equal their neighbours."""

    def __init__(self, dim: int):
        super().__init__(dim, cache_if_possible=False, cache_max_seq_len=0)

    def _apply(self, fn, recurse=True):
        before = self.freqs.data
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < before.dtype.itemsize and self.freqs.dtype.itemsize < 4:
            self.freqs.data = before.to(self.freqs.device)
        return self

    def angles(self, start: int, n: int) -> Tensor:
        """Return the angles [n d/2] of the n positions from `start` on."""
        positions = torch.arange(start, start + n, device=self.freqs.device, dtype=self.freqs.dtype)
        return torch.outer(positions, self.freqs)

    def rotate(self, t: Tensor, start: int) -> Tensor:
        """Rotate [... n d] by the positions of n tokens, the first of which is at `start`."""
        angles = self.angles(start, t.shape[-2])
        cos, sin = (x.to(torch.promote_types(angles.dtype, t.dtype)) for x in (angles.cos(), angles.sin()))
        even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return rotated.flatten(-2).to(t.dtype)


@known_keywords
class SegmentedAttention(nn.Module):
    """Causal attention within segments or a sliding window, whose cost is linear in the number of tokens: the attention
    of memory as context (arXiv 2501.00663, section 4.1, persistent memory: eq. 19), with rotary positions (arXiv
    2104.09864).

    Args:
        dim: features of a token.
        segment_len: tokens of a segment. Segment and long-term tokens together are the attention window.
        num_persist_mem_tokens: learned keys and values per head that every query sees.
        num_longterm_mem_tokens: long-term tokens after each segment.
        dim_head: features per head, an even number.
        heads: number of heads.
        sliding: a query sees its own key and the attention window before it, instead of its own segment.
        accept_value_residual: mix in the first layer's values (arXiv 2410.17897), by a learned sigmoid gate per token
            and head.
        attend_kwargs: `dropout` (probability, in training), `scale` (default dim_head ** -0.5); `flash` is ignored.
        use_flex_attn: use flex attention on CUDA. On CPU (where it has no backward), in float64 and with a cache,
            scaled dot-product attention is used.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(
        self,
        dim: int,
        segment_len: int,
        num_persist_mem_tokens: int = 0,
        num_longterm_mem_tokens: int = 0,
        dim_head: int = 64,
        heads: int = 8,
        sliding: bool = False,
        accept_value_residual: bool = False,
        attend_kwargs: dict | None = None,
        use_flex_attn: bool = False,
    ):
        given = dict(locals())
        check_flags(SegmentedAttention.__init__, given)
        super().__init__()
        positive_int(dim, "dim")
        positive_int(segment_len, "segment_len")
        count(num_persist_mem_tokens, "num_persist_mem_tokens")
        count(num_longterm_mem_tokens, "num_longterm_mem_tokens")
        positive_int(heads, "heads")
        if positive_int(dim_head, "dim_head") % 2:
            raise wrong("dim_head", dim_head, "an even integer (rotary embedding rotates pairs)")

        kinds = (Mapping, type(None))
        attend = dict(of_kind(attend_kwargs, kinds, "attend_kwargs", "a dict of 'dropout', 'scale' and 'flash'") or {})
        self.dropout = attend.pop("dropout", 0.0)
        self.scale = attend.pop("scale", None) or dim_head**-0.5
        attend.pop("flash", None)
        if attend:
            raise wrong("attend_kwargs", sorted(attend), "'dropout', 'scale' and 'flash'")
        if not 0 <= self.dropout < 1:
            raise wrong("attend_kwargs", {"dropout": self.dropout}, "a dropout in [0, 1)")
        if self.dropout and use_flex_attn:
            raise ValueError("use_flex_attn cannot be combined with dropout")

        self.dim = dim
        self.heads = heads
        self.window = segment_len + num_longterm_mem_tokens
        self.sliding = sliding
        self.use_flex_attn = use_flex_attn

        self.inner = inner = dim_head * heads
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.to_value_mix = nn.Linear(dim, heads) if accept_value_residual else None
        persistent = torch.zeros(2, heads, num_persist_mem_tokens, dim_head)
        self.persistent_memory = nn.Parameter(persistent, requires_grad=num_persist_mem_tokens > 0)
        self.rotary_emb = RotaryPositions(dim_head)
        own = {"attend_kwargs": {"scale": self.scale}}
        self.configuration = identity(SegmentedAttention.__init__, given, ("use_flex_attn",), **own)

    def forward(
        self,
        seq: Tensor,
        value_residual: Tensor | None = None,
        disable_flex_attn: bool = False,
        output_gating: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, AttnIntermediates]:
        """Attend over tokens [b n d], n >= 1. With a cache they follow the tokens that it holds.

        Args:
            seq: tokens [b n d].
            value_residual: the first layer's values for these tokens [b h n d]. accept_value_residual needs it.
            disable_flex_attn: use scaled dot-product attention for this call.
            output_gating: multiplies the output [b n d].
            cache: `cached_key_values` of the call before.

        Returns:
            The output [b n d] and `AttnIntermediates`.
        """
        flags(disable_flex_attn=disable_flex_attn)
        self._check(seq, value_residual, output_gating)
        normed = self.norm(seq)
        qk, v = self.to_qkv(normed).split((2 * self.inner, self.inner), dim=-1)
        qk, v = (t.unflatten(-1, (-1, self.persistent_memory.shape[-1])).transpose(1, 2) for t in (qk, v))

        start = position_after(cache, self, SegmentedAttention.__init__)
        q, k = self.rotary_emb.rotate(qk, start).chunk(2, dim=1)
        if self.to_value_mix is not None and value_residual is not None:
            mix = self.to_value_mix(normed).sigmoid().transpose(1, 2).unsqueeze(-1)
            v = v.lerp(value_residual.to(v.dtype), mix.to(v.dtype))
        out, cache = cached_attention(
            q,
            k,
            v,
            self.persistent_memory,
            cache,
            window=self.window,
            sliding=self.sliding,
            scale=self.scale,
            configuration=self.configuration,
            dropout=self.dropout if self.training else 0.0,
            flex=self._takes_flex(q) and not disable_flex_attn,
        )
        out = self.to_out(out.transpose(1, 2).flatten(2))
        if output_gating is not None:
            out = out * output_gating
        return out, AttnIntermediates(v, cache)

    def _takes_flex(self, q: Tensor) -> bool:
        return self.use_flex_attn and flex_attention is not None and q.is_cuda and q.dtype != torch.float64

    def _check(self, seq: Tensor, value_residual: Tensor | None, output_gating: Tensor | None) -> None:
        check_tokens(seq, "seq", self.dim, getattr(self.to_qkv, "weight", None))
        accepts = self.to_value_mix is not None
        if (value_residual is not None) != accepts:
            one, other = "accept_value_residual", "value_residual"
            raise ValueError(f"{one} needs {other}" if accepts else f"{other} needs {one}=True")
        _, heads, _, width = self.persistent_memory.shape
        values = (seq.shape[0], heads, seq.shape[1], width)
        for name, given, shape in (
            ("value_residual", value_residual, values),
            ("output_gating", output_gating, tuple(seq.shape)),
        ):
            if given is not None and (not isinstance(given, Tensor) or tuple(given.shape) != shape):
                got = tuple(given.shape) if isinstance(given, Tensor) else Words(type(given).__name__)
                raise wrong(name, got, f"a tensor of shape {shape}, or None")


def count(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise wrong(name, value, "an integer of at least 0")
    return value


def flex_segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, persistent: Tensor, *, window: int, sliding: bool, scale: float
) -> Tensor:
    """`segmented_attention` without cached keys, by flex attention: CUDA only. Shapes [b h n d]."""
    k, v = prepend(persistent, k, v)
    mask = _flex_mask(q.shape[-2], persistent.shape[-2], window, sliding, q.device)
    return _compiled_flex()(q, k.contiguous(), v.contiguous(), block_mask=mask, scale=scale)


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention)


@lru_cache(maxsize=32)
def _flex_mask(n: int, persistent: int, window: int, sliding: bool, device: torch.device):
    def rule(b, h, query, key):
        return (key < persistent) | visible(query, key - persistent, window, sliding)

    return create_block_mask(rule, B=None, H=None, Q_LEN=n, KV_LEN=n + persistent, device=device)
