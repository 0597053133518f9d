"""Combines the outputs of attention and memory, the paper's (x).  Letters: b batch, n tokens, d features"""

from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import check_tokens, one_of, positive_int, wrong
from titans_pytorch.layers.norms import RMSNorm

GATES = ("normalised", "silu", "sigmoid")


class Gate(nn.Module):
    """Combines attended and remembered [b n d] into [b n d], then applies a linear map.

    normalised: RMSNorm with a learned weight and a sigmoid on each side, then the product (section 4.2: "normalize the
    outputs ... followed by a non-linearity"). Near zero it is about 1/4 + attended/8 + remembered/8, so neither side
    can switch the other off, as in a plain product. silu, sigmoid: attended times this function of remembered.
    """

    def __init__(self, dim: int, gate: str = "normalised"):
        super().__init__()
        self.dim, self.kind = positive_int(dim, "dim"), one_of(gate, GATES, "gate")
        normalised = gate == "normalised"
        self.attended_norm = RMSNorm(dim) if normalised else nn.Identity()
        self.remembered_norm = RMSNorm(dim) if normalised else nn.Identity()
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        weight = getattr(self.to_out, "weight", None)
        check_tokens(attended, "attended", self.dim, weight)
        check_tokens(remembered, "remembered", self.dim, weight)
        if attended.shape != remembered.shape:
            raise wrong("remembered", tuple(remembered.shape), f"of the shape of attended, {tuple(attended.shape)}")
        attended, remembered = self.attended_norm(attended), self.remembered_norm(remembered)
        if self.kind == "normalised":
            joined = attended.sigmoid() * remembered.sigmoid()
        else:
            joined = attended * (F.silu(remembered) if self.kind == "silu" else remembered.sigmoid())
        return self.to_out(joined)
