"""RMSNorm of one token, whose scale is a Python number: a quarter of the time of the module's call.

Letters: d features
"""

from collections.abc import Callable

import torch
from torch import Tensor

from titans_pytorch.layers.norms import RMSNorm


class OneToken:
    """RMSNorm of x [1 1 d]; of more rows by the module."""

    def __init__(self, norm: RMSNorm):
        self.norm, self.weight, self.width = norm, norm.weight, norm.weight.numel()
        self.eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return self.norm(x)
        flat = x.reshape(self.width)
        square = torch.dot(flat, flat).item()
        return (x * self.weight).mul_((square / self.width + self.eps) ** -0.5)


def norm_step(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if type(norm) is not RMSNorm or norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return norm
    return OneToken(norm)
