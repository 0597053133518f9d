"""Residual streams (hyper-connections, arXiv 2409.19606; manifold-constrained, arXiv 2512.24880).

The only place that knows how streams are mixed. With one stream a connection is a plain residual.

ein letters: b batch, s streams, n tokens, d features
"""

from collections.abc import Callable

from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import nn

from .checks import positive_int


def residual_streams(num_streams: int, dim: int) -> tuple[Callable[..., nn.Module], nn.Module, nn.Module]:
    """Three things: a maker of connections, [b n d] -> streams [(b s) n d], and back (their sum).

    `connection(streams)` gives a branch's input [b n d] and a function that adds the branch's output [b n d] to the
    streams. `make(layer_index = i)` makes one that at first reads stream i mod s; `add_branch_out_to_residual = False`
    leaves the depth half out, for a branch whose output is used elsewhere.
    """
    positive_int(num_streams, "num_residual_streams")
    return mc_get_init_and_expand_reduce_stream_functions(
        num_streams, dim=dim, add_stream_embed=True, disable=num_streams == 1
    )
