"""How one parameter of the memory moves through a window of chunks: entry 0 before the window, entry i after chunk i.

A path is applied to grouped tokens x [B G r d], group g reading entry rows[g]; rows is a slice or a tensor of indices.
Letters: B rows (batch and heads), G groups, r tokens per group, m chunks, p pairs per chunk, d and e the sides of a weight.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ops.coefficients import Coefficients

Rows = slice | Tensor


class Path(Protocol):
    def matmul(self, x: Tensor, rows: Rows) -> Tensor: ...

    def matmul_t(self, x: Tensor, rows: Rows) -> Tensor: ...

    def mul(self, x: Tensor, rows: Rows) -> Tensor: ...

    def entries(self, start: int, stop: int) -> Tensor: ...


class BuiltPath:
    """All entries in memory: [B m+1 ...]."""

    def __init__(self, weights: Tensor):
        self.weights = weights

    def matmul(self, x, rows):
        return x @ self.weights[:, rows]

    def matmul_t(self, x, rows):
        return x @ self.weights[:, rows].transpose(-1, -2)

    def mul(self, x, rows):
        return x * self.weights[:, rows].unsqueeze(2)

    def entries(self, start, stop):
        return self.weights[:, start:stop]


@dataclass(frozen=True)
class DualPath:
    """A weight that is never built: what enters it (a) and the gradient of what leaves it (delta), per stored pair.

    x M_i = start_i (x M_0) + sum_l carry_il (x S^l_0) - sum over pairs t of chunks j <= i of
    surprise_ij scale_j (x . a_t) delta_t: causal attention with keys a and values delta.

    memory [B d e]; momentum [o B d e] or None (zero); a [B m p d]; delta [B m p e]; scale [B m] or None (ones).
    """

    memory: Tensor
    momentum: Tensor | None
    a: Tensor
    delta: Tensor
    coefficients: Coefficients
    surprise: Tensor  # [B m+1 m], minus memory_surprise times scale

    def matmul(self, x, rows):
        return self._apply(x, rows, self.a, self.delta, transposed=False)

    def matmul_t(self, x, rows):
        return self._apply(x, rows, self.delta, self.a, transposed=True)

    def _apply(self, x, rows, keys, values, transposed):
        B, G, r, _ = x.shape
        m, p = self.a.shape[1:3]
        flat = x.flatten(1, 2)
        c = self.coefficients

        def through(weight):
            out = flat @ (weight.transpose(-1, -2) if transposed else weight)
            return out.view(B, G, r, -1)

        out = c.memory_start[:, rows, None, None] * through(self.memory)
        if self.momentum is not None:
            for carry, momentum in zip(c.memory_carry, self.momentum, strict=True):
                out = out + carry[:, rows, None, None] * through(momentum)
        if m == 0:
            return out
        scores = (flat @ keys.flatten(1, 2).transpose(-1, -2)).view(B, G, r, m, p)
        scores = scores * self.surprise[:, rows, None, :, None]
        return out + (scores.view(B, G * r, m * p) @ values.flatten(1, 2)).view(out.shape)

    def mul(self, x, rows):
        raise NotImplementedError("elementwise parameters are built")

    def entries(self, start, stop):
        c, shape = self.coefficients, self.memory.shape[1:]
        rows = slice(start, stop)
        out = c.memory_start[:, rows, None, None] * self.memory[:, None]
        if self.momentum is not None:
            for carry, momentum in zip(c.memory_carry, self.momentum, strict=True):
                out = out + carry[:, rows, None, None] * momentum[:, None]
        weighted = self.a[:, None] * self.surprise[:, rows, :, None, None]  # [B i m p d]
        grads = weighted.flatten(2, 3).transpose(-1, -2) @ self.delta.flatten(1, 2)[:, None]
        return out + grads.view(*grads.shape[:2], *shape)


def weighted_gradient(weights: Tensor, a: Tensor, delta: Tensor) -> Tensor:
    """sum_j weights_j G_j with G_j = a_j^T delta_j: [B m], [B m p d], [B m p e] -> [B d e]."""
    return (a * weights[:, :, None, None]).flatten(1, 2).transpose(-1, -2) @ delta.flatten(1, 2)


def take_rows(rows: list[int], device) -> Rows:
    """Indices as a slice where they are consecutive: a view then, no copy."""
    if all(b == a + 1 for a, b in zip(rows[:-1], rows[1:], strict=True)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
