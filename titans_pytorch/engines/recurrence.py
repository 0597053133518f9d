"""Momentum and forget gate over built surprises: every entry of a parameter, one pass per recurrence.

Letters: B rows (batch and heads), m chunks, o momentum order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titans_pytorch.rules.base import like
from titans_pytorch.rules.rates import WriteRates
from titans_pytorch.rules.titans import mixture

Scan = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def combined_update(
    surprise: Tensor, rates: WriteRates, carried: Sequence[Tensor] | None, scan: Scan
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the update of each chunk [B m ...], and each order's momentum after the last [B ...], from surprises
    [B m ...].
    """
    if rates.momentum is None:
        return surprise, ()
    outs, x = [surprise], surprise
    for order, gate in enumerate(rates.momentum.unbind(-1)):
        start = None if carried is None else carried[order]
        x = scan(*where_active(rates.active, gate, x), start)
        outs.append(x)
    final = tuple(out[:, -1] for out in outs[1:])
    if rates.combine is None:
        return outs[-1], final
    return mixture(rates.combine, outs), final


def where_active(active: Tensor | None, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a recurrence's gate [B m] and input [B m ...] with which it does not change at inactive chunks."""
    if active is None:
        return gate, x
    return torch.where(active, gate, 1.0), torch.where(like(active, x), x, 0.0)


def on_active(fn: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor | None) -> Tensor:
    """Apply fn [r m ...] -> [r m ...] to the written rows (long [r m]) of x [B m ...]; other rows become zero."""
    if rows is None:
        return fn(x)
    m, flat = x.shape[1], x.flatten(0, 1)
    at = (rows * m + torch.arange(m, device=rows.device)).flatten()
    out = fn(flat.index_select(0, at).unflatten(0, rows.shape))
    return torch.zeros_like(flat).index_copy(0, at, out.flatten(0, 1)).view_as(x)
