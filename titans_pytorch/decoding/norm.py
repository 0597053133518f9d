"""RMSNorm of one token, whose scale is a Python number: a quarter of the time of the module's call.

Letters: d features
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from titans_pytorch.decoding.steps import STEPS, silent
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.ops.rms_norm import rms_norm


def rms_norm_step(norm: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm of x [b 1 d], d as in the norm's weight."""
    weight = norm.weight
    width = weight.numel()
    if x.numel() != width or weight.dtype != x.dtype:
        return rms_norm(x, weight, norm.eps)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    flat = x.reshape(width)
    square = torch.dot(flat, flat).item()
    return (x * weight).mul_((square / width + eps) ** -0.5)


STEPS[RMSNorm] = rms_norm_step


def norm_step(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a norm's step, or the norm itself, decided once."""
    return partial(rms_norm_step, norm) if type(norm) is RMSNorm and silent(norm) else norm
