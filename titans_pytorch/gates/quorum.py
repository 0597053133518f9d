"""Agreement of neighbouring scores: trailing means and which of them lie within a budget.

Letters: b batch, n tokens, w window. A window is the token and the w - 1 before it; at the start it has fewer.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.gates.scores import rounding
from titans_pytorch.gates.selection import top_k_mask


def trailing_mean(x: Tensor, window: int) -> Tensor:
    """Mean of the last `window` entries, of as many as there are at the start. [b n] -> [b n].

    Partial sums are doubled, log2(window) additions of shifted copies. A running sum would be cheaper, but then every
    result would depend on all entries before it: by rounding, and altogether where one of them is not finite.
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
    """How many of `length` positions a budget keeps: ceil(ratio * length)."""
    return math.ceil(ratio * length)


def sequence_budget(level: Tensor, ratio: float) -> Tensor:
    """True at the top ceil(ratio * n) positions of the whole sequence, which needs the future. [b n] -> bool [b n]."""
    n = level.shape[-1]
    return top_k_mask(level.detach(), budget_size(ratio, n)) if n else level > 0


def trailing_budget(level: Tensor, ratio: float, window: int) -> Tensor:
    """True where a position is among the top ceil(ratio * w) of the last w, itself included. [b n] -> bool [b n].

    Earlier positions win ties, and a difference that rounding can make is a tie: tokens that repeat give levels equal
    but for rounding, and what they pass must not depend on how a sequence was cut into calls.
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
