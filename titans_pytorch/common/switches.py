"""Switches of one thread or task that do not affect others: writing switched off, watchers, eval mode.

The switch and the watchers are context variables: a thread starts without any, an asyncio task with those of its
creator.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "watched", "with_switches_of_now"]


class Stop:
    """One call of `stop_storing`: the memories that it stops."""

    def __init__(self, memories: Iterable[nn.Module]):
        self.memories = frozenset(memories)


Stops = tuple[Stop, ...]

_stops: ContextVar[Stops] = ContextVar("titans_pytorch_stops", default=())
_watched: ContextVar[tuple[Mapping[Any, Any], ...]] = ContextVar("titans_pytorch_watched", default=())


class _Here(threading.local):
    """The ids of stopped memories again, for compiled code: torch.compile guards on a thread's attributes, not on
    context variables."""

    def __init__(self):
        self.stopped: tuple[int, ...] = ()


_here = _Here()


def stops() -> Stops:
    """Return the stops of this thread or task; in a thread of autograd, those of the caller of `backward`."""
    if in_backward() and torch._C._is_key_in_tls("context"):
        return _stops.get(torch._C._get_obj_in_tls("context").get(_stops, ()))
    return _stops.get()


def set_stops(found: Stops) -> None:
    _stops.set(found)
    _here.stopped = _ids(found)


def _ids(found: Stops) -> tuple[int, ...]:
    return tuple(id(memory) for stop in found for memory in stop.memories)


def stores(memory: nn.Module) -> bool:
    """Return whether a memory writes."""
    if torch.compiler.is_compiling():
        return id(memory) not in _here.stopped
    return not any(memory in stop.memories for stop in stops())


def with_switches_of_now(function: Callable) -> Callable:
    """Return a function that always runs with the present switches, whatever the thread and time of its call: for
    activation checkpointing, whose backward pass may come later, and for thread pools.

        checkpoint(with_switches_of_now(block), x, use_reentrant=False)
    """
    now = stops()

    def run(*args, **kwargs):
        token, here = _stops.set(now), _here.stopped
        _here.stopped = _ids(now)
        try:
            return function(*args, **kwargs)
        finally:
            _here.stopped = here
            _stops.reset(token)

    return run


# watchers


@contextmanager
def watched(watchers: Mapping[Any, Any]) -> Iterator[None]:
    """Within this context each subject sends its events to its watcher.

    A watcher has a method for each event it receives. It is called under the grad mode of the call and must not change
    its arguments. Without watchers it costs nothing.

    Events of an engine (`memory.engine`), after each solve window:
        wrote(chunks, carry, window, mini_batch, transition): the chunks with their keys, values and rates; the fast
        weights before the window; its fast weights and inner loss; chunks of a mini-batch, of which
        a window may hold several (`window.solved`); the share that a gated transition passes on.
    Events of a memory, once a call:
        rates(rates): before gates and masks.
        stored(state, surprises): the next state; (inner loss, learning rate).

    Args:
        watchers: subject -> watcher.
    """
    token = _watched.set((*_watched.get(), watchers))
    try:
        yield
    finally:
        _watched.reset(token)


def any_watcher() -> bool:
    """Return whether a watcher is told of anything here."""
    return bool(_watched.get())


def tell(subject: Any, event: str, *values: Any) -> None:
    """Call the method `event` of every watcher of a subject. Compiled code and recomputed passes send no events."""
    if torch.compiler.is_compiling() or not (several := _watched.get()) or in_backward():
        return
    for watchers in several:
        if (told := getattr(watchers.get(subject), event, None)) is not None:
            told(*values)


def in_backward() -> bool:
    """Return whether autograd runs in this thread: a pass is recomputed, or a hook is called."""
    return torch._C._current_graph_task_id() != -1


# eval mode

_lock = threading.Lock()
_held: dict[nn.Module, int] = {}  # modules that were in training mode -> how many contexts hold them in eval mode


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within this context no module of `model` is in training mode; after it, those that were are again.

    A model in eval mode stays unchanged. If several threads evaluate one model at a time, the last to leave restores
    it. Anything but an nn.Module is ignored.
    """
    held: list[nn.Module] = []
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    try:
        with _lock:
            for module in modules:
                if module.training or module in _held:
                    _held[module] = _held.get(module, 0) + 1
                    held.append(module)
                    module.training = False
        yield
    finally:
        with _lock:
            for module in held:
                _held[module] -= 1
                if not _held[module]:
                    del _held[module]
                    module.training = True
