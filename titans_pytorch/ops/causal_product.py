"""Linear attention whose scores are weighted per chunk: how a memory is read that is never built.

Letters: B rows, G groups of r queries, m chunks of p keys, d and e features.
"""

import torch
from torch import Tensor

from titans_pytorch.ops.modes import naive_gradients, plain_only, under_autocast, without_autocast

BLOCK_TOKENS = 64  # queries that are taken together, and skip the same chunks


def naive_causal_product(x: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """sum over chunks j and pairs t of weights[g, j] (x_g . keys_jt) values_jt: x [B G*r d], keys [B m p d], values
    [B m p e], weights [B G m] -> [B G*r e]."""
    B, m, p = keys.shape[:3]
    G = weights.shape[1]
    scores = x.unflatten(1, (G, -1)) @ keys.flatten(1, 2).transpose(-1, -2).unsqueeze(1)  # [B G r m*p]
    scores = scores.unflatten(-1, (m, p)) * weights[:, :, None, :, None]
    return (scores.flatten(-2) @ values.flatten(1, 2).unsqueeze(1)).flatten(1, 2)


def causal_product(x: Tensor, keys: Tensor, values: Tensor, weights: Tensor, first: int | None = None) -> Tensor:
    """The same, in blocks of groups. With `first`, group g is known to see the chunks below first + g only, and each
    block skips the chunks that none of its groups sees."""
    if plain_only():  # blocks are a loop over a length
        return naive_causal_product(x, keys, values, weights.to(x.dtype))
    if under_autocast(x.device):  # once here: the backward pass runs outside autocast
        x, keys, values = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, keys, values))
    return _CausalProduct.apply(x, keys, values, weights, first)


class _CausalProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keys, values, weights, first):
        r, p = x.shape[1] // weights.shape[1], keys.shape[2]
        k, v = keys.flatten(1, 2), values.flatten(1, 2)
        outs, kept = [], []
        for rows, groups, seen, pairs in _blocks(r, keys, weights, first):
            if seen == 0:
                outs.append(x.new_zeros(x.shape[0], rows.stop - rows.start, v.shape[-1]))
                continue
            scores = x[:, rows] @ k[:, :pairs].transpose(-1, -2)
            outs.append((scores * _spread(weights[:, groups, :seen].to(x.dtype), r, p)) @ v[:, :pairs])
            kept.append(scores)
        ctx.save_for_backward(x, keys, values, weights, *kept)
        ctx.first = first
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        x, keys, values, weights, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            return *naive_gradients(naive_causal_product, (x, keys, values, weights), grad), None
        r, p = x.shape[1] // weights.shape[1], keys.shape[2]
        k, v = keys.flatten(1, 2), values.flatten(1, 2)
        dx, dw = torch.zeros_like(x), torch.zeros_like(weights)
        dk = dv = None
        # the last block sees most: the others add to what it leaves
        for rows, groups, seen, pairs in reversed(list(_blocks(r, keys, weights, ctx.first))):
            if seen == 0:
                continue
            part, slope, scores = x[:, rows], grad[:, rows], kept.pop()
            spread = _spread(weights[:, groups, :seen].to(x.dtype), r, p)
            dscores = slope @ v[:, :pairs].transpose(-1, -2)
            dw[:, groups, :seen] = _gather((dscores * scores).to(dw.dtype), r, p)
            dv = _accumulate(dv, (scores * spread).transpose(-1, -2) @ slope, v)
            dscores.mul_(spread)
            dx[:, rows] = dscores @ k[:, :pairs]
            dk = _accumulate(dk, dscores.transpose(-1, -2) @ part, k)
        dk, dv = (torch.zeros_like(t) if d is None else d for d, t in ((dk, k), (dv, v)))
        return dx, dk.view_as(keys), dv.view_as(values), dw, None


def _accumulate(total: Tensor | None, part: Tensor, like: Tensor) -> Tensor:
    """total with `part` added to its first rows; None is zeros."""
    if total is None:
        if part.shape == like.shape:
            return part
        total = torch.zeros_like(like)
    total[:, : part.shape[1]] += part
    return total


def _blocks(r, keys, weights, first):
    """(rows of x, groups, chunks seen, pairs seen) of each block."""
    G, (m, p) = weights.shape[1], keys.shape[1:3]
    size = G if first is None else max(1, BLOCK_TOKENS // r)
    for start in range(0, G, size):
        stop = min(G, start + size)
        seen = m if first is None else min(m, first + stop - 1)
        yield slice(start * r, stop * r), slice(start, stop), seen, seen * p


def _spread(weights: Tensor, r: int, p: int) -> Tensor:
    """[B G m] -> [B G*r m*p]."""
    weights = weights.repeat_interleave(p, dim=2) if p > 1 else weights
    return weights.repeat_interleave(r, dim=1) if r > 1 else weights


def _gather(x: Tensor, r: int, p: int) -> Tensor:
    """The transpose of `_spread`: [B G*r m*p] -> [B G m]."""
    x = x.unflatten(1, (-1, r)).sum(dim=2) if r > 1 else x
    return x.unflatten(2, (-1, p)).sum(dim=-1) if p > 1 else x
