"""Residual streams: manifold-constrained hyper-connections (arXiv 2512.24880, after arXiv 2409.19606).

The only place that knows how streams are mixed. In place of one residual x + f(x) there are s streams. A branch reads a
mixture of them and writes its output to each, and in between the streams are mixed with one another:

    f reads sum_i pre_i x_i        x_j becomes sum_i mix_ij x_i + post_j f(..)

All three come from the streams themselves, token by token: with p = RMSNorm(x_i) times a learned matrix, scaled by
learned numbers and added to learned constants, pre = sigmoid(p), post = 2 sigmoid(p), and mix is the doubly stochastic
matrix that Sinkhorn-Knopp makes of exp(p) (eq. 7 and 8). Parameters have the names, start values and meaning of the
hyper-connections package, so that state dicts fit. With one stream a connection is a plain residual.

ein letters: b batch, s (or i, j) streams, n tokens, N = b n, d features, k coefficients per stream
"""

from array import array
from collections.abc import Callable
from functools import partial
from math import tanh

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import positive_int
from titans_pytorch.ops import streams
from titans_pytorch.ops.modes import at_least_float32, no_autocast, plain_only
from titans_pytorch.ops.sinkhorn import sinkhorn, sinkhorn_numbers

FEW = 4  # tokens, up to which Python's arithmetic on the coefficients is faster than kernels
START_SCALE = 0.01

Add = Callable[[Tensor], Tensor]


def residual_streams(num_streams: int, dim: int) -> tuple[Callable[..., nn.Module], nn.Module, nn.Module]:
    """Three things: a maker of connections, [b n d] -> streams [b n s d], and back (their sum).

    `connection(streams)` gives a branch's input [b n d] and a function that adds the branch's output [b n d] to the
    streams. `make(layer_index = i)` makes one that at first reads stream i mod s; `add_branch_out_to_residual = False`
    leaves the depth half out, for a branch whose output is used elsewhere.
    """
    positive_int(num_streams, "num_residual_streams")
    if num_streams == 1:
        return PlainResidual, nn.Identity(), nn.Identity()
    return partial(HyperConnection, num_streams, dim), StreamEmbed(num_streams, dim), SumStreams()


