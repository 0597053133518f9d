"""SegmentedAttention for one token. Keys and values that a query can see lie in a buffer of fixed size, after the
persistent ones; those of a new token are written into it.

Letters: b batch, h heads, d features of a head, p persistent keys, w slots
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.decoding.norm import norm_step
from titans_pytorch.layers.attention import KeyValueCache, RotaryPositions, SegmentedAttention, in_reach, position_after

AHEAD = 64  # positions whose angles are computed together


class Turns:
    """Complex factors of the rotary embedding for a token's query, key and value; the value's factor is one."""

    def __init__(self, rotary: RotaryPositions, dtype: torch.dtype):
        self.rotary, self.dtype = rotary, dtype
        self.first = 0
        self.table: tuple[Tensor, ...] = ()

    def at(self, position: int) -> Tensor:
        """Return the factors [3 1 1 d/2] of a position."""
        if not 0 <= position - self.first < len(self.table):
            self.first = position
            angles = self.rotary.angles(position, AHEAD)
            turn = torch.complex(angles.cos().to(self.dtype), angles.sin().to(self.dtype))
            self.table = torch.stack((turn, turn, torch.ones_like(turn)), dim=1)[:, :, None, None].unbind(0)
        return self.table[position - self.first]


class AttentionStep:
    """Reads tokens [b 1 d] one after the other, starting from a cache; `cache()` returns the next cache."""

    def __init__(self, attention: SegmentedAttention, cache: KeyValueCache, turns: Turns):
        self.attention, self.turns = attention, turns
        self.position = position_after(cache, attention, SegmentedAttention.__init__)
        self.norm = norm_step(attention.norm)
        b, _, count, _ = cache.keys.shape
        _, heads, self.persistent, width = attention.persistent_memory.shape
        self.shape = (b, 3, heads, 1, width)
        # a sliding query sees its own key and `window` before it
        self.slots = attention.window + attention.sliding
        self.buffer = cache.keys.new_empty(b, 2, heads, self.persistent + self.slots, width)
        self.buffer[:, :, :, : self.persistent] = attention.persistent_memory
        at = self._slots(count)
        self.buffer[:, 0, :, at], self.buffer[:, 1, :, at] = cache.keys, cache.values

    def step(self, seq: Tensor, first_values: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output [b 1 d] and this layer's values [b h 1 d]. seq [b 1 d]; first_values: the first layer's, if
        they are mixed in; gate: multiplies the output, or None."""
        own, (b, _, heads, _, width) = self.attention, self.shape
        normed = self.norm(seq)
        pairs = torch.view_as_complex(own.to_qkv(normed).reshape(b, 3, heads, 1, width // 2, 2))
        turned = torch.view_as_real(pairs * self.turns.at(self.position)).view(self.shape)
        values = turned.select(1, 2)
        if own.to_value_mix is not None and first_values is not None:
            values.lerp_(first_values, own.to_value_mix(normed).sigmoid().view(b, heads, 1, 1))
        slot = self.position % self.slots
        self.buffer.narrow(3, self.persistent + slot, 1).copy_(turned.narrow(1, 1, 2))
        self.position += 1
        seen = min(self.position, self.slots) if own.sliding else slot + 1
        keys, all_values = self.buffer.narrow(3, 0, self.persistent + seen).unbind(1)
        out = F.scaled_dot_product_attention(turned.select(1, 0), keys, all_values, scale=own.scale)
        out = own.to_out(out.reshape(b, 1, heads * width))
        return (out if gate is None else out * gate), values

    def cache(self) -> KeyValueCache:
        """Return the cache of SegmentedAttention: the keys that a later query can see."""
        kept = in_reach(self.position, self.attention.window, self.attention.sliding)
        keys, values = self.buffer[:, :, :, self._slots(kept)].unbind(1)
        return KeyValueCache(keys, values, self.position, self.attention.configuration)

    def _slots(self, count: int) -> Tensor:
        """Return the slots of the last `count` keys."""
        return torch.arange(self.position - count, self.position) % self.slots + self.persistent
