"""Watch every module of a model: where a pass stops being finite, forward and backward."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.common.switches import in_backward
from titans_pytorch.engines.lazy import LazyTensors
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.ops.modes import in_transform

__all__ = ["NotFinite"]


@dataclass(frozen=True)
class NotFinite:
    """The first value that is not finite.

    module: name of the module that made it from finite values ("" is the model itself).
    kind: the module's class.
    what: "output", "parameter NAME", "input NAME", "loss", "gradient of the input", "gradient of the parameter NAME".
    dtype: dtype of the tensor.
    phase: "before the call", "forward" or "backward".
    index: of the first such element in the tensor.
    value: that element.
    """

    module: str
    kind: str
    what: str
    dtype: torch.dtype
    phase: str
    index: tuple[int, ...] = ()
    value: float = float("nan")

    def __str__(self) -> str:
        where = f"{self.module} ({self.kind})" if self.module else f"the model ({self.kind})"
        return f"the first value that is not finite is the {self.what} of {where}, in {str(self.dtype)[6:]}"


def not_finite(module: str, kind: str, what: str, x: Tensor, phase: str) -> NotFinite:
    """Return NotFinite of the first element of x that is not finite."""
    bad = _bad(x)
    if x.ndim == 0 or not bad.any():
        index: tuple[int, ...] = ()
    else:
        index = tuple(bad.nonzero()[0].tolist())
    return NotFinite(module, kind, what, x.dtype, phase, index, _number(x, index))


def finite(x: Tensor) -> bool:
    """Return whether every element is finite."""
    return not bool(_bad(x).any())


def _bad(x: Tensor) -> Tensor:
    return ~_dense(x).isfinite()


def _dense(x: Tensor) -> Tensor:
    x = x.detach()
    x = x.to_dense() if x.layout != torch.strided else x
    return x.float() if x.is_floating_point() and x.element_size() == 1 else x  # float8 has no isfinite


def _number(x: Tensor, index: tuple[int, ...]) -> float:
    x = _dense(x)
    x = x[index] if index else x.flatten()[0]
    return float(x.abs() if x.is_complex() else x)


def tensors_in(value: Any, name: str = "", lazy: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the floating-point and complex tensors in a module's inputs or outputs.

    lazy: include the fast weights of a memory's state, which are built when they are read. Outputs must not build any:
    a checkpointed pass would then differ from its recomputation. `updates` are never read.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
    elif isinstance(value, NeuralMemState):
        yield from tensors_in(value._replace(updates=None)._asdict(), name, lazy)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        yield from tensors_in(value._asdict(), name, lazy)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors_in(part, _joined(name, str(index)) if len(value) > 1 else name, lazy)
    elif type(value) is dict or (lazy and isinstance(value, LazyTensors)):
        for key, part in value.items():
            yield from tensors_in(part, _joined(name, str(key)), lazy)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value), name, lazy)


def first_bad(value: Any) -> Tensor | None:
    """Return the first tensor that is not finite."""
    return next((x for _, x in tensors_in(value) if not finite(x)), None)


def bad_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Yield parameters that are not finite, those of the module itself first."""
    names = sorted(module.named_parameters(), key=lambda item: item[0].count("."))
    return {name: p for name, p in names if not finite(p)}


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module and name else module or name


@dataclass
class _Candidate:
    """A module that made a value which is not finite from finite ones.

    tensor: that value. lasting: it counts even if the enclosing modules return finite values.
    """

    found: NotFinite
    tensor: Tensor | None = None
    lasting: bool = False
    absorbed: bool = False


@dataclass
class _Call:
    """One call of a module; candidates: how many there were when it began."""

    module: nn.Module
    takes: tuple[Tensor, ...]  # inputs that are not finite
    candidates: int
    of_input: Tensor | None = None  # the first gradient that is not finite
    of_output: Tensor | None = None


