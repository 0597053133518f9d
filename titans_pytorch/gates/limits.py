"""Limits: the complexity above which a row switches pages. A fixed threshold, or a quantile of earlier complexities.

Letters: b batch, m chunks, w window.
"""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from titans_pytorch.common.checks import wrong
from titans_pytorch.gates.scores import rounding
from titans_pytorch.gates.stages import GateCarry

FEWEST = 8  # least number of complexities for a quantile


@dataclass(frozen=True)
class FixedLimit:
    """The limit `gates.symplectic_page_threshold`."""

    def __call__(self, gates, complexity: Tensor, carry: GateCarry) -> tuple[Tensor | float, GateCarry]:
        limit = gates.symplectic_page_threshold  # may be set at any time
        if not isinstance(limit, (Real, Tensor)):
            raise wrong("symplectic_page_threshold", limit, "a number")
        return limit if isinstance(limit, Tensor) else float(limit), carry


@dataclass(frozen=True)
class QuantileLimit:
    """The quantile of the last `window` complexities, those of the chunk's own row; none before `FEWEST` of them."""

    quantile: float
    window: int

    def __call__(self, gates, complexity, carry):
        recent = complexity[:, :0] if carry.recent_complexity is None else carry.recent_complexity
        everything = torch.cat((recent.to(complexity.dtype), complexity), dim=1)
        known = everything.shape[1] - complexity.shape[1]
        limit = trailing_quantile(everything, self.quantile, self.window, FEWEST)[:, known:-1]
        keep = min(self.window, everything.shape[1])
        # equal complexities differ by rounding, and by how a sequence was cut into calls
        return limit + rounding(limit.dtype), carry._replace(
            recent_complexity=everything[:, everything.shape[1] - keep :].clone()
        )


def trailing_quantile(x: Tensor, quantile: float, window: int, fewest: int = 1) -> Tensor:
    """Return the quantile (linear between neighbours) of up to `window` entries before each position; infinite with
    fewer than `fewest` entries. [b n] -> [b n+1]; the last value belongs to the next position.
    """
    b, n = x.shape
    padded = torch.nn.functional.pad(x, (window, 0), value=torch.inf)
    ordered = padded.unfold(-1, window, 1).sort(dim=-1).values  # missing entries sort last
    count = torch.arange(n + 1, device=x.device).clamp(max=window)
    at = (count - 1).clamp(min=0).to(x.dtype) * quantile
    low = at.floor()
    share = at - low
    low, high = low.long(), torch.minimum(low.long() + 1, (count - 1).clamp(min=0))
    low, high = (ordered.gather(-1, i.expand(b, -1).unsqueeze(-1)).squeeze(-1) for i in (low, high))
    limit = torch.where(share > 0, low + share * (high - low), low)
    return limit.masked_fill(count < max(fewest, 1), torch.inf)


def naive_trailing_quantile(x: Tensor, quantile: float, window: int, fewest: int = 1) -> Tensor:
    """`trailing_quantile` as a loop over positions."""
    outs = []
    for i in range(x.shape[1] + 1):
        part = x[:, max(0, i - window) : i]
        few = part.shape[1] < max(fewest, 1)
        outs.append(x.new_full(x.shape[:1], torch.inf) if few else part.quantile(quantile, dim=-1))
    return torch.stack(outs, dim=1)
