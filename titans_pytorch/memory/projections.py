"""Projections: tokens to queries, keys and values; reads of the heads to the layer's output.

    RMSNorm -> linear map -> causal convolution -> activation -> norm of queries and keys
    read -> norm -> gate -> linear map                             Titans, arXiv 2501.00663, section 4.4

Everything except the linear maps is optional.

Letters: b batch, n tokens, m chunks, c tokens per chunk, h heads of all pages, u keys and values per token, d features
of a head, w channels (h u d), k convolution kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import callable_or_none, positive_int, wrong
from titans_pytorch.layers.norms import MultiheadRMSNorm, RMSNorm
from titans_pytorch.ops.earlier_tokens import EarlierTokens
from titans_pytorch.ops.modes import at_least_float32
from titans_pytorch.ops.vjp import unit_norm


class CausalConv(nn.Module):
    """A depthwise convolution over the last `kernel` tokens, without bias. weight [k w] is initialised as in nn.Conv1d;
    its last row multiplies the current token.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, width).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(
        self, x: Tensor, before: Tensor | None = None, earlier: EarlierTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (y [b n w], the last k-1 inputs [b k-1 w]).

        Args:
            x: inputs [b n w].
            before: the k-1 inputs before them [b k-1 w]; None: zeros.
            earlier: positions of the earlier tokens of each, for rows with padding or several texts; None: adjacent.
        """
        kernel, weight, n = self.kernel, self.weight, x.shape[1]
        if before is None:
            before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
        x = torch.cat((before, x), dim=1)
        if earlier is not None:
            y = x[:, kernel - 1 :] * weight[-1]
            for back in range(1, kernel):
                y = torch.addcmul(y, earlier.shifted(x, back), weight[kernel - 1 - back])
            return y, earlier.tail(x)
        # a sum of shifted products: on a CPU many times faster than conv1d with as many groups as channels
        y = x[:, :n] * weight[0]
        for shift in range(1, kernel):
            y = torch.addcmul(y, x[:, shift : shift + n], weight[shift])
        return y, x[:, n:].clone()


class UnitNorm(nn.Module):
    """x / |x| over the last dim; zero stays zero."""

    def forward(self, x: Tensor) -> Tensor:
        return unit_norm(x)[0]


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}


@dataclass(frozen=True)
class ProjectionConfig:
    """The keywords of NeuralMemory that concern projections. heads: heads of all pages."""

    dim: int
    heads: int
    dim_head: int
    kv_per_token: int
    activation: Callable[[Tensor], Tensor] | None
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    qk_l2norm: bool
    conv_kernel: int | None
    output_gate: str | None

    def __post_init__(self):
        callable_or_none(self.activation, "activation")
        if self.conv_kernel is not None:
            positive_int(self.conv_kernel, "qkv_conv_kernel")
        if self.qk_l2norm and self.qk_rmsnorm:
            raise ValueError("qk_l2norm cannot be combined with qk_rmsnorm")
        if self.output_gate not in (None, *GATES):
            raise wrong("output_gate", self.output_gate, f"one of {', '.join(GATES)}, or None")


class Projections(nn.Module):
    """Queries, keys, values and output of a memory with `config.heads` heads."""

    def __init__(self, config: ProjectionConfig):
        super().__init__()
        o = self.config = config
        inner = o.heads * o.dim_head
        self.activation = nn.Identity() if o.activation is None else o.activation
        self.to_queries = nn.Linear(o.dim, inner, bias=False)
        self.to_keys = nn.Linear(o.dim, inner * o.kv_per_token, bias=False)
        self.to_values = nn.Linear(o.dim, inner * o.kv_per_token, bias=False)
        self.retrieve_norm = RMSNorm(o.dim) if o.pre_rmsnorm else nn.Identity()
        self.store_norm = RMSNorm(o.dim) if o.pre_rmsnorm else nn.Identity()

        def head_norm(used):
            return MultiheadRMSNorm(o.dim_head, o.heads) if used else nn.Identity()

        self.q_norm, self.k_norm = (UnitNorm() if o.qk_l2norm else head_norm(o.qk_rmsnorm) for _ in range(2))
        gated = o.output_gate is not None
        self.multihead_rmsnorm = head_norm(o.post_rmsnorm or gated)
        gates = inner if gated else o.heads if o.heads > 1 else 0
        self.retrieve_gate = nn.Linear(o.dim, gates, bias=False) if gates else None
        self.gate_activation: Callable[[Tensor], Tensor] = GATES[o.output_gate or "sigmoid"]
        self.combine_heads = nn.Linear(inner, o.dim, bias=False) if gates or inner != o.dim else nn.Identity()
        self.queries_conv: CausalConv | None = None
        self.keys_conv: CausalConv | None = None
        self.values_conv: CausalConv | None = None

    def add_convolutions(self) -> None:
        """Create the convolutions. Optional parameters are created last, so that they do not change how the others are
        initialised."""
        if (kernel := self.config.conv_kernel) is not None:
            width, wide = self._widths
            self.queries_conv = CausalConv(width, kernel)
            self.keys_conv, self.values_conv = CausalConv(wide, kernel), CausalConv(wide, kernel)

    @property
    def looks_back(self) -> int:
        """Number of earlier tokens that a query, key and value depend on."""
        return 0 if self.config.conv_kernel is None else self.config.conv_kernel - 1

    @property
    def _widths(self) -> tuple[int, int]:
        """Channels of the queries, and of the keys (and values)."""
        inner = self.config.heads * self.config.dim_head
        return inner, inner * self.config.kv_per_token

    def conv_tails(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the convolutions' fields of the state: field -> (tokens, channels), (0, 0) without."""
        width, wide = self._widths
        used = self.queries_conv is not None
        return {
            "query_conv": (self.looks_back, width) if used else (0, 0),
            "store_conv": (self.looks_back, 2 * wide) if used else (0, 0),
        }

    def keys_and_values(
        self,
        key_view: Tensor,
        value_view: Tensor,
        chunk: int,
        before: Tensor | None,
        earlier: EarlierTokens | None = None,
    ):
        """Project normalised views [b m*c d] of complete chunks. Returns keys and values, each [(b h) m c*u d], and the
        last inputs of both convolutions [b k-1 2w].
        """
        before_keys, before_values = (None, None) if before is None else before.chunk(2, dim=-1)
        keys, keys_tail = _mapped(key_view, self.to_keys, self.keys_conv, self.activation, before_keys, earlier)
        values, values_tail = _mapped(
            value_view, self.to_values, self.values_conv, self.activation, before_values, earlier
        )
        keys = self.k_norm(at_least_float32(self._by_chunk(keys, chunk)))
        values = at_least_float32(self._by_chunk(values, chunk))
        tail = None if keys_tail is None else torch.cat((keys_tail, values_tail), dim=-1)
        return keys.flatten(0, 1), values.flatten(0, 1), tail

    def _by_chunk(self, x: Tensor, chunk: int) -> Tensor:
        """[b m*c h*u*d] -> [b h m c*u d]"""
        x = x.unflatten(1, (-1, chunk)).unflatten(-1, (self.config.heads, self.config.kv_per_token, -1))
        return x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)

    def queries(
        self, tokens: Tensor, before: Tensor | None, earlier: EarlierTokens | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Project normalised tokens [b n d] to (queries [b h n d], the last inputs of the convolution [b k-1 w])."""
        x, tail = _mapped(tokens, self.to_queries, self.queries_conv, self.activation, before, earlier)
        x = x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        return self.q_norm(at_least_float32(x)), tail

    def output(self, read: Tensor, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Join the reads of the heads [b h n d] to the output [b n d]. tokens: the normalised tokens [b n d].

        hidden: bool [b h n], True for heads that a token does not read (other pages); None: every token reads all.
        """
        read = self.multihead_rmsnorm(read.to(tokens.dtype))
        if self.retrieve_gate is not None:
            gate = self.gate_activation(self.retrieve_gate(tokens))
            read = read * gate.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        if hidden is not None:
            read = read.masked_fill(hidden.unsqueeze(-1), 0.0)
        return self.combine_heads(read.transpose(1, 2).flatten(2))


def _mapped(x: Tensor, linear: nn.Module, conv: CausalConv | None, activation, before: Tensor | None, earlier):
    """Apply the linear map, its convolution and the activation to tokens [b n d]. Returns ([b n w], the convolution's
    last inputs).
    """
    x = linear(x)
    if conv is not None:
        x, before = conv(x, before, earlier)
    return activation(x), before
