"""Linear recurrences h_t = g_t h_{t-1} + x_t along dim 1, in one place.

Letters: b rows, n steps. Gates [b n] or with trailing dims that broadcast against the inputs [b n ...].
"""

from functools import cache

import torch
from torch import Tensor, nn

from ..checks import Words, check_flags, wrong
from .modes import in_transform, plain_only, without_autocast


def naive_scan(gates: Tensor, inputs: Tensor, prev: Tensor | None = None) -> Tensor:
    """The recurrence word for word: the twin that every other form is tested against."""
    if inputs.shape[1] == 0:
        return inputs
    gates = _align(gates, inputs)
    h = torch.zeros_like(inputs[:, 0]) if prev is None else prev
    outs = []
    for t in range(inputs.shape[1]):
        h = gates[:, t] * h + inputs[:, t]
        outs.append(h)
    return torch.stack(outs, dim=1)


def scan(
    gates: Tensor,
    inputs: Tensor,
    prev: Tensor | None = None,
    use_accelerated: bool = False,
    with_start: bool = False,
) -> Tensor:
    """h_t = g_t h_{t-1} + x_t with h_0 = prev (zeros): as long as inputs [b n ...]; prev [b ...]. `with_start` puts h_0
    in front.

    `use_accelerated` takes the accelerated-scan kernel where it runs (CUDA, with Triton) and the plain form elsewhere.
    """
    if inputs.shape[1] == 0 and not with_start:
        return inputs
    gates = _align(gates, inputs)
    if inputs.shape[1] == 1 and not use_accelerated:
        out = inputs if prev is None else torch.addcmul(inputs, gates, prev.unsqueeze(1))
        return _after(prev, out) if with_start else out
    if not (inputs.is_cuda or plain_only()):  # a compiler fuses the doubling form itself
        return _LoopScan.apply(gates, inputs, prev, with_start)
    kernel = _accelerated_kernel() if use_accelerated and inputs.is_cuda and not in_transform() else None
    out = _doubling_scan(gates, inputs, prev) if kernel is None else _kernel_scan(kernel, gates, inputs, prev)
    return _after(prev, out) if with_start else out


def _after(prev: Tensor | None, out: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(out[:, :1]) if prev is None else prev.unsqueeze(1), out), dim=1)


class AssocScan(nn.Module):
    """`scan` as a module: h_t = g_t h_{t-1} + x_t along dim 1.

    Args:
        use_accelerated: the accelerated-scan kernel where it runs: CUDA, with Triton.

    Raises:
        ValueError: where gates [b n (...)] or prev [b ...] do not fit the inputs [b n ...].
    """

    def __init__(self, use_accelerated: bool = False):
        check_flags(AssocScan.__init__, locals())
        super().__init__()
        self.use_accelerated = use_accelerated

    def forward(self, gates: Tensor, inputs: Tensor, prev: Tensor | None = None) -> Tensor:
        """h_t = gates_t h_{t-1} + inputs_t.

        Args:
            gates: [b n ...], of the shape of inputs or one that expands to it.
            inputs: [b n ...].
            prev: h_{-1}, [b ...]; None: zeros.

        Returns:
            h, of the shape of inputs.
        """
        for name, x in (("gates", gates), ("inputs", inputs), ("prev", inputs if prev is None else prev)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise wrong(
                    name, Words(x.dtype if isinstance(x, Tensor) else type(x).__name__), "a floating point tensor"
                )
        if inputs.ndim < 2:
            raise wrong("inputs", tuple(inputs.shape), "of shape [b n ...]")
        b, n, *rest = inputs.shape
        sizes = zip(gates.shape, inputs.shape, strict=False)
        if gates.shape[:2] != (b, n) or gates.ndim > inputs.ndim or not all(g in (1, x) for g, x in sizes):
            raise wrong("gates", tuple(gates.shape), f"({b}, {n}), or further dims that broadcast to {(b, n, *rest)}")
        if prev is not None and tuple(prev.shape) != (b, *rest):
            raise wrong("prev", tuple(prev.shape), f"{(b, *rest)}, one step of the inputs")
        return scan(gates, inputs, prev, self.use_accelerated)


def _align(gates: Tensor, inputs: Tensor) -> Tensor:
    return gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))


