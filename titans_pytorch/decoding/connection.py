"""A hyper-connection for a few tokens: what depends on parameters alone is computed once, and the 24 coefficients of a
token in plain numbers, where launching a kernel takes longer than all of the arithmetic.

Letters: N tokens, s (or i, j) streams, d features, k coefficients per stream
"""

from array import array
from math import tanh

import torch
from torch import Tensor, nn

from titans_pytorch.layers.residual_streams import HyperConnection
from titans_pytorch.ops.sinkhorn import sinkhorn_columns
from titans_pytorch.ops.streams import TINY

CODES = {torch.float32: "f", torch.float64: "d"}


class FewTokens:
    """`read` and `write` of a HyperConnection, whose parameters do not change meanwhile. Streams are [N 1 s d], a
    branch's input and output [N 1 d], in float32 or float64, on the CPU."""

    def __init__(self, connection: HyperConnection):
        scale = connection.norm.gamma.numel() ** 0.5 * (connection.norm.gamma + 1.0)
        streams = connection.static_alpha.shape[0]
        parts = [connection.dynamic_alpha_fn[0][:, :1] * connection.pre_branch_scale]
        parts.append(connection.dynamic_alpha_fn[0][:, 1:] * connection.residual_scale)
        static = [connection.static_alpha]
        if connection.adds:
            parts.append(connection.dynamic_beta_fn.unsqueeze(1) * connection.h_post_scale)
            static.append(connection.static_beta.unsqueeze(1))
        self.weight = torch.cat(parts, dim=1) * scale.unsqueeze(1)  # [d k]
        self.static = torch.cat(static, dim=1).tolist()  # [s k]
        self.streams, self.adds, self.code = streams, connection.adds, CODES[self.weight.dtype]

    def read(self, x: Tensor) -> tuple[Tensor, tuple]:
        """The branch's input, and what `write` needs."""
        n, _, s, d = x.shape
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
                numbers.append(0.5 + 0.5 * tanh(0.5 * pre))
                if self.adds:
                    posts.append(1.0 + tanh(0.5 * row.pop()))
                mix.append(row)
            for column in sinkhorn_columns(mix):
                numbers += column
        matrix = torch.frombuffer(array(self.code, numbers), dtype=x.dtype).view(n, s + 1, s)
        mixed = torch.bmm(matrix, flat.view(n, s, d))
        return mixed[:, :1], (mixed, posts)

    def write(self, read: tuple, out: Tensor) -> Tensor:
        mixed, posts = read
        post = torch.frombuffer(array(self.code, posts), dtype=out.dtype).view(out.shape[0], self.streams, 1)
        return torch.addcmul(mixed[:, 1:], post, out).unsqueeze(1)


class AsModule:
    """The same two calls of any connection."""

    def __init__(self, connection: nn.Module):
        self.connection = connection

    def read(self, x):
        return self.connection(x)

    def write(self, add, out):
        return add(out)


def connection_step(connection: nn.Module) -> FewTokens | AsModule:
    few = isinstance(connection, HyperConnection) and connection.static_alpha.shape[0] == 4
    return FewTokens(connection) if few else AsModule(connection)
