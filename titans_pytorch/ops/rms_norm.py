"""RMSNorm with its way back written out: PyTorch has a kernel for it on accelerators only, and on a CPU makes a dozen
passes over a sequence of four.

Letters: N tokens, d features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.modes import in_transform, naive_gradients, without_autocast


def naive_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x [.. d] over the root of its mean square over d, times weight [d]; eps: that of the dtype unless given."""
    own = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    if weight is not None and weight.dtype != x.dtype:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    if not own:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if in_transform():
        return naive_rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _value(x, weight, eps)[0]


def _value(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * scale
    return (y if weight is None else y.mul_(weight)), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _value(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            inputs = (x,) if weight is None else (x, weight)
            grads = naive_gradients(lambda x, weight=None: naive_rms_norm(x, weight, ctx.eps), inputs, grad)
            return *grads, *(None,) * (3 - len(inputs))
        d = x.shape[-1]
        along = grad * x
        if weight is None:
            d_weight, turned, along = None, grad * scale, along.sum(dim=-1, keepdim=True)
        else:
            rows = along.view(-1, d)
            d_weight = (scale.view(1, -1) @ rows).view(d)
            turned, along = (grad * weight).mul_(scale), (rows @ weight).view(scale.shape)
        d_x = turned.addcmul_(x, along.mul_(scale.pow(3)), value=-1.0 / d)
        return d_x, d_weight, None
