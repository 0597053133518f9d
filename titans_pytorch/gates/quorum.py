"""Quorum of neighbouring scores: trailing means, and the budget that keeps the largest.

Letters: b batch, n tokens, w window. A window is the token and the w - 1 before it; at the start it has fewer.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.gates.scores import rounding
from titans_pytorch.gates.selection import top_k_mask


def trailing_mean(x: Tensor, window: int) -> Tensor:
    """Return the mean of the last `window` entries, at the start of fewer. [b n] -> [b n].

    Sums of 1, 2, 4, ... entries take log2(window) additions of shifted copies. A running sum would be cheaper, but its
    results depend on all earlier entries: through rounding, and through entries that are not finite.
    """
    total, span, size, offset = torch.zeros_like(x), x, 1, 0
    while True:
        if window & size:
            total = total + _delay(span, offset)
            offset += size
        if 2 * size > window:
            break
        span = span + _delay(span, size)
        size *= 2
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype).clamp(max=window)
    return total / count


def budget_size(ratio: float, length: int) -> int:
    """Return the number of positions that a budget keeps: ceil(ratio * length)."""
    return math.ceil(ratio * length)


def sequence_budget(level: Tensor, ratio: float) -> Tensor:
    """Return True at the top ceil(ratio * n) positions of the whole sequence; not causal. [b n] -> bool [b n]."""
    n = level.shape[-1]
    return top_k_mask(level.detach(), budget_size(ratio, n)) if n else level > 0


def trailing_budget(level: Tensor, ratio: float, window: int) -> Tensor:
    """Return True at positions among the top ceil(ratio * w) of the last w, themselves included. [b n] -> bool [b n].

    Earlier positions win ties. Differences within rounding are ties: repeated tokens give levels that are equal up to
    rounding, and the result must not depend on how a sequence is cut into calls.
    """
    if level.shape[-1] == 0:
        return level > 0
    level = level.detach()
    earlier = F.pad(level, (window - 1, 0), value=-math.inf).unfold(-1, window, 1)[..., :-1]
    ahead = (earlier >= (level - rounding(level.dtype))[..., None]).sum(dim=-1)
    return ahead < budget_size(ratio, window)


def _delay(x: Tensor, steps: int) -> Tensor:
    n = x.shape[-1]
    return F.pad(x[..., : max(n - steps, 0)], (min(steps, n), 0))
