"""Which module of a model is the first to produce a value that is not finite."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NotFinite", "first_not_finite"]


@dataclass(frozen=True)
class NotFinite:
    """The first value that is not finite.

    module: name of the module that made it from finite values ("" is the model itself).
    kind: the module's class.
    dtype: of the value, as it was computed.
    what: "output", "parameter NAME", "gradient of the input" or "gradient of the parameter NAME".
    """

    module: str
    kind: str
    dtype: torch.dtype
    what: str

    def __str__(self) -> str:
        where = f"{self.module} ({self.kind})" if self.module else f"the model ({self.kind})"
        return f"the first value that is not finite is the {self.what} of {where}, in {str(self.dtype)[6:]}"


def first_not_finite(model: nn.Module, loss_of: Callable[[], Tensor | None], backward: bool = True) -> NotFinite | None:
    """Repeat a computation and find the module at which it stops being finite.

    Costs a pass with hooks on every module, so call it once something is wrong. Reproduce the pass that failed: the
    same inputs, autocast, train or eval mode, and random number generator states. Parameters and their `grad` are left
    as they are.

    Args:
        model: whose modules are looked at.
        loss_of: calls the model; returns a loss, or None.
        backward: where all outputs are finite, also look at the gradients of that loss.

    Returns:
        The first value, or None where every value is finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            owner, _, own = name.rpartition(".")
            return NotFinite(owner, type(model.get_submodule(owner)).__name__, parameter.dtype, f"parameter {own}")
    watch = _Watch(model)
    try:
        loss = loss_of()
        if watch.found is not None:
            return watch.found
        if loss is not None and not loss.isfinite().all():
            return NotFinite("", type(model).__name__, loss.dtype, "loss")
        if loss is None or not backward or not loss.requires_grad:
            return None
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss.sum(), tuple(wanted.values()), allow_unused=True)
        return watch.of_gradients(dict(zip(wanted, found, strict=True)))
    finally:
        watch.remove()


class _Watch:
    """Hooks on every module: the first output that is not finite, and whether gradients are, at inputs and outputs."""

    def __init__(self, model: nn.Module):
        self.model, self.found, self.order = model, None, []
        self.names = {module: name for name, module in model.named_modules()}
        self.gradients: dict[nn.Module, dict[str, torch.dtype | None]] = {}
        self.hooks = [module.register_forward_hook(self._forward, with_kwargs=True) for module in self.names]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _forward(self, module, args, kwargs, output) -> None:
        made = _bad(output)
        if made is not None and self.found is None and _bad((args, kwargs)) is None:
            self.found = NotFinite(self.names[module], type(module).__name__, made, "output")
        self.order.append(module)
        seen = self.gradients.setdefault(module, {"input": None, "output": None})
        for side, values in (("input", (args, kwargs)), ("output", output)):
            for x in _tensors(values):
                if x.requires_grad:
                    self.hooks.append(x.register_hook(lambda grad, seen=seen, side=side: _note(seen, side, grad)))

    def of_gradients(self, parameters: Mapping[str, Tensor | None]) -> NotFinite | None:
        """Of the modules that get finite gradients and give others, the one that the backward pass meets first; of
        several around each other the innermost."""
        bad = {name: grad.dtype for name, grad in parameters.items() if grad is not None and not grad.isfinite().all()}
        found: NotFinite | None = None
        for module in reversed(dict.fromkeys(self.order)):  # a module ends after those in it
            name, kind, seen = self.names[module], type(module).__name__, self.gradients[module]
            if seen["output"] is not None or (found and not name.startswith(found.module and found.module + ".")):
                continue
            if own := [inner for inner, _ in module.named_parameters(recurse=False) if _joined(name, inner) in bad]:
                found = NotFinite(name, kind, bad[_joined(name, own[0])], f"gradient of the parameter {own[0]}")
            elif seen["input"] is not None:
                found = NotFinite(name, kind, seen["input"], "gradient of the input")
        if found is None and bad:
            name, dtype = next(iter(bad.items()))
            owner, _, own = name.rpartition(".")
            kind = type(self.model.get_submodule(owner)).__name__
            found = NotFinite(owner, kind, dtype, f"gradient of the parameter {own}")
        return found


def _note(seen: dict[str, torch.dtype | None], side: str, grad: Tensor) -> None:
    if not grad.isfinite().all():
        seen[side] = grad.dtype


def _joined(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in what a module takes or returns. A mapping may build its entries when they are read, so
    only plain dicts are opened."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif type(value) is dict:
        for part in value.values():
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(tuple(vars(value).values()))


def _bad(value: Any) -> torch.dtype | None:
    """The dtype of the first tensor that is not finite."""
    return next((x.dtype for x in _tensors(value) if not x.detach().isfinite().all()), None)
