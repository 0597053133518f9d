"""Combines the outputs of attention and memory, the paper's (x).  Letters: b batch, n tokens, d features"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import check_tokens, number_or_none, one_of, positive_int, wrong
from titans_pytorch.decoding.steps import STEPS, step
from titans_pytorch.layers.norms import RMSNorm

GATES = ("normalised", "silu", "sigmoid", "convex")


class Gate(nn.Module):
    """Combines attended and remembered [b n d] into [b n d], then applies a linear map.

    normalised: RMSNorm with a learned weight and a sigmoid on each side, then the product (section 4.2: "normalize the
    outputs ... followed by a non-linearity"). Near zero it is about 1/4 + attended/8 + remembered/8, so neither side
    can switch the other off, as in a plain product. silu, sigmoid: attended times this function of remembered.
    convex: g * attended + (1 - g) * remembered with g = sigmoid(W [h; remembered] + b) per feature, where h is the
    layer's normalised input. It is not from the paper. init_gate_bias: the initial b (None: 0).
    """

    def __init__(self, dim: int, gate: str = "normalised", init_gate_bias: float | None = None):
        super().__init__()
        self.dim, self.kind = positive_int(dim, "dim"), one_of(gate, GATES, "gate")
        bias = number_or_none(init_gate_bias, "init_gate_bias")
        if bias is not None and gate != "convex":
            raise ValueError('init_gate_bias needs gate="convex"')
        normalised = gate == "normalised"
        self.attended_norm = RMSNorm(dim) if normalised else nn.Identity()
        self.remembered_norm = RMSNorm(dim) if normalised else nn.Identity()
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.to_share = nn.Linear(2 * dim, dim) if gate == "convex" else None
        if self.to_share is not None:
            nn.init.constant_(self.to_share.bias, bias or 0.0)

    def forward(self, attended: Tensor, remembered: Tensor, h: Tensor | None = None) -> Tensor:
        """Return [b n d] of attended and remembered [b n d]. "convex" needs h [b n d], the layer's normalised input."""
        weight = getattr(self.to_out, "weight", None)
        check_tokens(attended, "attended", self.dim, weight)
        check_tokens(remembered, "remembered", self.dim, weight)
        if attended.shape != remembered.shape:
            raise wrong("remembered", tuple(remembered.shape), f"of the shape of attended, {tuple(attended.shape)}")
        if self.to_share is not None and (h is None or h.shape != attended.shape):
            raise ValueError(f'gate="convex" needs h of the shape of attended, {tuple(attended.shape)}')
        return self._joined(self.attended_norm(attended), self.remembered_norm(remembered), h)

    def _joined(self, attended: Tensor, remembered: Tensor, h: Tensor | None) -> Tensor:
        """Combine normalised outputs."""
        if self.to_share is not None:
            assert h is not None
            share = self.to_share(torch.cat((h, remembered), dim=-1)).sigmoid()
            joined = torch.lerp(remembered, attended, share)
        elif self.kind == "normalised":
            joined = attended.sigmoid() * remembered.sigmoid()
        else:
            joined = attended * (F.silu(remembered) if self.kind == "silu" else remembered.sigmoid())
        return self.to_out(joined)


def gate_step(gate: Gate, attended: Tensor, remembered: Tensor, h: Tensor) -> Tensor:
    """Combine one token's outputs, without checks."""
    return gate._joined(step(gate.attended_norm, attended), step(gate.remembered_norm, remembered), h)


STEPS[Gate] = gate_step
