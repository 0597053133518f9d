"""Steps: what a module returns for one new token of each row, at less cost than its call.

A step is a function of the module and of the arguments of its call. It returns what the call returns, and modifies
nothing; or None where it does not apply. What a step skips (checks, inner modules' calls) must have no effect: it looks
for hooks and overridden forwards of the modules that it does not call. `STEPS[MyLayer] = my_step` adds one.

Letters: b batch, d features, v tokens of the vocabulary
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.common.switches import any_watcher
from titans_pytorch.ops.modes import plain_only, under_autocast

#: The step of each type of module. A subclass has none of its base's.
STEPS: dict[type, Callable[..., Any]] = {}

DTYPES = (torch.float32, torch.float64)


def call(module: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return module(*args, **kwargs): `step` for code that runs both."""
    return module(*args, **kwargs)


def step(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return module(*args, **kwargs) by its step; by its call where it has none, or where that does not apply."""
    fast = STEPS.get(type(module))
    if fast is not None and silent(module):
        out = fast(module, *args, **kwargs)
        if out is not None:
            return out
    return module(*args, **kwargs)


def silent(module: nn.Module) -> bool:
    """Return whether skipping the module's call skips no hook and no forward of the instance."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def steps_apply(x: Tensor) -> bool:
    """Return whether steps may run on x [b 1 d]: one token of each row, in float32 or float64 on a CPU, without
    gradients, autocast, transforms, watchers or global hooks."""
    everywhere = nn.modules.module
    return (
        type(x) is Tensor
        and x.shape[1] == 1
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not under_autocast(x.device)
        and not plain_only()
        and not any_watcher()
        and not (everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
    )


def sequential_step(modules: nn.Sequential, x: Tensor) -> Tensor:
    for module in modules:
        x = step(module, x)
    return x


STEPS[nn.Sequential] = sequential_step


class CacheDecoder:
    """Reads one token of each row after the other.

    Args:
        read: (ids [b 1], cache) -> (logits [b v], next cache).
        cache: that of the tokens before.
    """

    def __init__(self, read: Callable[[Tensor, Any], tuple[Tensor, Any]], cache: Any):
        self._read, self._cache = read, cache

    def step(self, ids: Tensor) -> Tensor:
        """Read the next token's ids, long [b 1]. Returns logits [b v]."""
        logits, self._cache = self._read(ids, self._cache)
        return logits

    def cache(self) -> Any:
        """Return the model's cache after the tokens read."""
        return self._cache


def decoder_by_calls(model: Callable, cache: Any) -> CacheDecoder:
    """Return a decoder of any model that is called as `model(ids, cache=..., return_cache=True)`."""

    def read(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = model(ids, cache=cache, return_cache=True)
        return logits[:, -1], cache

    return CacheDecoder(read, cache)