class _LoopScan(torch.autograd.Function):
    """One pass over the inputs forward, one backward: [b n ...] -> [b n ...], or [b n+1 ...] from prev on, which then
    lies in memory step by step, so that a stretch of steps is one block. Of the inputs nothing is kept."""

    @staticmethod
    def forward(ctx, gates, inputs, prev, with_start):
        b, n, *rest = inputs.shape
        if with_start:
            out = inputs.new_empty(n + 1, b, *rest).transpose(0, 1)
            out[:, 0] = 0.0 if prev is None else prev
        else:
            out = inputs.new_empty(b, n, *rest)
        h = prev
        for t in range(n):
            slot = out[:, t + with_start]
            if h is None:
                slot.copy_(inputs[:, t])
            else:
                torch.addcmul(inputs[:, t], gates[:, t], h, out=slot)
            h = slot
        ctx.save_for_backward(gates, prev, out)
        ctx.with_start = with_start
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        gates, prev, out = ctx.saved_tensors
        start = ctx.with_start
        slope = grad[:, 1:] if start else grad
        d_inputs = _backwards(gates, slope)
        before = out[:, :-1]
        if not start:
            before = torch.cat((torch.zeros_like(out[:, :1]) if prev is None else prev.unsqueeze(1), before), dim=1)
        d_prev = None
        if prev is not None:
            d_prev = gates[:, 0] * d_inputs[:, 0]
            d_prev = d_prev + grad[:, 0] if start else d_prev
        return _reduce_product(d_inputs, before, gates.shape), d_inputs, d_prev, None


def _backwards(gates: Tensor, slope: Tensor) -> Tensor:
    """h_t = slope_t + g_{t+1} h_{t+1}: the slope of the inputs [b n ...]."""
    if torch.is_grad_enabled():  # to be differentiated again: the plain form
        later = torch.cat((gates[:, 1:], torch.zeros_like(gates[:, :1])), dim=1)
        return naive_scan(later.flip(1), slope.flip(1)).flip(1)
    out = slope.new_empty(slope.shape)
    out[:, -1] = slope[:, -1]
    for t in reversed(range(slope.shape[1] - 1)):
        torch.addcmul(slope[:, t], gates[:, t + 1], out[:, t + 1], out=out[:, t])
    return out


def _reduce_product(x: Tensor, y: Tensor, shape) -> Tensor:
    """x * y, summed to `shape`."""
    if all(size == 1 for size in shape[2:]):
        b, n = shape[:2]
        return (x.reshape(b * n, 1, -1) @ y.reshape(b * n, -1, 1)).view(shape)
    return (x * y).sum_to_size(shape)


def _doubling_scan(gates, inputs, prev):
    """log2(n) steps over the whole length: for devices where a launch costs more than the work."""
    h = inputs if prev is None else torch.cat((inputs[:, :1] + gates[:, :1] * prev[:, None], inputs[:, 1:]), dim=1)
    reach = 1
    while reach < h.shape[1]:
        h = torch.cat((h[:, :reach], h[:, reach:] + gates[:, reach:] * h[:, :-reach]), dim=1)
        gates = torch.cat((gates[:, :reach], gates[:, reach:] * gates[:, :-reach]), dim=1)
        reach *= 2
    return h


@cache
def _accelerated_kernel():
    try:
        from accelerated_scan.scalar import scan as kernel
    except (ImportError, OSError):
        return None
    return kernel


def _kernel_scan(kernel, gates, inputs, prev):
    """accelerated-scan takes [b channels steps], contiguous, equal shapes, a power of two steps."""
    shape, n = inputs.shape, inputs.shape[1]
    if prev is not None:
        inputs = torch.cat((inputs[:, :1] + gates[:, :1] * prev[:, None], inputs[:, 1:]), dim=1)
    padded = max(32, 1 << (n - 1).bit_length())

    def channels_first(x):
        x = x.expand(shape).reshape(shape[0], n, -1).transpose(1, 2)
        return nn.functional.pad(x, (0, padded - n)).contiguous()

    out = kernel(channels_first(gates), channels_first(inputs))
    return out[..., :n].transpose(1, 2).reshape(shape)
