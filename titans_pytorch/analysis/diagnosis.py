"""Find where a model stops being finite: the module, parameter, chunk and rate, and what to change."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.analysis.memory_faults import FaultWatcher, MemoryFault
from titans_pytorch.analysis.not_finite import (
    NotFinite,
    Watch,
    bad_parameters,
    finite,
    first_bad,
    not_finite,
    tensors_in,
)
from titans_pytorch.analysis.overshoot import OVERSHOOTS, REMEDY, watch_gains
from titans_pytorch.analysis.storing import memories_of
from titans_pytorch.common.checks import Words, callable_or_none, flags, of_kind, wrong
from titans_pytorch.common.switches import watched

__all__ = ["Diagnosis", "MemoryFault", "NotFinite", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. `print` it: one or two sentences.

    found: the first value that is not finite; None where all are finite.
    memory: where in a NeuralMemory; None where no memory is concerned.
    remedy: what to change.
    gains: memory's name -> its largest gain; above 2 a memory can overshoot (`watch_gains`).
    backward: whether the backward pass was run.
    harmless: parameters that are not finite though all results are, each with such a value.
    """

    found: NotFinite | None = None
    memory: MemoryFault | None = None
    remedy: str = ""
    gains: Mapping[str, float] = field(default_factory=dict)
    backward: bool = False
    harmless: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every value is finite."""
        return self.found is None

    def __str__(self) -> str:
        if self.found is None:
            return self._finite()
        found, place = self.found, self.memory
        said = f"{found}: {found.value:g}"
        if place is not None and place.memory == found.module and found.what.startswith(place.what):
            said += f" in {place.where} ({found.phase})"
        else:
            said += f" at {list(found.index)}" if found.index else ""
            said += f" ({found.phase})" + (f"; {place}" if place is not None else "")
        return f"{said}; {self.remedy}" if self.remedy else said

    def _finite(self) -> str:
        passes = "forward and backward" if self.backward else "forward (no backward pass was run)"
        said = f"every value is finite, {passes}"
        if self.gains:
            name, gain = max(self.gains.items(), key=lambda item: item[1])
            said += f"; the largest gain of a memory is {gain:.2g}, in {name or 'the memory'}"
            said += f", above 2: it may overshoot; {REMEDY}" if gain > OVERSHOOTS else " (at most 2: no overshoot)"
        if self.harmless:
            shown = ", ".join(f"{name} ({value:g})" for name, value in self.harmless.items())
            said += f"; not finite, but harmless in this call: {shown}"
        return said


def diagnose(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    backward: bool = True,
) -> Diagnosis:
    """Run a model once, forward and backward, and find the first value that is not finite.

    Reproduce the pass that failed: the same inputs, state, autocast, train or eval mode, and random number generator
    states. Parameters, their `grad` and buffers are left as they are. Nothing is watched at other times. Compiled
    models are run without compilation.

        print(diagnose(model, ids))
        print(diagnose(memory, {"seq": x, "state": state}, loss=lambda out: out[0].square().mean()))

    Args:
        model: any module; memories in it are inspected.
        inputs: the arguments of its call: a tensor, a tuple of arguments, a mapping of keywords; or a function without
            arguments that calls the model itself, and whose result is taken as the output.
        loss: the model's output -> the loss. Default: with `return_loss` where the model has this argument; else the
            output's `loss`, else the mean of its first floating-point tensor.
        backward: where the forward pass is finite, also run the backward pass. It needs grad mode.

    Returns:
        The first place, with what to change; where all is finite, the largest gain of the memories.

    Raises:
        ValueError: for a model that is no module, or other inputs.
    """
    of_kind(model, nn.Module, "model", "a torch.nn.Module")
    flags(backward=backward)
    callable_or_none(loss, "loss")
    call = _call_of(model, inputs, loss is None and backward)
    watch = Watch(model)
    memories = {
        name: FaultWatcher(name, memory, lambda found: watch.add(found, lasting=True))
        for name, memory in memories_of(model).items()
    }
    told = watched({memories[name].memory.engine: memories[name] for name in memories})
    failed = ""
    with _as_before(model), watch, told, watch_gains(model) as gains:
        try:
            found, ran = _run(model, watch, call, loss, backward)
        except Exception as error:  # a decomposition refuses what is not finite
            found, ran = watch.found, False
            if found is None:
                raise
            failed = f" (the call then raised {type(error).__name__}: {error})"
    if found is None:
        harmless = {name: not_finite("", "", "", p, "").value for name, p in bad_parameters(model).items()}
        return Diagnosis(gains=dict(gains), backward=ran, harmless=harmless)
    told_of = _of_input(model, inputs, watch, found) or _of(model, found, memories)
    remedy = _overshoot_first(gains) + told_of.remedy if found.phase == "backward" else told_of.remedy
    return replace(told_of, remedy=remedy + failed, gains=dict(gains), backward=ran)


def _overshoot_first(gains: Mapping[str, float]) -> str:
    """Return what to change first where a gradient overflows and a memory can overshoot."""
    name, gain = max(gains.items(), key=lambda item: item[1], default=("", 0.0))
    if not gain > OVERSHOOTS:
        return ""
    return f"the gain of {name or 'the memory'} is {gain:.2g}, above 2: {REMEDY}; else "


def _call_of(model: nn.Module, inputs: Any, default_loss: bool) -> Callable[[], Any]:
    """Return a function that calls the model."""
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple):
        alone = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point()
        has = "return_loss" in inspect.signature(model.forward).parameters
        if default_loss and alone and has and inputs[0].ndim and inputs[0].shape[-1] > 1:
            return lambda: model(inputs[0], return_loss=True)
        return lambda: model(*inputs)
    if isinstance(inputs, Mapping):
        return lambda: model(**inputs)
    if callable(inputs):
        return inputs
    got = Words(type(inputs).__name__)
    raise wrong("inputs", got, "a tensor, a tuple of arguments, a mapping of keywords, or a function")


def _run(
    model: nn.Module, watch: Watch, call: Callable[[], Any], loss: Callable[[Any], Tensor] | None, backward: bool
) -> tuple[NotFinite | None, bool]:
    """Return (the first value that is not finite, whether the backward pass was run)."""
    output = call()
    kind = type(model).__name__
    if any(candidate.lasting for candidate in watch.candidates):
        return watch.found, False
    if (bad := first_bad(output)) is not None:
        what = "loss" if bad.ndim == 0 else "output"
        return watch.found or not_finite("", kind, what, bad, "forward"), False
    total = _default_loss(output) if loss is None else loss(output)
    if total is None:
        return None, False
    if not finite(total):
        return not_finite("", kind, "loss", total, "forward"), False
    if not (backward and total.requires_grad):
        return None, False
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not wanted:
        return None, False
    grads = torch.autograd.grad(total.sum(), tuple(wanted.values()), allow_unused=True)
    return watch.of_gradients(dict(zip(wanted, grads, strict=True))), True


def _default_loss(output: Any) -> Tensor | None:
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    first = next((x for _, x in tensors_in(output) if x.is_floating_point()), None)
    return None if first is None else first.float().mean() if first.element_size() < 4 else first.mean()


def _of_input(model: nn.Module, inputs: Any, watch: Watch, found: NotFinite) -> Diagnosis | None:
    """Find inputs, or a state, that were not finite before the call. (Infinite values may be intended, as in a
    mask.)
    """
    if found.phase == "backward" or (callable(inputs) and not isinstance(inputs, (Tensor, Mapping))):
        return None
    for name, x in tensors_in(dict(inputs) if isinstance(inputs, Mapping) else inputs, lazy=True):
        if not finite(x) and (watch.found is None or bool(x.isnan().any())):
            bad = not_finite("", type(model).__name__, f"input {name}".strip(), x, "before the call")
            remedy = "check the inputs"
            if "states." in name or "cache" in name:
                remedy = "diagnose the call that returned this state"
            elif x.ndim == 3:
                remedy += f": row {bad.index[0]}, token {bad.index[1]}"
            return Diagnosis(bad, remedy=remedy)
    return None


def _of(model: nn.Module, found: NotFinite, memories: Mapping[str, FaultWatcher]) -> Diagnosis:
    """Build the Diagnosis: the value, its place in a memory, and what to change."""
    name = next((n for n in memories if not n or found.module == n or found.module.startswith(n + ".")), None)
    place = None if name is None else memories[name].at(found.phase)
    if found.phase == "backward":
        return Diagnosis(found, place, "look for a root, a norm or a division at 0, or for products that overflow")
    if found.what == "loss":
        return Diagnosis(found, place, "the outputs are finite: check the loss and its targets")
    if bad := bad_parameters(model.get_submodule(found.module)):
        own, p = next(iter(bad.items()))
        full = f"{found.module}.{own}" if found.module else own
        return Diagnosis(_parameter(model, full, p), place, _of_parameters(len(bad_parameters(model)) - 1))
    remedy = place.remedy if place else ""
    return Diagnosis(
        found, place, remedy or "its inputs and parameters are finite: look for an overflow or a division by 0"
    )


def _parameter(model: nn.Module, name: str, p: Tensor) -> NotFinite:
    owner, _, own = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return not_finite(owner, kind, f"parameter {own}", p, "before the call")


def _of_parameters(others: int) -> str:
    more = f" ({others} other parameters are not finite either)" if others else ""
    return f"it was not finite before the call: look at the optimizer step or the checkpoint that it comes from{more}"


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Within this context compilation is off; buffers are restored afterwards."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
    try:
        if stance is None:
            yield
        else:
            with stance:
                yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
