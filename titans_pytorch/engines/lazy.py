"""LazyTensors: a mapping of tensors that are built when they are read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops.modes import hooks_on_saved_tensors, no_autocast_anywhere, saved_as_they_are


class LazyTensors(Mapping[str, Any]):
    """A mapping name -> tensor. Each tensor is built when it is first read, once.

    It is built without autocast and under the grad mode in which the mapping was made. Activation checkpointing
    recomputes the read, but not entries created outside it.

    Args:
        names: the keys.
        build: builds the tensor of a name.
        first_chunk: the absolute index of the chunk that entry 0 along dim 1 stands before (`updates` only).
        source: the `Written` that applies these weights without building them (`updates` only).
    """

    def __init__(self, names, build: Callable[[str], Any], first_chunk: int | None = None, source: Any = None):
        self._names = tuple(names)
        self._build: Callable[[str], Any] | None = build
        self._built: dict[str, Any] = {}
        self.first_chunk = first_chunk
        self.source = source
        self._compiled = torch.compiler.is_compiling()  # a graph has one mode
        if not self._compiled:
            self._grad = torch.is_grad_enabled()
            self._inference = torch.is_inference_mode_enabled()
            self._hooks = hooks_on_saved_tensors()

    def __getitem__(self, name: str) -> Any:
        build = self._build  # None once all are built, which another thread may do
        if name not in self._built and build is not None:
            if name not in self._names:
                raise KeyError(name)
            with no_autocast_anywhere():
                made = build(name) if self._compiled else self._build_in_mode(build, name)
            self._built.setdefault(name, made)
            if len(self._built) == len(self._names):
                self._build = None  # frees the sources of the tensors
        return self._built[name]

    def _build_in_mode(self, build: Callable[[str], Any], name: str) -> Any:
        hooks = hooks_on_saved_tensors() in (None, self._hooks)
        if hooks and (self._grad, self._inference) == (torch.is_grad_enabled(), torch.is_inference_mode_enabled()):
            return build(name)
        with ExitStack() as modes:
            if not hooks:
                modes.enter_context(saved_as_they_are())
            modes.enter_context(torch.inference_mode(self._inference))
            if not self._inference:
                modes.enter_context(torch.set_grad_enabled(self._grad))
            return build(name)

    def __contains__(self, name) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LazyTensors":
        """Return a mapping that applies fn to every tensor when it is read."""
        return LazyTensors(self._names, lambda name: fn(self[name]), self.first_chunk)

    def to(self, device: torch.device | str | int, **options: Any) -> Mapping[str, Tensor]:
        """Return itself if its tensors are on the device, else copies there. accelerate calls this."""
        device = torch.empty(0, device=device).device
        if all(tensor.device == device for tensor in self.values()):
            return self
        return {name: tensor.to(device, **options) for name, tensor in self.items()}

    def __reduce__(self):  # pickle and deepcopy take the tensors alone
        return _rebuild, (dict(self), self.first_chunk)

    def __repr__(self):
        return f"LazyTensors({', '.join(self._names)})"


def _rebuild(tensors: dict[str, Tensor], first_chunk: int | None) -> LazyTensors:
    return LazyTensors(tensors, tensors.__getitem__, first_chunk)
