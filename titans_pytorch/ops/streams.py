"""What a hyper-connection does to residual streams x [N s d], in three steps, each with its way back:

    project   learned products of every stream, from which all coefficients come
    read      a branch's input, a mixture of the streams
    write     the next streams: these mixed with one another, and the branch's output added to each

The streams are the largest tensors of a transformer, and new memory costs more than arithmetic on it. So `project` and
`read` hand x on to the step behind them, whose gradient of x they then add theirs to, in place: one buffer on the way
back, as there is one on the way forward, the next streams.

Letters: N tokens, s (or i, j) streams, d features, k rows of a weight
"""

import torch
from torch import Tensor

from titans_pytorch.ops.modes import naive_gradients, plain_only, without_autocast

TINY = 1e-12  # the least length that x is divided by


def naive_project(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("kd,nsd->kns", weight, x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=TINY))


def naive_read(x: Tensor, pre: Tensor) -> Tensor:
    return torch.einsum("ni,nid->nd", pre, x)


def naive_write(x: Tensor, mix: Tensor, post: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("nji,nid->njd", mix, x) + torch.einsum("nj,nd->njd", post, out)


def project(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [k d] times every stream brought to length one: [k N s]; and x, for `read`."""
    return (naive_project(x, weight), x) if plain_only() else _Project.apply(x, weight)


def read(x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i pre_i x_i, pre [N s] -> [N d]; and x, for `write`. x is what `project` handed on."""
    return (naive_read(x, pre), x) if plain_only() else _Read.apply(x, pre)


def write(x: Tensor, mix: Tensor, post: Tensor, out: Tensor) -> Tensor:
    """sum_i mix_ji x_i + post_j out, mix [N j i], post [N s], out [N d] -> [N s d]. x is what `read` handed on."""
    return naive_write(x, mix, post, out) if plain_only() else _Write.apply(x, mix, post, out)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        norm = torch.linalg.vector_norm(x, dim=-1).clamp_(min=TINY)
        product = (weight @ x.view(-1, x.shape[2]).t()).view(-1, *norm.shape).div_(norm)
        ctx.save_for_backward(x, weight, product, norm)
        return product, x.view_as(x)

    @staticmethod
    @without_autocast
    def backward(ctx, grad, d_x):
        x, weight, product, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            first, d_weight = naive_gradients(naive_project, (x, weight), grad)
            return first + d_x, d_weight
        grad = grad / norm
        along = (grad * product).sum(dim=0).div_(norm).masked_fill_(norm == TINY, 0.0)
        grad = grad.flatten(1)
        d_x.addcmul_(x, along.unsqueeze(2), value=-1.0)  # the product does not change along x
        d_x.view(-1, x.shape[2]).addmm_(grad.t(), weight)
        return d_x, grad @ x.view(-1, x.shape[2])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pre):
        ctx.save_for_backward(x, pre)
        return torch.bmm(pre.unsqueeze(1), x).squeeze(1), x.view_as(x)

    @staticmethod
    @without_autocast
    def backward(ctx, grad, d_x):
        x, pre = ctx.saved_tensors
        if torch.is_grad_enabled():
            first, d_pre = naive_gradients(naive_read, (x, pre), grad)
            return first + d_x, d_pre
        d_pre = torch.bmm(grad.unsqueeze(1), x.transpose(1, 2)).squeeze(1)
        return d_x.addcmul_(pre.unsqueeze(2), grad.unsqueeze(1)), d_pre


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mix, post, out):
        ctx.save_for_backward(x, mix, post, out)
        return torch.bmm(mix, x).addcmul_(post.unsqueeze(2), out.unsqueeze(1))

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        x, mix, post, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return naive_gradients(naive_write, (x, mix, post, out), grad)
        d_mix = torch.bmm(grad, x.transpose(1, 2))
        d_post = torch.bmm(out.unsqueeze(1), grad.transpose(1, 2)).squeeze(1)
        d_out = torch.bmm(post.unsqueeze(1), grad).squeeze(1)
        return torch.bmm(mix.transpose(1, 2), grad), d_mix, d_post, d_out
