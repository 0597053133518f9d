"""Loads weights that accelerate offloads (device_map, cpu_offload, disk_offload) for a whole block at once.

accelerate loads the weights of each module when that module is called. A memory reads the weights of its submodules
without calling them.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

LOADED = "_loaded_weights"  # attribute of a block: the submodules whose weights are loaded now


def load_whole(blocks: nn.Module) -> None:
    """Make each of the `blocks` load all its weights before it runs and release them after it."""
    for block in blocks if isinstance(blocks, nn.ModuleList) else [blocks]:
        if LOADED not in vars(block) and any(True for _ in _offloading(block)):
            vars(block)[LOADED] = []
            block.register_forward_pre_hook(_load)
            block.register_forward_hook(_release, always_call=True)


def _offloading(block: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Each submodule with a hook that offloads its weights."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                yield module, one


def _load(block: nn.Module, args: tuple) -> None:
    vars(block)[LOADED] = list(_offloading(block))
    for module, hook in vars(block)[LOADED]:
        hook.pre_forward(module)
        hook.offload = False  # a call of the module within the block neither loads nor releases


def _release(block: nn.Module, args: tuple, out: Any) -> None:
    for module, hook in vars(block)[LOADED]:
        hook.offload = True
        hook.post_forward(module, None)
    vars(block)[LOADED] = []
