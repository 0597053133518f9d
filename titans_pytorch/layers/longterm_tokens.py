"""Long-term tokens: learned tokens before each segment but the first.

So they follow a complete segment only when another token arrives, also if a sequence is read in several calls. A place
is a position in the sequence that includes long-term tokens.

ein letters: b batch, n tokens, p long-term tokens, m segments, c tokens of a segment, d features
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def places(tokens: int, segment_len: int, longterm: int) -> int:
    """Return the number of places of the first `tokens` tokens."""
    return tokens + longterm * (max(tokens - 1, 0) // segment_len)


def insert_longterm(x: Tensor, longterm: Tensor, segment_len: int, start: int = 0) -> Tensor:
    """Put long-term tokens [p d] before new segments. x: tokens [b n d], the first is token number `start`."""
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
    """Undo `insert_longterm`: return the n tokens [b n d] among places [b .. d]."""
    p = num_longterm
    if p == 0:
        return x
    ahead = places(start, segment_len, p) - _origin(start, segment_len, p)
    block = p + segment_len
    blocks = F.pad(x, (0, 0, ahead, -(ahead + x.shape[1]) % block)).unflatten(1, (-1, block))
    first = start % segment_len
    return blocks[:, :, p:].flatten(1, 2)[:, first : first + n]


def _origin(start: int, segment_len: int, longterm: int) -> int:
    """Return the first place of the long-term tokens of token `start`'s segment (-p for the first segment)."""
    return start // segment_len * (segment_len + longterm) - longterm
