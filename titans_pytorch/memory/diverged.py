"""Warns once per memory when the state of a stream is not finite.

The check runs on the CPU only, every LOOK tokens of a stream and at most once per call. It reads one number of each
row, which is enough: one fast weight that is not finite spreads to all predictions of its row, and through their
gradients to all its weights.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.memory.state import LazyTensors, NeuralMemState

__all__ = ["MemoryDiverged"]

LOOK = 256  # tokens


class MemoryDiverged(RuntimeWarning):
    """The state given to a NeuralMemory is not finite. Each memory warns once.

    Silence it with `warnings.simplefilter("ignore", MemoryDiverged)`, or make it an error with "error".
    """


def label_memories(model: nn.Module) -> None:
    """Set `label` of each memory in a model to its name there."""
    for name, module in model.named_modules():
        if hasattr(module, "told_diverged"):
            module.label = name


def warn_if_diverged(memory: Any, state: NeuralMemState, tokens: int) -> None:
    """Warn if the state that a call of `tokens` tokens starts from is not finite."""
    if state.states is None or torch.compiler.is_compiling() or memory.told_diverged:
        return
    at = state.position
    if at // LOOK == (at + tokens) // LOOK:
        return
    weights = state.states[0]
    first = weights[next(iter(weights))]
    if type(first) is not Tensor or first.device.type != "cpu" or torch._C._functorch.maybe_current_level() is not None:
        return  # reading an accelerator would wait for it; a transform has no numbers
    if not bool(first.detach().flatten(1)[:, 0].isfinite().all()):
        _warn(memory, state, first, at)


def _warn(memory: Any, state: NeuralMemState, first: Tensor, at: int) -> None:
    heads = memory.internal_heads
    finite = first.detach().flatten(1)[:, 0].isfinite().unflatten(0, (-1, heads)).all(dim=1)
    bad = (~finite).nonzero().flatten().tolist()
    rows = f"rows {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''} of {len(finite)}"
    name = f"{memory.label} (NeuralMemory)" if memory.label else "NeuralMemory"
    warnings.warn(
        f"{name}: the fast weights of {rows} are not finite from token {_position(state, memory, at)}; lower "
        "default_step_transform_max_lr (max_step) or batch_size (chunk_size), see docs/stability.md",
        MemoryDiverged,
        stacklevel=2,
    )
    memory.told_diverged = True  # set last: a filter that makes it an error raises every time


def _position(state: NeuralMemState, memory: nn.Module, at: int) -> str:
    """Name the first token that reads weights that are not finite, as far as `updates` of the last call go."""
    updates, chunk = state.updates, memory.store_chunk_size
    source = updates.source if isinstance(updates, LazyTensors) else None
    if source is None:
        return f"{at} on, or earlier"
    name = next(iter(source.shapes))

    def finite(index: int) -> bool:
        return bool(source.entries(name, index, index + 1).isfinite().all())

    low, high = source.first, source.last
    if not finite(low):
        return f"{max(low * chunk - 1, 0)} on, or earlier"
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(middle) else (low, middle)
    return f"{high * chunk - 1} on"
