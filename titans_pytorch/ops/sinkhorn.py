"""Sinkhorn-Knopp: a square matrix made doubly stochastic by scaling its columns and rows in turn.

What manifold-constrained hyper-connections mix their streams by (arXiv 2512.24880, section 4.2). Matrices
are given as logits, their exponentials are scaled; dims 0 and 1 are rows i and columns j, all further ones tokens, so
that each of the many small steps is one pass over contiguous tokens.

Letters: s streams, N tokens
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pytorch.ops.modes import naive_gradients, plain_only, without_autocast

ITERATIONS = 20
STILL = 1e-15  # of a scaling: less than rounding
DEPTH = 60.0  # logits further below their column's largest count as that far: scalings stay finite in float32


def naive_sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """`iterations` times: each column divided by its sum, then each row by its. [s s ...] -> [s s ...]"""
    x = _matrix(logits)
    for _ in range(iterations):
        x = x / x.sum(dim=0, keepdim=True)
        x = x / x.sum(dim=1, keepdim=True)
    return x


def sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The same numbers: [s s ...] -> [s s ...], rows sum to one, columns nearly; float32 or more.

    The matrix stays as it is, and two vectors per token are found that scale it: x_ij = u_i K_ij v_j."""
    if plain_only():
        return naive_sinkhorn(logits, iterations)
    return _Sinkhorn.apply(logits, iterations)


def sinkhorn_numbers(logits: Sequence[Sequence[float]], iterations: int = ITERATIONS) -> list[list[float]]:
    """The same for one matrix of Python numbers: for one token, where launching a kernel takes longer than all of the
    arithmetic. It stops where a further iteration changes nothing."""
    return [list(row) for row in zip(*sinkhorn_columns(logits, iterations), strict=True)]


def sinkhorn_columns(logits: Sequence[Sequence[float]], iterations: int = ITERATIONS) -> list[list[float]]:
    """Its columns."""
    if max(map(max, logits)) < DEPTH / 2 and min(map(min, logits)) > -DEPTH / 2:  # any factor of a column falls out
        columns = [list(map(math.exp, column)) for column in zip(*logits, strict=True)]
    else:
        columns = [[math.exp(max(x - max(column), -DEPTH)) for x in column] for column in zip(*logits, strict=True)]
    rows = list(zip(*columns, strict=True))
    u, v = (_scalings_of_four if len(rows) == 4 else _scalings)(columns, rows, iterations)
    return [[a * x * b for a, x in zip(u, column)] for b, column in zip(v, columns, strict=True)]  # noqa: B905


def _scalings(columns, rows, iterations: int) -> tuple[list[float], list[float]]:
    u = [1.0] * len(rows)
    for _ in range(iterations):
        v = [1.0 / sum(map(operator.mul, column, u)) for column in columns]
        u = [1.0 / sum(map(operator.mul, row, v)) for row in rows]
    return u, v


def _scalings_of_four(columns, rows, iterations: int) -> tuple[list[float], list[float]]:
    """Written out for the usual number of streams: a third of the time."""
    (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3) = columns
    u0 = u1 = u2 = u3 = 1.0
    for _ in range(iterations):
        before = u0, u1, u2, u3
        v0 = 1.0 / (a0 * u0 + a1 * u1 + a2 * u2 + a3 * u3)
        v1 = 1.0 / (b0 * u0 + b1 * u1 + b2 * u2 + b3 * u3)
        v2 = 1.0 / (c0 * u0 + c1 * u1 + c2 * u2 + c3 * u3)
        v3 = 1.0 / (d0 * u0 + d1 * u1 + d2 * u2 + d3 * u3)
        u0 = 1.0 / (a0 * v0 + b0 * v1 + c0 * v2 + d0 * v3)
        u1 = 1.0 / (a1 * v0 + b1 * v1 + c1 * v2 + d1 * v3)
        u2 = 1.0 / (a2 * v0 + b2 * v1 + c2 * v2 + d2 * v3)
        u3 = 1.0 / (a3 * v0 + b3 * v1 + c3 * v2 + d3 * v3)
        if max(abs(u0 - before[0]), abs(u1 - before[1]), abs(u2 - before[2]), abs(u3 - before[3])) < STILL * u0:
            break
    return [u0, u1, u2, u3], [v0, v1, v2, v3]


def _matrix(logits: Tensor) -> Tensor:
    """K: the logits' exponentials, each column's largest 1. What that divides by falls out in the first step."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return (logits - logits.detach().amax(dim=0, keepdim=True)).clamp(min=-DEPTH).exp()


class _Sinkhorn(torch.autograd.Function):
    """Keeps K and the scaling vectors of every iteration, [2T s N] numbers."""

    @staticmethod
    def forward(ctx, logits, iterations):
        matrix = _matrix(logits)
        product = torch.empty_like(matrix)
        scales = matrix.new_empty(iterations, 2, *matrix.shape[1:])
        u = None
        for v, next_u in scales.unbind(0):
            torch.sum(matrix if u is None else torch.mul(matrix, u.unsqueeze(1), out=product), dim=0, out=v)
            v.reciprocal_()
            u = next_u
            torch.sum(torch.mul(matrix, v, out=product), dim=1, out=u)
            u.reciprocal_()
        ctx.save_for_backward(logits, matrix, scales)
        return torch.mul(matrix, v, out=product).mul_(u.unsqueeze(1))

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        logits, matrix, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            return *naive_gradients(lambda x: naive_sinkhorn(x, len(scales)), (logits,), grad), None
        u, v = scales[-1, 1].unsqueeze(1), scales[-1, 0]
        slope = grad * u * v  # of K: so far through u_i K_ij v_j alone
        inner = grad * matrix
        d_u, d_v = (inner * v).sum(dim=1), (inner * u).sum(dim=0)
        for t in reversed(range(len(scales))):
            v, u = scales[t]
            d_rows = (d_u * u * u).neg_()  # u = 1 / (K v)
            d_rows_column = d_rows.unsqueeze(1)
            slope.addcmul_(d_rows_column, v)
            d_v += torch.mul(matrix, d_rows_column, out=inner).sum(dim=0)
            d_columns = (d_v * v * v).neg_()  # v = 1 / (K^T u), u of the iteration before
            if t == 0:
                slope += d_columns
                break
            slope.addcmul_(scales[t - 1, 1].unsqueeze(1), d_columns)
            d_u = torch.mul(matrix, d_columns, out=inner).sum(dim=1)
            d_v = 0.0
        return slope.mul_(matrix).to(logits.dtype), None
