"""Taking an inner gradient, and keeping precision, whatever mode the caller is in."""

import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def eager(fn):
    """fn, outside of torch.compile's graphs: what compiled code computes cannot be differentiated twice."""

    @wraps(fn)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules:
            return torch.compiler.disable(fn)(*args)
        return fn(*args)  # torch.compiler.disable would load torch._dynamo

    return call


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp ...) or forward-mode AD is active. These differentiate plain
    operations, but no autograd.Function of ours: the naive twin takes its place."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain_only() -> bool:
    """The same, or torch.compile, which fuses the plain form by itself."""
    return torch.compiler.is_compiling() or in_transform()


@contextmanager
def enable_inner_grad():
    """Autograd works inside, also under no_grad and inference_mode (pass inputs through `ordinary`). It cannot be
    compiled: call it in a function that is `eager`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def inner_gradients(fn: Callable, inputs: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Any]:
    """fn(inputs()) -> (a scalar, further tensors): the scalar's gradients at the inputs, and the further tensors.

    They can be differentiated again where the caller's mode allows it. Call it in a function that is `eager`; fn and
    inputs pass all tensors of outside through `ordinary`."""
    if in_transform():
        return torch.func.grad(fn, has_aux=True)(inputs())
    differentiable = torch.is_grad_enabled()
    with enable_inner_grad():
        leaves = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in inputs())
        total, more = fn(leaves)
        grads = torch.autograd.grad(total, leaves, create_graph=differentiable, materialize_grads=True)
    return grads, more


HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """A memory is kept in float32 at least: sums over thousands of small updates vanish in half precision."""
    return x.float() if x.dtype in HALF else x


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device. PyTorch raises where it has none, as on "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device):
    """Products of float32 tensors stay in float32 inside."""
    return torch.autocast(device.type, enabled=False) if under_autocast(device) else nullcontext()


_KIND = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
ACCELERATOR = _KIND if torch.amp.is_autocast_available(_KIND) else "cpu"


def no_autocast_anywhere():
    """`no_autocast` where the device is not known yet."""
    on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(ACCELERATOR)
    return _no_autocast_anywhere() if on else nullcontext()


@contextmanager
def _no_autocast_anywhere():
    with torch.autocast("cpu", enabled=False), torch.autocast(ACCELERATOR, enabled=False):
        yield


def without_autocast(backward):
    """For the `backward` of a function of our own: it computes as its forward did, also where it is called under
    autocast."""

    @wraps(backward)
    def call(ctx, *grads):
        with no_autocast_anywhere():
            return backward(ctx, *grads)

    return call


def naive_gradients(naive: Callable, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """For the `backward` of a function of our own that is to be differentiated again: the gradients of its naive twin
    at the saved inputs, as differentiable tensors."""
    # aliases: an input may have been computed from another one, and each is to count by itself
    inputs = tuple(t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs)
    return torch.autograd.grad(naive(*inputs), inputs, grad, create_graph=True)


def hooks_on_saved_tensors():
    """Those that a checkpoint, say, has put on what autograd saves for backward; None without."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saved_as_they_are():
    """What autograd saves inside goes past the hooks of outside."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def ordinary(x: Tensor) -> Tensor:
    """x as a tensor that autograd accepts: inference tensors are cloned. Call it inside `enable_inner_grad`."""
    return x.clone() if x.is_inference() else x
