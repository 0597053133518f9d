"""Momentum and decay of one window of chunks as lower-triangular matrices.

With u_j the surprise of chunk j, S the momentum (orders 1..o, each run over the one before) and M the memory,

    S^k_i = eta^k_i S^k_{i-1} + S^{k-1}_i   (S^0 = u),    M_i = keep_i M_{i-1} + sum_k c^k_i S^k_i

are linear in u and in what was carried in. E^k[i, j] is the product of eta^k over j < l <= i, D the same of keep:

    M = D[:, 0] M_0 + D (A u + sum_l B_l S^l_0),    A = sum_k diag(c^k) E^k ... E^1,    B_l likewise from E^k ... E^l.

A chunk that is not active leaves everything as it was: its eta and keep are 1, and what would enter S^k or M at it is
dropped, which is its column of E^k and D.

A gated transition (`Transition`) replaces M at the end of each mini-batch by start + share (M - start), start being M
where the mini-batch began. That is linear in M too, and changes D alone.

Where a text begins (`resets`), M is the initial memory and S is zero before the chunk: nothing crosses, in D and in E.

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
    memory_anchor [B m+1]: of the memory at which the first mini-batch began; None without a transition.
    memory_initial [B m+1]: of the initial memory, from which texts begin; None without resets.
    """

    memory_start: Tensor
    memory_carry: list[Tensor]
    memory_surprise: Tensor
    momentum_carry: list[list[Tensor]]
    momentum_surprise: list[Tensor]
    memory_anchor: Tensor | None = None
    memory_initial: Tensor | None = None


@dataclass(frozen=True)
class Transition:
    """A gated transition at the ends of mini-batches, within a window of several.

    share: of M that stays, a scalar in 0..1. starts: the entry at which each chunk's mini-batch begins, long [m], 0
    where it began earlier. ends: whether it ends with the chunk, bool [m].
    """

    share: Tensor
    starts: Tensor
    ends: Tensor


def coefficients(
    keep: Tensor,
    momentum: Tensor | None,
    combine: Tensor | None,
    active: Tensor | None = None,
    transition: Transition | None = None,
    resets: Tensor | None = None,
) -> Coefficients:
    """keep [B m]; momentum [B m o] or None; combine [B m o (+1)] or None (the last order alone); active bool [B m], or
    None: all are; resets bool [B m], with mini-batches of one chunk, or None: no text begins."""
    order, gates = 0, keep.unsqueeze(1)
    if momentum is not None:
        order, gates = momentum.shape[-1], torch.cat((gates, momentum.transpose(1, 2)), dim=1)
    if active is not None:
        gates = torch.where(active.unsqueeze(1), gates, 1.0)
    products, anchor, initial = cumulative_products(gates), None, None  # [B o+1 m+1 m+1]
    added = None
    if transition is not None:
        blended, added, anchor = blended_products(gates[:, 0], transition)
        products = torch.cat((blended.unsqueeze(1), products[:, 1:]), dim=1)
    if resets is not None:
        products, anchor, initial = _without_crossing(products, anchor, resets)
    if active is not None:
        products = products.masked_fill(~pad(active, (1, 0), value=True)[:, None, None, :], 0.0)
    decay_full, echoes = products[:, 0], [products[:, k + 1, 1:, :] for k in range(order)]
    start, decay = decay_full[:, :, 0], decay_full[:, :, 1:]
    if added is not None:
        decay = decay * added

    update, carries = _combined_update(echoes, combine)
    momentum_carry, momentum_surprise = _final_momentum(echoes)
    memory_surprise = decay if update is None else decay @ update  # without momentum it is the surprise itself
    memory_carry = [(decay @ carry.unsqueeze(-1)).squeeze(-1) for carry in carries]
    return Coefficients(start, memory_carry, memory_surprise, momentum_carry, momentum_surprise, anchor, initial)


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


def _without_crossing(products: Tensor, anchor: Tensor | None, resets: Tensor):
    """Return products [B o+1 m+1 m+1] and anchor with nothing from before a text in it, and the coefficients [B m+1] of
    the initial memory: those of the entry before the text's first chunk."""
    text = pad(resets.long().cumsum(dim=-1), (1, 0))  # of each entry
    began = torch.arange(resets.shape[-1], device=resets.device).mul(resets).cummax(dim=-1).values
    began = pad(began, (1, 0)).unsqueeze(-1)  # of each entry: the entry before its text's first chunk
    starts = products[:, 0]
    if anchor is not None:  # where the first chunk begins a text, its mini-batch too began at the initial memory
        starts = torch.cat((starts[:, :, :1] + anchor.unsqueeze(-1), starts[:, :, 1:]), dim=2)
    initial = starts.gather(2, began).squeeze(-1).masked_fill(text == 0, 0.0)
    anchor = None if anchor is None else anchor.masked_fill(text > 0, 0.0)
    crossing = text.unsqueeze(-1) != text.unsqueeze(-2)
    return products.masked_fill(crossing.unsqueeze(1), 0.0), anchor, initial


def blended_products(gates: Tensor, transition: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """Return `cumulative_products` of gates [B m] with a transition [B m+1 m+1]; what the transition at a chunk's end
    leaves of what it adds [m]; and the coefficients [B m+1] of the memory where the first mini-batch began.

    M_i = gate_i M_{i-1} + u_i within a mini-batch, share times that and (1 - share) M_start at its end: a triangular
    system without negative entries, so that nothing cancels.
    """
    m, share, starts, ends = gates.shape[-1], transition.share.to(gates.dtype), transition.starts, transition.ends
    added = torch.where(ends, share, 1.0)
    to_start = torch.nn.functional.one_hot(starts, m + 1) * (ends & (starts > 0)).unsqueeze(-1)
    step = torch.diag_embed(gates * added, offset=-1) + (1.0 - share) * pad(to_start, (0, 0, 1, 0))
    one = torch.eye(m + 1, dtype=gates.dtype, device=gates.device)
    spread = torch.linalg.solve_triangular(-step, one.expand_as(step), upper=False, unitriangular=True)
    from_first = pad(ends & (starts == 0), (1, 0)).to(gates.dtype)
    return spread, added, (1.0 - share) * (spread @ from_first)


def naive_blended_products(gates: Tensor, transition: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by running the recurrence on unit vectors, chunk by chunk."""
    m, share = gates.shape[-1], transition.share
    one = torch.eye(m + 2, dtype=gates.dtype, device=gates.device).expand(gates.shape[0], -1, -1)
    entries, first = [one[:, 0]], one[:, m + 1]
    added = torch.stack([share if end else torch.ones_like(share) for end in transition.ends])
    for i in range(m):
        entry = gates[:, i, None] * entries[-1]
        if transition.ends[i]:
            start = int(transition.starts[i])
            entry = torch.lerp(entries[start] if start else first, entry, share)
        entries.append(entry + one[:, i + 1])
    rows = torch.stack(entries, dim=1)
    return rows[:, :, : m + 1], added, rows[:, :, m + 1]


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
