"""Axial positional embedding of any stretch of a sequence.

Positions are laid out in a grid. The embedding is the sum of a learned function of the row and one of the column. So it
depends on the position alone, not on the sequence's length or on the start of a call: causality and streaming need
this.

Letters: n positions, d features
"""

import torch
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from torch import Tensor


def axial_positions(
    embedding: ContinuousAxialPositionalEmbedding, start: int, n: int, width: int, like: Tensor
) -> Tensor:
    """Return the embedding [n d] of n positions from `start` on, in a grid whose rows have `width` positions.

    Each row and each column is embedded once: at most n + width inputs of the two networks.

    Args:
        like: tensor with the device and dtype of the result. (The embedding's own lookup reads weights that a quantised
            embedding lacks.)
    """
    row_net, column_net = embedding.mlps
    first = start // width
    place = torch.arange(start - first * width, start - first * width + n, device=like.device)
    row, column = place // width, place % width

    def numbers(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=like.device, dtype=like.dtype)[:, None]

    rows = row_net(numbers(first, (start + n - 1) // width + 1))
    if n < width:  # fewer positions than columns: embed only theirs
        return rows[row] + column_net(column.to(like.dtype)[:, None])
    return rows[row] + column_net(numbers(0, width))[column]
