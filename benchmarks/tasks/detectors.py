"""Modules that score sequences, for benchmark_dmd.py. Letters: b batch, n tokens, d features."""

from typing import Any

from torch import Tensor, nn

from titans_pytorch import DynamicModeDecomposition, SymplecticGating


class DmdError(nn.Module):
    """DMD error of sequences [b n d] -> [b]."""

    def __init__(self, dim: int, rank: int | None = None):
        super().__init__()
        self.dmd = DynamicModeDecomposition(rank)

    def forward(self, seq: Tensor) -> Tensor:
        return self.dmd(seq)


class Complexity(nn.Module):
    """Mean complexity over tokens: [b n d] -> [b]. The maps are untrained, drawn from the seed."""

    def __init__(self, dim: int, **options: Any):
        super().__init__()
        self.gate = SymplecticGating(dim, **options)

    def forward(self, seq: Tensor) -> Tensor:
        return self.gate(seq).mean(dim=(1, 2))
