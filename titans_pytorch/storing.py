"""Switching the storing of memories off: each stays as it starts, so that what a model does without memory shows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from .neural_memory import NeuralMemory
from .rates import StoreRates

__all__ = ["memories_of", "stop_storing", "storing_off"]


def memories_of(model: nn.Module) -> dict[str, NeuralMemory]:
    """Every memory in a model, by its name there."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuralMemory)}


def stop_storing(model: nn.Module) -> Callable[[], None]:
    """From here on no memory of `model` stores a token, and nothing fades, until what is returned is called."""
    hooks = [memory.rates.register_forward_hook(_still) for memory in memories_of(model).values()]

    def resume() -> None:
        for hook in hooks:
            hook.remove()

    return resume


@contextmanager
def storing_off(model: nn.Module) -> Iterator[None]:
    """Within this context the memories of a model stay at their learned initial weights.

    A step of 0 alone would still let a memory fade by a decay that depends on the tokens.
    """
    resume = stop_storing(model)
    try:
        yield
    finally:
        resume()


def _still(module: nn.Module, args: tuple, rates: StoreRates) -> StoreRates:
    return replace(rates, step=torch.zeros_like(rates.step), keep=torch.ones_like(rates.keep))
