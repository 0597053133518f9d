"""Values together with their vector-Jacobian products, as ordinary differentiable operations.

Each function returns (y, back): back(dy) is dy times the Jacobian of y with respect to the input. A memory's surprise
is such a product, and the training loss differentiates through it once more; written out like this that takes no
higher-order autograd, so activation checkpointing, hooks, torch.compile and inference_mode all work.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.modes import in_transform, naive_gradients, without_autocast

NORMAL = 1.0 / math.sqrt(2.0 * math.pi)


class _GeluSlope(torch.autograd.Function):
    """grad * gelu'(x) in one fused pass; its own backward needs gelu'' = phi(x) (2 - x^2) only."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.gelu_backward(grad, x)

    @staticmethod
    @without_autocast
    def backward(ctx, up):
        grad, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            square = x.square()
            curve = (2.0 - square) * (square * -0.5).exp() * NORMAL
            return _GeluSlope.apply(up, x), up * grad * curve
        # the same with two buffers: gelu'' = (2 - x^2) phi(x)
        square = x * x
        curve = (square * -0.5).exp_()
        curve.mul_(square.neg_().add_(2.0)).mul_(grad).mul_(up).mul_(NORMAL)
        return torch.ops.aten.gelu_backward(up, x), curve


def naive_gelu(x: Tensor):
    def back(dy):
        return dy * (0.5 * (1.0 + (x * math.sqrt(0.5)).erf()) + x * (x.square() * -0.5).exp() * NORMAL)

    return F.gelu(x), back


def gelu(x: Tensor):
    if in_transform():
        return naive_gelu(x)

    def back(dy):
        return _GeluSlope.apply(dy, x) if torch.is_grad_enabled() else torch.ops.aten.gelu_backward(dy, x)

    return F.gelu(x), back


def sigmoid(x: Tensor):
    y = x.sigmoid()
    return y, lambda dy: dy * (y * (1.0 - y))


def silu(x: Tensor):
    s = x.sigmoid()
    return x * s, lambda dy: dy * (s * (1.0 + x * (1.0 - s)))


def elu_plus_one(x: Tensor):
    """exp(x) below zero, x + 1 above."""
    below = x.clamp(max=0.0).exp()
    return below + x.clamp(min=0.0), lambda dy: dy * below


def monomials(x: Tensor, degree: int):
    """All monomials of x [.. d] up to degree 1 or 2, scaled so that products of two of these are 1 + q . k (+ (q . k)^2
    / 2): 1, x, then x_i x_j for i <= j."""
    one = x[..., :1] * 0.0 + 1.0
    if degree == 1:
        return torch.cat((one, x), dim=-1), lambda dy: dy[..., 1:]
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    # (q . k)^2 / 2 counts each mixed product twice
    scale = torch.ones(len(i), dtype=x.dtype, device=x.device).masked_fill(i == j, math.sqrt(0.5))
    y = torch.cat((one, x, x[..., i] * x[..., j] * scale), dim=-1)

    def back(dy):
        rest = dy[..., 1 + d :] * scale
        of_first, of_second = rest * x[..., j], rest * x[..., i]
        return dy[..., 1 : 1 + d].index_add(-1, i, of_first).index_add(-1, j, of_second)

    return y, back


class _LayerNormSlope(torch.autograd.Function):
    """The way back of LayerNorm, r (g - mean(g) - y mean(g y)) with y the normalised x and r one over its deviation, in
    one fused pass. It is its own transpose in g."""

    @staticmethod
    def forward(ctx, grad, x, mean, rstd):
        out = _layer_norm_backward(grad, x, mean, rstd)
        ctx.save_for_backward(grad, x, mean, rstd, out)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, up):
        grad, x, mean, rstd, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            return *naive_gradients(lambda dy, x: naive_layer_norm(x)[1](dy), (grad, x), up), None, None
        d = x.shape[-1]
        y = (x - mean).mul_(rstd)
        of_grad, of_up = ((t * y).sum(dim=-1, keepdim=True).div_(d) for t in (grad, up))
        d_y = (up * of_grad).addcmul_(grad, of_up).mul_(rstd).neg_()
        of_rstd = (up * out).sum(dim=-1, keepdim=True).mul_(rstd).div_(d)
        d_x = _layer_norm_backward(d_y, x, mean, rstd).addcmul_(y, of_rstd, value=-1.0)
        return _layer_norm_backward(up, x, mean, rstd), d_x, None, None


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    shape = x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, shape, mean, rstd, None, None, [True, False, False]
    )[0]


def naive_layer_norm(x: Tensor, eps: float = 1e-5):
    centred = x - x.mean(dim=-1, keepdim=True)
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd

    def back(dy):
        return rstd * (dy - dy.mean(dim=-1, keepdim=True) - y * (dy * y).mean(dim=-1, keepdim=True))

    return y, back


def layer_norm(x: Tensor, eps: float = 1e-5):
    """LayerNorm over the last dim, without affine parameters."""
    if in_transform():
        return naive_layer_norm(x, eps)
    x = x.contiguous()
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)

    def back(dy):
        slope = _LayerNormSlope.apply if torch.is_grad_enabled() else _layer_norm_backward
        return slope(dy, x, mean.detach(), rstd.detach())

    return y, back


def unit_norm(x: Tensor, eps: float = 1e-12):
    """x / |x|, smooth at zero."""
    inverse = (x.square().sum(dim=-1, keepdim=True) + eps).rsqrt()
    y = x * inverse
    return y, lambda dy: inverse * (dy - y * (dy * y).sum(dim=-1, keepdim=True))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float):
    """softmax(scale q k^T, causal) v over [... n d]; back(dy) gives (dq, dk, dv).

    Explicit products: the fused CPU kernel has no second derivative.
    """
    n = q.shape[-2]
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    probs = (scale * q @ k.transpose(-1, -2)).masked_fill(mask, -torch.inf).softmax(dim=-1)

    def back(dy):
        dprobs = dy @ v.transpose(-1, -2)
        dscores = scale * probs * (dprobs - (dprobs * probs).sum(dim=-1, keepdim=True))
        return dscores @ k, dscores.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ dy

    return probs @ v, back