class StreamEmbed(nn.Module):
    """[b n d] -> [b n s d]: a copy for each stream, plus what tells it from the others, zero at first."""

    def __init__(self, num_streams: int, dim: int):
        super().__init__()
        self.stream_embed = nn.Parameter(torch.zeros(num_streams, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) + self.stream_embed.to(x.dtype)


class SumStreams(nn.Module):
    """[b n s d] -> [b n d]"""

    def forward(self, streams: Tensor) -> Tensor:
        return streams.sum(dim=2)


class PlainResidual(nn.Module):
    """The branch reads x [b n d] and its output is added to it."""

    def __init__(self, layer_index: int, add_branch_out_to_residual: bool = True):
        super().__init__()

    def forward(self, x: Tensor) -> tuple[Tensor, Add]:
        return x, x.__add__


class Gain(nn.Module):
    """gamma [d] of an RMSNorm that multiplies by gamma + 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))


class HyperConnection(nn.Module):
    """streams [b n s d] -> a branch's input [b n d], and a function from its output to the next streams.

    At first the branch reads mostly stream `layer_index` mod s, and the streams keep mostly to themselves.
    """

    def __init__(self, num_streams: int, dim: int, layer_index: int, add_branch_out_to_residual: bool = True):
        super().__init__()
        own = torch.zeros(num_streams, 1)
        own[layer_index % num_streams] = 1.0
        # column 0 of alpha: pre, the others: mix; beta: post
        self.static_alpha = nn.Parameter(torch.cat((own, torch.eye(num_streams)), dim=1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(1, dim, num_streams + 1))
        self.pre_branch_scale = nn.Parameter(torch.tensor([START_SCALE]))
        self.residual_scale = nn.Parameter(torch.tensor([START_SCALE]))
        if add_branch_out_to_residual:
            self.static_beta = nn.Parameter(torch.ones(num_streams))
            self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
            self.h_post_scale = nn.Parameter(torch.tensor(START_SCALE))
        self.adds = add_branch_out_to_residual
        self.norm = Gain(dim)

    def forward(self, before: Tensor) -> tuple[Tensor, Add]:
        b, n, s, d = before.shape
        with no_autocast(before.device):
            x = at_least_float32(before).reshape(b * n, s, d)
            few = b * n <= FEW and s == 4 and x.device.type == "cpu" and not torch.is_grad_enabled()
            if few and self.adds and not plain_only():
                branch, write = self._connect_few(x)
            else:
                branch, write = self._connect(x)

        def add(out: Tensor) -> Tensor:
            with no_autocast(out.device):
                return write(out.to(x.dtype).reshape(b * n, d)).to(before.dtype).view(b, n, s, d)

        return branch.to(before.dtype).view(b, n, d), add

    def _connect(self, x: Tensor) -> tuple[Tensor, Add]:
        """x [N s d] -> the branch's input [N d], and [N d] -> [N s d]."""
        alpha, beta, x = self._coefficients(x)
        branch, x = streams.read(x, alpha[0].sigmoid())

        def write(out: Tensor) -> Tensor:
            mix = sinkhorn(alpha[1:].permute(2, 0, 1).contiguous())
            return streams.write(x, mix.permute(2, 1, 0).contiguous(), beta.sigmoid() * 2.0, out)

        return branch, write

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Before sigmoid and Sinkhorn: alpha [s+1 N s] and beta [N s]; and x again (see `streams.project`)."""
        s, d = x.shape[1:]
        weight, static = [self.dynamic_alpha_fn[0].t()], [self.static_alpha.t()]
        scale = [self.pre_branch_scale, self.residual_scale.expand(s)]
        if self.adds:
            weight.append(self.dynamic_beta_fn.unsqueeze(0))
            static.append(self.static_beta.unsqueeze(0))
            scale.append(self.h_post_scale.unsqueeze(0))
        weight, static, scale = (torch.cat(parts).to(x.dtype) for parts in (weight, static, scale))
        product, x = streams.project(x, weight * ((self.norm.gamma.to(x.dtype) + 1.0) * d**0.5))
        product = torch.addcmul(static.unsqueeze(1), product, scale[:, None, None])
        return product[: s + 1], product[s + 1] if self.adds else None, x

    def _connect_few(self, x: Tensor) -> tuple[Tensor, Add]:
        """The same for a few tokens: 24 coefficients each, in plain numbers."""
        tokens, s, d = x.shape
        gained = torch.addcmul(x, x, self.norm.gamma.to(x.dtype)).view(-1, d)
        alphas = (gained @ self.dynamic_alpha_fn[0].to(x.dtype)).tolist()
        betas = (gained @ self.dynamic_beta_fn.to(x.dtype)).tolist()
        gains = (d**0.5 / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)).flatten().tolist()
        static_alpha, static_beta = self.static_alpha.tolist(), self.static_beta.tolist()
        pre_scale, mix_scale = self.pre_branch_scale.item(), self.residual_scale.item()
        post_scale = self.h_post_scale.item()

        numbers = []  # per token [6 4]: pre, mix transposed, post
        for row in range(0, tokens * s, s):
            pre, mix, post = [], [], []
            for i in range(s):
                gain, (constant, *constants), (p, *ps) = gains[row + i], static_alpha[i], alphas[row + i]
                pre.append(_sigmoid(constant + pre_scale * gain * p))
                post.append(2.0 * _sigmoid(static_beta[i] + post_scale * gain * betas[row + i]))
                gain *= mix_scale
                mix.append([c + gain * p for c, p in zip(constants, ps, strict=True)])
            numbers += pre
            for column in zip(*sinkhorn_numbers(mix), strict=True):
                numbers += column
            numbers += post
        code = "d" if x.dtype == torch.float64 else "f"
        matrix = torch.frombuffer(array(code, numbers), dtype=x.dtype).view(tokens, s + 2, s)
        mixed = matrix[:, : s + 1] @ x

        def write(out: Tensor) -> Tensor:
            return torch.addcmul(mixed[:, 1:], matrix[:, s + 1].unsqueeze(2), out.unsqueeze(1))

        return mixed[:, 0], write


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * tanh(0.5 * x)
