"""A gate that ignores its tokens, for benchmark_gate_variants.py."""

from typing import Any

from torch import Tensor, nn

from titans_pytorch import NeuralMemory


class ConstantGate(nn.Module):
    """A gate with the same score for every token; its scale is learned, as with other gates."""

    context = 0

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.new_full((*tokens.shape[:2], 1), 0.25)


def constant_gate_memory(**keywords: Any) -> NeuralMemory:
    return NeuralMemory(use_symplectic_gating=True, symplectic_gate=ConstantGate(), **keywords)
