"""Residual streams: manifold-constrained hyper-connections (arXiv 2512.24880), from the package hyper-connections.

In place of one residual x + f(x) there are s streams. A branch reads a mixture of them and writes its output to each;
in between the streams are mixed with one another, by a doubly stochastic matrix per token.

Letters: b batch, s streams, n tokens, d features
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from hyper_connections import ManifoldConstrainedHyperConnections, mc_get_init_and_expand_reduce_stream_functions
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from titans_pytorch.common.checks import positive_int
from titans_pytorch.ops.modes import no_autocast

Add = Callable[[Tensor], Tensor]


def residual_streams(num_streams: int, dim: int) -> tuple[Callable[..., nn.Module], nn.Module, nn.Module]:
    """Return three things: a maker of connections, [b n d] -> streams [(b s) n d], and back (their sum).

    `connection(streams)` returns a branch's input [b n d] and a function that adds the branch's output [b n d] to the
    streams. `make(layer_index=i)` makes one that at first reads stream i mod s. `add_branch_out_to_residual=False`
    leaves out the way back, for a branch whose output is used elsewhere. With one stream it is a plain residual.
    """
    alone = positive_int(num_streams, "num_residual_streams") == 1
    make, expand, reduce = mc_get_init_and_expand_reduce_stream_functions(
        num_streams, dim=dim, add_stream_embed=True, disable=alone
    )
    return make if alone else partial(HyperConnection, num_streams, dim=dim), expand, reduce


class HyperConnection(ManifoldConstrainedHyperConnections):
    """The package's connection, without autocast, and in float64 for float64 input: the package always computes in
    float32. streams [(b s) n d] -> a branch's input [b n d], and a function from its output to the next
    streams."""

    def forward(self, streams: Tensor) -> tuple[Tensor, Add]:
        with _precisely(streams):
            branch, add = super().forward(streams)

        def add_out(out: Tensor) -> Tensor:
            with _precisely(streams):
                return add(out)

        return branch, add_out


class _KeepDouble(TorchFunctionMode):
    """Within this mode `Tensor.float()` keeps float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _precisely(x: Tensor) -> AbstractContextManager:
    return _KeepDouble() if x.dtype == torch.float64 else no_autocast(x.device)  # autocast casts no float64