@dataclass
class Watch:
    """Hooks on every module of a model."""

    model: nn.Module
    candidates: list[_Candidate] = field(default_factory=list)
    swallowed: list[NotFinite] = field(default_factory=list)  # NaN of which later values show nothing
    calls: list[_Call] = field(default_factory=list)  # in the order in which they ended
    open: list[_Call] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self.names = {module: name for name, module in self.model.named_modules()}
        for module in self.names:
            self.hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self.hooks.append(module.register_forward_hook(self._end, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self, found: NotFinite, tensor: Tensor | None = None, lasting: bool = False) -> None:
        """Add a candidate."""
        self.candidates.append(_Candidate(found, tensor, lasting))

    @property
    def found(self) -> NotFinite | None:
        """Return the first candidate, preferably one whose value no later module made finite again."""
        first = sorted(self.candidates, key=lambda candidate: candidate.absorbed)
        return first[0].found if first else None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if in_backward() or in_transform():
            return None
        takes = tuple(x for _, x in tensors_in((args, kwargs), lazy=True) if not finite(x))
        call = _Call(module, takes, len(self.candidates))
        self.open.append(call)
        if not torch.is_grad_enabled():
            return None

        # an alias, whose gradient comes from this module alone
        aliases: dict[int, Tensor] = {}

        def alias(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                if id(value) not in aliases:
                    aliases[id(value)] = x = value.view_as(value)
                    self.hooks.append(x.register_hook(lambda grad: _note(call, "of_input", grad)))
                return aliases[id(value)]
            return type(value)(map(alias, value)) if type(value) in (tuple, list) else value

        return alias(args), {name: alias(value) for name, value in kwargs.items()}

    def _end(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if in_backward() or in_transform():
            return
        while self.open and (call := self.open.pop()).module is not module:
            pass  # the call raised an error
        made = first_bad(output)
        if made is None:
            # values made inside did not leave the module
            inside = self.candidates[call.candidates :]
            self.swallowed += [c.found for c in inside if not c.lasting and math.isnan(c.found.value)]
            self.candidates[call.candidates :] = [c for c in inside if c.lasting]
            for candidate in self.candidates:
                candidate.absorbed |= any(x is candidate.tensor for x in call.takes) and not candidate.lasting
        elif not call.takes and all(c.absorbed for c in self.candidates[call.candidates :]):
            found = not_finite(self.names[module], type(module).__name__, "output", made, "forward")
            self.add(found, made)
        self.calls.append(call)
        for _, x in tensors_in(output):
            if x.requires_grad:
                self.hooks.append(x.register_hook(lambda grad, call=call: _note(call, "of_output", grad)))

    def of_gradients(self, gradients: Mapping[str, Tensor | None]) -> NotFinite | None:
        """Return the call that receives finite gradients and returns others, the first in the backward pass; of nested
        calls the innermost. gradients: gradients of the parameters."""
        bad = {name: grad for name, grad in gradients.items() if grad is not None and not finite(grad)}
        found: NotFinite | None = None
        given_bad = {call.module for call in self.calls if call.of_output is not None}
        for call in reversed(self.calls):  # a module ends after those in it
            name, kind = self.names[call.module], type(call.module).__name__
            if call.of_output is not None or (found and found.module and not name.startswith(found.module + ".")):
                continue
            own = [inner for inner, _ in call.module.named_parameters(recurse=False) if _joined(name, inner) in bad]
            if own and call.module not in given_bad:  # else one of its other calls made that gradient
                what, grad = f"gradient of the parameter {own[0]}", bad[_joined(name, own[0])]
                found = not_finite(name, kind, what, grad, "backward")
            elif call.of_input is not None:
                found = not_finite(name, kind, "gradient of the input", call.of_input, "backward")
        if (found or bad) and self.swallowed:  # a fused attention may lose a NaN until the backward pass
            return self.swallowed[0]
        if found is None and bad:
            name, grad = next(iter(bad.items()))
            owner, _, own_name = name.rpartition(".")
            kind = type(self.model.get_submodule(owner)).__name__
            found = not_finite(owner, kind, f"gradient of the parameter {own_name}", grad, "backward")
        return found


def _note(call: _Call, side: str, grad: Tensor) -> None:
    if not finite(grad):
        setattr(call, side, grad)
