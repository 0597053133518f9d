"""RMSNorm, with a learned weight or a gamma per head."""

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, positive_int, wrong
from titans_pytorch.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with learned weight and default eps, faster on a CPU (ops/rms_norm.py)."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or tuple(x.shape[-1:]) != self.normalized_shape or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise wrong("x", Words(got), f"a floating point tensor [.. {self.normalized_shape[0]}]")
        return rms_norm(x, self.weight, self.eps)


class MultiheadRMSNorm(nn.Module):
    """RMSNorm without weight, times (gamma + 1); gamma [h 1 d] starts at zero. x [b h ... d]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        positive_int(dim, "dim"), positive_int(heads, "heads")
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        h, _, d = self.gamma.shape
        return rms_norm(x) * (self.gamma.view(h, *(1,) * (x.ndim - 3), d) + 1.0)
