"""Momentum and decay of one window of chunks as lower-triangular matrices.

With u_j the surprise of chunk j, S the momentum (orders 1..o, each run over the one before) and M the memory,

    S^k_i = eta^k_i S^k_{i-1} + S^{k-1}_i   (S^0 = u),    M_i = keep_i M_{i-1} + sum_k c^k_i S^k_i

are linear in u and in what was carried in. E^k[i, j] is the product of eta^k over j < l <= i, D the same of keep:

    M = D[:, 0] M_0 + D (A u + sum_l B_l S^l_0),    A = sum_k diag(c^k) E^k ... E^1,    B_l likewise from E^k ... E^l.

A chunk that is not active leaves everything as it was: its eta and keep are 1, and what would enter S^k or M at it is
dropped, which is its column of E^k and D.

Letters: B rows (batch and heads), m chunks, o momentum order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TINY = 1e-30  # added before the logarithm: a gate of exactly 0 keeps its gradient


@dataclass(frozen=True)
class Coefficients:
    """Entry 0 stands before the window, entry i after chunk i.

    memory_start [B m+1]: of M_0 in M_i. memory_carry [o B m+1]: of S^l_0. memory_surprise [B m+1 m]: of u_j.
    momentum_carry [o][o] of [B]: of S^l_0 in S^k_m. momentum_surprise [o][B m]: of u_j in S^k_m.
    """

    memory_start: Tensor
    memory_carry: list[Tensor]
    memory_surprise: Tensor
    momentum_carry: list[list[Tensor]]
    momentum_surprise: list[Tensor]


def coefficients(
    keep: Tensor, momentum: Tensor | None, combine: Tensor | None, active: Tensor | None = None
) -> Coefficients:
    """keep [B m]; momentum [B m o] or None; combine [B m o (+1)] or None (the last order alone); active bool [B m], or
    None: all are."""
    order, gates = 0, keep.unsqueeze(1)
    if momentum is not None:
        order, gates = momentum.shape[-1], torch.cat((gates, momentum.transpose(1, 2)), dim=1)
    if active is None:
        products = cumulative_products(gates)  # [B o+1 m+1 m+1]
    else:
        products = cumulative_products(torch.where(active.unsqueeze(1), gates, 1.0))
        products = products.masked_fill(~pad(active, (1, 0), value=True)[:, None, None, :], 0.0)
    decay_full, echoes = products[:, 0], [products[:, k + 1, 1:, :] for k in range(order)]
    start, decay = decay_full[:, :, 0], decay_full[:, :, 1:]

    update, carries = _combined_update(echoes, combine)
    momentum_carry, momentum_surprise = _final_momentum(echoes)
    memory_surprise = decay if update is None else decay @ update  # without momentum it is the surprise itself
    memory_carry = [(decay @ carry.unsqueeze(-1)).squeeze(-1) for carry in carries]
    return Coefficients(start, memory_carry, memory_surprise, momentum_carry, momentum_surprise)


def cumulative_products(gates: Tensor) -> Tensor:
    """gates [... m] -> [... m+1 m+1]: entry [i, j] is the product of gates over j < l <= i, 0 above the diagonal.

    Sums of logarithms over exactly these entries: neither ratios of products, nor differences of long sums.
    """
    m = gates.shape[-1]
    logs = pad((gates + TINY).log(), (1, 0))
    below = torch.ones(m + 1, m + 1, dtype=torch.bool, device=gates.device).tril()
    spread = logs.unsqueeze(-1).masked_fill(~below.tril(-1), 0.0)
    return spread.cumsum(dim=-2).masked_fill(~below, -torch.inf).exp()


def naive_cumulative_products(gates: Tensor) -> Tensor:
    """The same by its definition."""
    m = gates.shape[-1]
    rows = []
    for i in range(m + 1):
        zeros = [torch.zeros_like(gates[..., 0])] * (m - i)
        rows.append(torch.stack([gates[..., j:i].prod(dim=-1) for j in range(i + 1)] + zeros, dim=-1))
    return torch.stack(rows, dim=-2)


def _chains(echoes):
    """For each order k the list over l <= k of (S^l_0 -> S^k) [B m], and (u -> S^k) [B m m]."""
    carried, surprise = [], None
    for echo in echoes:
        e, square = echo[:, :, 0], echo[:, :, 1:]
        carried = [(square @ c.unsqueeze(-1)).squeeze(-1) for c in carried] + [e]
        surprise = square if surprise is None else square @ surprise
        yield carried, surprise


def _combined_update(echoes, combine):
    if not echoes:
        return None, []
    chains = list(_chains(echoes))
    if combine is None:
        return chains[-1][1], chains[-1][0]
    zeroth = combine.shape[-1] - len(echoes)
    mixes = combine.unbind(-1)
    update = torch.diag_embed(mixes[0]) if zeroth else 0.0
    carries = [0.0] * len(echoes)
    for mix, (carried, surprise) in zip(mixes[zeroth:], chains, strict=True):
        update = update + mix.unsqueeze(-1) * surprise
        for order, carry in enumerate(carried):
            carries[order] = carries[order] + mix * carry
    return update, carries


def _final_momentum(echoes):
    chains = list(_chains(echoes))
    return [[c[:, -1] for c in carried] for carried, _ in chains], [surprise[:, -1] for _, surprise in chains]
