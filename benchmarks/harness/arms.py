"""Arms: the memories that are compared, and the controls that belong to each.

An arm is stated in keywords of NeuralMemory. Its controls follow from it:

    NAME/plain   a memory without gates and pages, with as many heads (heads x pages, so the same state) and at least as
                 many parameters: a small map before the memory, initially zero, has as many as the gates.
    NAME/never   the arm itself with a page threshold that nothing exceeds; for an arm without pages, the arm with
                 `off` (its idea switched off), if it names one.

Modules, gates apart, are made in the same order, so that a seed gives an arm and its controls the same initial values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import titans_pytorch

from .later import torch

# keywords of gates, kinetics and pages, which a plain memory lacks
OPTIONAL = {
    "use_symplectic_gating",
    "symplectic_gate_kwargs",
    "symplectic_gate",
    "use_dmd_gating",
    "dmd_window",
    "combine_symplectic_and_dmd",
    "manifold_state_keyed_paging",
    "hierarchical_paging",
    "coarse_pages",
    "fine_pages",
    "hierarchy_mix",
    "kinetics_coupling",
    "kinetics_mix",
    "kinetics_eps",
    "num_pages",
    "symplectic_page_threshold",
    "page_switch_every",
    "page_router",
    "page_threshold_quantile",
    "page_threshold_window",
    "read_active_page_only",
}
# those of them that add no parameters
WITHOUT_PARAMETERS = {
    "symplectic_page_threshold",
    "page_switch_every",
    "page_threshold_quantile",
    "page_threshold_window",
    "read_active_page_only",
    "manifold_state_keyed_paging",
    "dmd_window",
}
NEVER = math.inf


def neural_memory(*args: Any, **keywords: Any) -> titans_pytorch.NeuralMemory:
    return titans_pytorch.NeuralMemory(*args, **keywords)


@dataclass(frozen=True)
class Arm:
    """One memory of an experiment.

    name: without "/".
    memory: keywords of NeuralMemory; they override the task's.
    about: one line for the reader.
    off: keywords that switch the arm's idea off, for the control NAME/never of an arm without pages.
    switch_rate: switches per opportunity that the page threshold is set for, on training data, before and during
        training; None: the threshold stays as stated.
    make: builds the memory from its keywords (default NeuralMemory); a function at the top level of a module.
    penalty: (model, calls) -> a loss added in training; a function or a dataclass with __call__. calls: a
        switches.Call for each call of a paged memory in that step, its complexity with a gradient.
    controls: False for an arm that is itself a control, and gets none.
    """

    name: str
    memory: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    off: Mapping[str, Any] | None = None
    switch_rate: float | None = None
    make: Callable[..., torch.nn.Module] = neural_memory
    penalty: Callable[[torch.nn.Module, list], torch.Tensor] | None = None
    controls: bool = True
    like: Arm | None = None  # the arm whose number of parameters this control has

    @property
    def pages(self) -> int:
        return self.memory.get("num_pages", 1)

    @property
    def optional(self) -> bool:
        """Whether the arm has gates, kinetics, pages or a penalty."""
        return bool(OPTIONAL & set(self.memory)) or self.penalty is not None

    def what(self) -> dict[str, Any]:
        """Everything that the arm's numbers depend on, so not its name."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        said = {k: v for k, v in known.items() if k not in ("name", "about", "off", "controls", "like")}
        return {**described(said), "like": None if self.like is None else self.like.what()}


def plain(arm: Arm) -> Arm:
    """Return the control NAME/plain."""
    kept = {k: v for k, v in arm.memory.items() if k not in OPTIONAL}
    if arm.pages > 1:
        kept["heads"] = kept.get("heads", 1) * arm.pages
    # arms with equal parameters share a plain memory, which is then run once
    sized = {k: v for k, v in arm.memory.items() if k not in WITHOUT_PARAMETERS}
    like = replace(arm, memory=sized, switch_rate=None, penalty=None)
    return Arm(f"{arm.name}/plain", kept, "as many heads and parameters, no gates, no pages", controls=False, like=like)


def never(arm: Arm) -> Arm | None:
    """Return the control NAME/never, or None for an arm that has nothing to switch off."""
    off = dict(arm.off or {})
    if arm.pages > 1:
        off |= {"symplectic_page_threshold": NEVER, "page_threshold_quantile": None}
    if not off:
        return None
    about = "the same, but no page is ever turned" if arm.pages > 1 else "the same, its idea switched off"
    memory = {**arm.memory, **off}
    return replace(arm, name=f"{arm.name}/never", memory=memory, about=about, switch_rate=None, controls=False)


def controls_of(arm: Arm) -> list[Arm]:
    if not arm.controls or not (arm.optional or arm.off):
        return []
    return [control for control in (plain(arm), never(arm)) if control is not None]


# the parameters that a plain memory has in place of gates


def _mapped(memory: titans_pytorch.NeuralMemory, args: tuple, kwargs: dict):
    return (memory.matched(args[0]), *args[1:]), kwargs


def match_parameters(model: torch.nn.Module, wanted: int) -> None:
    """Give each memory in the model a map before it, until the model has at least `wanted` parameters."""
    from .map import Map

    lacking = wanted - parameters(model)
    memories = [m for m in model.modules() if isinstance(m, titans_pytorch.NeuralMemory)]
    if lacking <= 0 or not memories:
        return
    for memory in memories:
        rank = math.ceil(lacking / (2 * memory.dim * len(memories)))
        memory.matched = Map(memory.dim, rank)
        memory.register_forward_pre_hook(_mapped, with_kwargs=True)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def state_size(model: torch.nn.Module) -> int:
    """Count the numbers that the memories of the model carry for one row: fast weights and momenta."""
    memories = [m for m in model.modules() if isinstance(m, titans_pytorch.NeuralMemory)]
    return sum(w.numel() * (1 + m.engine.rule.slots) for m in memories for w in m.init_weights(1).values())


def build(task, arm: Arm, seed: int, device: str = "cpu") -> torch.nn.Module:
    """Build the model of an arm on a task, with initial values drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build(arm)
        if arm.like is not None:
            with torch.random.fork_rng(devices=[]):
                wanted = parameters(task.build(arm.like))
            match_parameters(model, wanted)
    return model.to(device)


# descriptions, for records and to recognise results of the same arm


def described(value: Any) -> Any:
    """Describe a value in JSON: functions and classes by name, dataclasses by field."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__qualname__, **fields}
    name = getattr(value, "__qualname__", None)
    if name is None or "<" in name:
        raise TypeError(f"{value!r} cannot be described: take a named function, a class or a dataclass")
    return f"{value.__module__}.{name}"


def digest(value: Any, length: int = 16) -> str:
    text = json.dumps(described(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
