"""Norms over heads."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class MultiheadRMSNorm(nn.Module):
    """RMSNorm without weight, times (gamma + 1); gamma [h 1 d] starts at zero. x [b h ... d]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        h, _, d = self.gamma.shape
        return rms_norm(x, (d,)) * (self.gamma.view(h, *(1,) * (x.ndim - 3), d) + 1.0)
