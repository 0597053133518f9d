"""A hyper-connection for a few tokens.

What depends on parameters alone is computed once. The 24 coefficients of a token are computed in Python numbers:
launching a kernel takes longer than all of the arithmetic.

Letters: N tokens, s (or i, j) streams, d features, k coefficients per stream
"""

import math
from array import array
from collections.abc import Callable, Sequence

import torch
from hyper_connections.manifold_constrained_hyper_connections import StreamEmbed
from torch import Tensor, nn

from titans_pytorch.layers.residual_streams import HyperConnection

CODES = {torch.float32: "f", torch.float64: "d"}
STREAMS = 4  # the Sinkhorn iterations below are written out for so many
TINY = 1e-12  # eps: the package divides a stream by at least this length
ITERATIONS = 20  # iterations of Sinkhorn-Knopp, the package's default
STILL = 1e-15  # relative change of a scaling: less than rounding
DEPTH = 60.0  # logits are clamped to this distance below the largest of their column, so that scalings stay finite


class FewTokens:
    """`read` and `write` of a HyperConnection whose parameters stay constant. Streams are [(N s) 1 d], a
    branch's input and output [N 1 d], in float32 or float64, on the CPU."""

    def __init__(self, connection: HyperConnection):
        scale = connection.norm.gamma.numel() ** 0.5 * (connection.norm.gamma + 1.0)
        parts: list[Tensor] = [connection.dynamic_alpha_fn[0][:, :1] * connection.pre_branch_scale]
        parts.append(connection.dynamic_alpha_fn[0][:, 1:] * connection.residual_scale)
        static: list[Tensor] = [connection.static_alpha]
        self.adds = connection.add_branch_out_to_residual
        if self.adds:
            parts.append(connection.dynamic_beta_fn.unsqueeze(1) * connection.h_post_scale)
            static.append(connection.static_beta.unsqueeze(1))
        self.weight = torch.cat(parts, dim=1) * scale.unsqueeze(1)  # [d k]
        self.static = torch.cat(static, dim=1).tolist()  # [s k]
        self.code = CODES[self.weight.dtype]

    def read(self, x: Tensor) -> tuple[Tensor, tuple]:
        """Return the branch's input, and the coefficients for `write`."""
        s, d = STREAMS, x.shape[-1]
        n = x.shape[0] // s
        flat = x.view(n * s, d)
        products = torch.mm(flat, self.weight).tolist()
        norms = torch.linalg.vector_norm(flat, dim=-1).tolist()
        numbers: list[float] = []
        posts: list[float] = []
        for at in range(0, n * s, s):
            mix = []
            for constants, product, norm in zip(self.static, products[at : at + s], norms[at : at + s], strict=True):
                gain = 1.0 / (norm if norm > TINY else TINY)
                pre, *row = [c + gain * p for c, p in zip(constants, product)]  # noqa: B905
                numbers.append(0.5 + 0.5 * math.tanh(0.5 * pre))
                if self.adds:
                    posts.append(1.0 + math.tanh(0.5 * row.pop()))
                mix.append(row)
            for column in sinkhorn_columns(mix):
                numbers += column
        matrix = torch.frombuffer(array(self.code, numbers), dtype=x.dtype).view(n, s + 1, s)
        mixed = torch.bmm(matrix, flat.view(n, s, d))
        return mixed[:, :1], (mixed, posts)

    def write(self, read: tuple, out: Tensor) -> Tensor:
        """Return the next streams, with the branch's output `out` added."""
        mixed, posts = read
        post = torch.frombuffer(array(self.code, posts), dtype=out.dtype).view(out.shape[0], STREAMS, 1)
        return torch.addcmul(mixed[:, 1:], post, out).view(-1, 1, out.shape[-1])


class AsModule:
    """`read` and `write` of any connection, by its own call."""

    def __init__(self, connection: nn.Module):
        self.connection = connection

    def read(self, x):
        return self.connection(x)

    def write(self, add, out):
        return add(out)


def connection_step(connection: nn.Module) -> FewTokens | AsModule:
    if isinstance(connection, HyperConnection) and connection.num_residual_streams == STREAMS:
        return FewTokens(connection)
    return AsModule(connection)


def streams_step(expand: nn.Module, reduce: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return `expand` and `reduce` of one token, x [b 1 d] to streams [(b s) 1 d] and back, at less cost."""
    if not isinstance(expand, StreamEmbed):
        return expand, reduce
    embed = expand.stream_embed
    s, d = embed.shape
    return lambda x: (x + embed).view(-1, 1, d), lambda x: x.view(-1, s, d).sum(dim=1, keepdim=True)


def sinkhorn_columns(logits: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the columns of a doubly stochastic matrix from rows of logits [4 4].

    `ITERATIONS` times each column is divided by its sum, then each row by its sum. It stops when an iteration changes
    nothing. The result is u_i K_ij v_j, with K the exponentials and u, v two vectors of scalings."""
    if max(map(max, logits)) < DEPTH / 2 and min(map(min, logits)) > -DEPTH / 2:  # a common factor of a column cancels
        columns = [list(map(math.exp, column)) for column in zip(*logits, strict=True)]
    else:
        columns = [[math.exp(max(x - max(column), -DEPTH)) for x in column] for column in zip(*logits, strict=True)]
    (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3) = columns
    u0 = u1 = u2 = u3 = 1.0
    for _ in range(ITERATIONS):
        before = u0, u1, u2, u3
        v0 = 1.0 / (a0 * u0 + a1 * u1 + a2 * u2 + a3 * u3)
        v1 = 1.0 / (b0 * u0 + b1 * u1 + b2 * u2 + b3 * u3)
        v2 = 1.0 / (c0 * u0 + c1 * u1 + c2 * u2 + c3 * u3)
        v3 = 1.0 / (d0 * u0 + d1 * u1 + d2 * u2 + d3 * u3)
        u0 = 1.0 / (a0 * v0 + b0 * v1 + c0 * v2 + d0 * v3)
        u1 = 1.0 / (a1 * v0 + b1 * v1 + c1 * v2 + d1 * v3)
        u2 = 1.0 / (a2 * v0 + b2 * v1 + c2 * v2 + d2 * v3)
        u3 = 1.0 / (a3 * v0 + b3 * v1 + c3 * v2 + d3 * v3)
        if max(abs(u0 - before[0]), abs(u1 - before[1]), abs(u2 - before[2]), abs(u3 - before[3])) < STILL * u0:
            break
    u, v = (u0, u1, u2, u3), (v0, v1, v2, v3)
    return [[a * x * b for a, x in zip(u, column)] for b, column in zip(v, columns)]  # noqa: B905
