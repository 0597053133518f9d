"""How one parameter of the memory moves through a window of chunks: entry 0 before the window, entry i after chunk i.

A path is applied to grouped tokens x [B G r d], group g reading entry rows[g]; rows is a slice or a tensor of indices.
Letters: B rows (batch and heads), G groups, r tokens per group, m chunks, p pairs per chunk, d and e the sides of a
weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from titans_pytorch.ops.causal_product import causal_product
from titans_pytorch.ops.positions import Rows


class Path(Protocol):
    def matmul(self, x: Tensor, rows: Rows) -> Tensor: ...

    def matmul_t(self, x: Tensor, rows: Rows) -> Tensor: ...

    def mul(self, x: Tensor, rows: Rows) -> Tensor: ...

    def rows(self, rows: Rows) -> Tensor: ...

    def entries(self, start: int, stop: int) -> Tensor: ...

    def entry(self, i: int) -> Tensor: ...


class BuiltPath:
    """All entries in memory: [B m+1 ...]."""

    def __init__(self, weights: Tensor):
        self.weights = weights

    def matmul(self, x, rows):
        return _by_entry(x, self.weights[:, rows])

    def matmul_t(self, x, rows):
        return _by_entry(x, self.weights[:, rows].transpose(-1, -2))

    def mul(self, x, rows):
        return x * self.weights[:, rows].unsqueeze(2)

    def rows(self, rows):
        return self.weights[:, rows]

    def entries(self, start, stop):
        return self.weights[:, start:stop]

    def entry(self, i):
        return self.weights[:, i]


def _by_entry(x: Tensor, weights: Tensor) -> Tensor:
    """x [B G r d] @ weights [B G d e], without a copy of weights that lie in memory entry by entry."""
    if weights.stride(1) <= weights.stride(0):
        return x @ weights
    return (x.transpose(0, 1) @ weights.transpose(0, 1)).transpose(0, 1)


@dataclass(frozen=True)
class DualPath:
    """A weight that is never built: what enters it (a) and the gradient of what leaves it (delta), per stored pair.

    x M_i = start_i (x M_0) + sum_l carry_il (x S^l_0) - sum over pairs t of chunks j <= i of
    surprise_ij scale_j (x . a_t) delta_t: causal attention with keys a and values delta.

    carried: (start, M_0), then (carry_l, S^l_0) for every order that is not zero: shares [B m+1] and weights [B d e].
    a [B m p d]; delta [B m p e]; surprise [B m+1 m]: minus the coefficients' own, times scale.
    """

    carried: Sequence[tuple[Tensor, Tensor]]
    a: Tensor
    delta: Tensor
    surprise: Tensor

    def matmul(self, x, rows):
        return self._apply(x, rows, self.a, self.delta, lambda weight: weight)

    def matmul_t(self, x, rows):
        return self._apply(x, rows, self.delta, self.a, lambda weight: weight.transpose(-1, -2))

    def _apply(self, x, rows, keys, values, side):
        out = carried_product(x, rows, [(share, side(weight)) for share, weight in self.carried])
        if 0 in self.a.shape[1:3]:
            return out
        product = causal_product(x.flatten(1, 2), keys, values, self.surprise[:, rows], first_row(rows))
        return out + product.unflatten(1, x.shape[1:3])

    def mul(self, x, rows):
        raise NotImplementedError("elementwise parameters are built")

    def rows(self, rows):
        raise NotImplementedError("its rows are not built")

    def entries(self, start, stop):
        return torch.stack([self.entry(i) for i in range(start, stop)], dim=1)

    def entry(self, i):
        (share, weight), *others = self.carried
        out = share[:, i, None, None] * weight
        for share, weight in others:
            out = torch.addcmul(out, share[:, i, None, None], weight)
        # the first i chunks alone: a later one may not be finite
        return weighted_gradient(self.surprise[:, i, :i], self.a[:, :i], self.delta[:, :i], out)


def carried_product(x: Tensor, rows: Rows, carried: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What x [B G r d] reads of weights carried into a window: the sum of share x W over (share [B m+1], W [B d e])."""
    B, G, r, _ = x.shape
    flat, out = x.flatten(1, 2), None
    for share, weight in carried:
        share = share[:, rows, None].expand(B, G, r).reshape(B, G * r, 1)
        out = _add_scaled_product(out, flat, weight, share)
    assert out is not None
    return out.unflatten(1, (G, r))


def _add_scaled_product(out: Tensor | None, x: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """out + share (x @ weight), the share [B t 1] taken on the narrower side."""
    if weight.shape[-1] < weight.shape[-2]:
        product = share * (x @ weight)
        return product if out is None else out + product
    x = share * x
    return x @ weight if out is None else torch.baddbmm(out, x, weight)


def weighted_gradient(weights: Tensor, a: Tensor, delta: Tensor, base: Tensor | None = None) -> Tensor:
    """base + sum_j weights_j a_j^T delta_j: [B m], [B m p d], [B m p e] -> [B d e]."""
    weights = weights[:, :, None, None]
    a, delta = (a * weights, delta) if a.shape[-1] <= delta.shape[-1] else (a, delta * weights)
    a, delta = a.flatten(1, 2).transpose(-1, -2), delta.flatten(1, 2)
    return a @ delta if base is None else torch.baddbmm(base, a, delta)


def first_row(rows: Rows) -> int | None:
    return rows.start if isinstance(rows, slice) else None
