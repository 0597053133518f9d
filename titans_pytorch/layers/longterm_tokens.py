"""Learned long-term tokens stand behind every complete segment that is followed by another token.

Put the other way round: they come before each segment but the first, and this holds for a sequence that is read in
pieces. Positions with them are called places here.

ein letters: b batch, n tokens, p long-term tokens, m segments, c tokens of a segment, d features
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def places(tokens: int, segment_len: int, longterm: int) -> int:
    """How many places the first `tokens` tokens take."""
    return tokens + longterm * (max(tokens - 1, 0) // segment_len)


def insert_longterm(x: Tensor, longterm: Tensor, segment_len: int, start: int = 0) -> Tensor:
    """Tokens [b n d], of which the first is token number `start`, with long-term tokens [p d] before new segments."""
    p = longterm.shape[0]
    if p == 0:
        return x
    b, n, _ = x.shape
    ahead = start % segment_len
    segments = F.pad(x, (0, 0, ahead, -(ahead + n) % segment_len)).unflatten(1, (-1, segment_len))
    longterm = longterm.to(x.dtype).expand(b, segments.shape[1], -1, -1)
    out = torch.cat((longterm, segments), dim=2).flatten(1, 2)
    first = places(start, segment_len, p) - _origin(start, segment_len, p)
    return out[:, first : first + places(start + n, segment_len, p) - places(start, segment_len, p)]


def remove_longterm(x: Tensor, num_longterm: int, segment_len: int, start: int, n: int) -> Tensor:
    """Undo `insert_longterm`: the n tokens [b n d] among places [b .. d]."""
    p = num_longterm
    if p == 0:
        return x
    ahead = places(start, segment_len, p) - _origin(start, segment_len, p)
    block = p + segment_len
    blocks = F.pad(x, (0, 0, ahead, -(ahead + x.shape[1]) % block)).unflatten(1, (-1, block))
    first = start % segment_len
    return blocks[:, :, p:].flatten(1, 2)[:, first : first + n]


def _origin(start: int, segment_len: int, longterm: int) -> int:
    """The place where the long-term tokens of token `start`'s segment begin (before the first segment: -p)."""
    return start // segment_len * (segment_len + longterm) - longterm
