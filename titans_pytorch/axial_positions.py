"""Axial positional embedding of any stretch of a sequence.

The embedding is a sum of two learned functions of whole numbers, row and column, so a place's value depends neither on
the sequence's length nor on where the stretch begins: what causality and reading in pieces need.

Letters: n places, d features
"""

import torch
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from torch import Tensor


def axial_positions(
    embedding: ContinuousAxialPositionalEmbedding, start: int, n: int, width: int, like: Tensor
) -> Tensor:
    """[n d] for the places start, start + 1, ... of a grid with rows of `width` places, with the device and dtype of
    `like`. (The embedding looks for its own at weights, which a quantised one has not.)

    Each row and column number goes through its network once, at most n + width numbers in all."""
    row_net, column_net = embedding.mlps
    first = start // width
    place = torch.arange(start - first * width, start - first * width + n, device=like.device)
    row, column = place // width, place % width

    def numbers(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=like.device, dtype=like.dtype)[:, None]

    rows = row_net(numbers(first, (start + n - 1) // width + 1))
    if n < width:  # few places: their own columns alone
        return rows[row] + column_net(column.to(like.dtype)[:, None])
    return rows[row] + column_net(numbers(0, width))[column]
