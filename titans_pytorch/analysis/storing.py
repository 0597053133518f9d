"""Switch writing off: memories keep their initial fast weights, which shows how the model performs without memory.

The switch acts in the calling thread or task alone, not on others that use the same model (docs/threads.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from titans_pytorch.common.checks import of_kind
from titans_pytorch.common.switches import Stop, set_stops, stops
from titans_pytorch.neural_memory import NeuralMemory

__all__ = ["memories_of", "page_switches", "stop_storing", "storing_off"]


def memories_of(model: nn.Module) -> dict[str, NeuralMemory]:
    """Return every memory in a model, by its name there."""
    of_kind(model, nn.Module, "model", "a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuralMemory)}


def page_switches(model: nn.Module) -> dict[str, int]:
    """Return the page switches of each memory with pages since it was made, by its name in the model."""
    paged = {name: memory for name, memory in memories_of(model).items() if memory.num_pages > 1}
    return {name: int(memory.page_switch_events) for name, memory in paged.items()}


def stop_storing(model: nn.Module) -> Callable[[], None]:
    """Stop writes and forget gates of the memories of `model`, in this thread or asyncio task alone.

    Returns:
        A function that ends it, to be called in the same thread or task: it raises RuntimeError in another. A second
        call does nothing. A memory that was stopped several times writes again after the last end.
    """
    stop = Stop(memories_of(model).values())
    set_stops((*stops(), stop))
    ended = False

    def resume() -> None:
        nonlocal ended
        if ended:
            return
        if stop not in stops():
            raise RuntimeError("storing was stopped in another thread or task and must be resumed there")
        ended = True
        set_stops(tuple(other for other in stops() if other is not stop))

    return resume


@contextmanager
def storing_off(model: nn.Module) -> Iterator[None]:
    """Within this context, and in this thread or asyncio task alone, the memories of a model keep their learned initial
    fast weights.
    """
    resume = stop_storing(model)
    try:
        yield
    finally:
        resume()
