"""Linear recurrences h_t = g_t h_{t-1} + x_t along dim 1, in one place.

Letters: b rows, n steps. Gates [b n] or with trailing dims that broadcast against the inputs [b n ...].
"""

from functools import cache

import torch
from torch import Tensor, nn

from ..checks import wrong


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


def scan(gates: Tensor, inputs: Tensor, prev: Tensor | None = None, use_accelerated: bool = False) -> Tensor:
    """h_t = g_t h_{t-1} + x_t with h_0 = prev (zeros): as long as inputs [b n ...]; prev [b ...].

    `use_accelerated` takes the accelerated-scan kernel where it runs (CUDA, with Triton) and the plain form elsewhere.
    """
    if inputs.shape[1] == 0:
        return inputs
    gates = _align(gates, inputs)
    if use_accelerated and inputs.is_cuda and (kernel := _accelerated_kernel()) is not None:
        return _kernel_scan(kernel, gates, inputs, prev)
    return _doubling_scan(gates, inputs, prev) if inputs.is_cuda else _loop_scan(gates, inputs, prev)


class AssocScan(nn.Module):
    """`scan` as a module: AssocScan(use_accelerated=False)(gates, inputs, prev=None).

    Raises ValueError where gates [b n (...)] or prev [b ...] do not fit the inputs [b n ...].
    """

    def __init__(self, use_accelerated: bool = False):
        super().__init__()
        self.use_accelerated = use_accelerated

    def forward(self, gates: Tensor, inputs: Tensor, prev: Tensor | None = None) -> Tensor:
        b, n, *rest = inputs.shape
        sizes = zip(gates.shape, inputs.shape, strict=False)
        if gates.shape[:2] != (b, n) or gates.ndim > inputs.ndim or not all(g in (1, x) for g, x in sizes):
            raise wrong("gates", tuple(gates.shape), f"({b}, {n}), or further dims that broadcast to {(b, n, *rest)}")
        if prev is not None and tuple(prev.shape) != (b, *rest):
            raise wrong("prev", tuple(prev.shape), f"{(b, *rest)}, one step of the inputs")
        return scan(gates, inputs, prev, self.use_accelerated)


def _align(gates: Tensor, inputs: Tensor) -> Tensor:
    return gates.reshape(*gates.shape, *(1,) * (inputs.ndim - gates.ndim))


def _loop_scan(gates, inputs, prev):
    # unbind, not indexing: the backward of x[:, t] costs the whole of x at every step
    gates, inputs = gates.unbind(1), inputs.unbind(1)
    h = inputs[0] if prev is None else torch.addcmul(inputs[0], gates[0], prev)
    outs = [h]
    for g, x in zip(gates[1:], inputs[1:], strict=True):
        h = torch.addcmul(x, g, h)
        outs.append(h)
    return torch.stack(outs, dim=1)


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
