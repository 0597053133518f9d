"""From normalised tokens to queries, keys and values, and from what was read to the output.

    linear map -> causal convolution -> activation -> norm of queries and keys;    read -> norm -> gate -> linear map

Titans, arXiv 2501.00663, section 4.4. All but the linear maps is optional. Parameters stand in the memory (`host`).

Letters: b batch, n tokens, m chunks, c tokens per chunk, h internal heads, u keys and values per token, d features of a
head, w channels (h u d), k convolution kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import positive_int, wrong
from .gating.reading import of_page
from .ops.modes import at_least_float32
from .ops.vjp import unit_norm


class CausalConv(nn.Module):
    """A convolution over the last `kernel` tokens, each channel on its own: together with the linear map before it, a
    depthwise-separable one. weight [k w] starts as nn.Conv1d's would, its last row is the present token's; no bias."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, width).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [b n w] after the k-1 tokens `before` it [b k-1 w], zeros where a sequence begins: (y [b n w], the k-1
        tokens before the next)."""
        kernel, weight, n = self.kernel, self.weight, x.shape[1]
        if before is None:
            before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
        x = torch.cat((before, x), dim=1)
        # a sum of shifted products: on a CPU many times faster than conv1d with as many groups as channels
        y = x[:, :n] * weight[0]
        for shift in range(1, kernel):
            y = torch.addcmul(y, x[:, shift : shift + n], weight[shift])
        return y, x[:, n:].clone()


class UnitNorm(nn.Module):
    """x / |x| over the last dim; zero stays zero."""

    def forward(self, x: Tensor) -> Tensor:
        return unit_norm(x)[0]


GATES = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}


@dataclass(frozen=True)
class ProjectionOptions:
    """The constructor's keywords that concern projections."""

    activation: Callable[[Tensor], Tensor] | None
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    qk_l2norm: bool
    conv_kernel: int | None
    output_gate: str | None

    def __post_init__(self):
        if self.conv_kernel is not None:
            positive_int(self.conv_kernel, "qkv_conv_kernel")
        if self.qk_l2norm and self.qk_rmsnorm:
            raise ValueError("qk_l2norm cannot be combined with qk_rmsnorm")
        if self.output_gate not in (None, *GATES):
            raise wrong("output_gate", self.output_gate, f"one of {', '.join(GATES)}, or None")


def conv_tails(host: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape of what the state carries for the convolutions, less its rows: field -> (k-1, channels)."""
    if host.queries_conv is None:
        return {"query_conv": (0, 0), "store_conv": (0, 0)}
    before, width = host.conv_kernel - 1, host.internal_heads * host.dim_head
    return {"query_conv": (before, width), "store_conv": (before, 2 * host.kv_per_token * width)}


def project(host: nn.Module, name: str, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens [b n d] through `to_{name}`, its convolution, the activation: ([b n w], the convolution's tail)."""
    x = getattr(host, f"to_{name}")(x)
    if (conv := getattr(host, f"{name}_conv")) is not None:
        x, before = conv(x, before)
    return host.activation(x), before


def keys_and_values(host: nn.Module, key_view: Tensor, value_view: Tensor, chunk: int, before: Tensor | None):
    """Views [b m*c d] of complete chunks: (keys, values [b h m c*u d], the tail of both convolutions [b k-1 2w])."""
    before = (None, None) if before is None else before.chunk(2, dim=-1)
    outs, tails = [], []
    for name, view, tail in zip(("keys", "values"), (key_view, value_view), before, strict=True):
        x, tail = project(host, name, view, tail)
        # [b m*c h*u*d] -> [b h m c*u d]
        x = x.unflatten(1, (-1, chunk)).unflatten(-1, (host.internal_heads, host.kv_per_token, -1))
        x = x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        outs.append(at_least_float32(x)), tails.append(tail)
    return host.k_norm(outs[0]), outs[1], None if tails[0] is None else torch.cat(tails, dim=-1)


def queries(host: nn.Module, tokens: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """tokens [b n d]: (queries [b h n d], the tail of the convolution [b k-1 w])."""
    x, tail = project(host, "queries", tokens, before)
    x = x.unflatten(-1, (host.internal_heads, -1)).transpose(1, 2)
    return host.q_norm(at_least_float32(x)), tail


def output(host: nn.Module, read: Tensor, tokens: Tensor, page: Tensor | None = None) -> Tensor:
    """What the heads read [b h n d] for the normalised tokens [b n d] -> [b n d]. page long [b n]: of those alone."""
    read = host.multihead_rmsnorm(read.to(tokens.dtype))
    if host.retrieve_gate is not None:
        gate = host.gate_activation(host.retrieve_gate(tokens))
        read = read * gate.unflatten(-1, (host.internal_heads, -1)).transpose(1, 2)
    if page is not None:
        read = of_page(read, page, host.heads)
    return host.combine_heads(read.transpose(1, 2).flatten(2))
