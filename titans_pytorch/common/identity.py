"""The configuration that made a state: one line of JSON in the state. A module of another configuration refuses the
state and names the setting that differs.

The line holds the constructor's arguments that differ from their defaults. An argument that a later version adds is
missing in older states, which were made with its default. A state made by hand has None; only its shapes are checked.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from titans_pytorch.common.checks import Words, wrong

PLAIN = (bool, int, float, str, type(None))


def identity(function: Callable, given: Mapping[str, Any], without: Iterable[str] = (), **resolved) -> str:
    """Return the line of JSON.

    Args:
        function: the constructor.
        given: its arguments, by name.
        without: arguments that do not change the meaning of a state.
        resolved: values that replace given ones, such as a default that depends on other arguments.
    """
    used = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in without or name not in {**given, **resolved} or name == "self":
            continue
        value = describe(resolved.get(name, given.get(name)))
        if parameter.default is parameter.empty or value != describe(parameter.default):
            used[name] = value
    return json.dumps(used)


def describe(value: Any) -> Any:
    """Return a value as JSON; modules and other objects by their types, shapes and plain attributes."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, nn.Module):
        parts = {name or "module": _attributes(part) for name, part in value.named_modules()}
        return parts | {name: list(p.shape) for name, p in value.named_parameters()}
    if isinstance(value, Iterable) and not hasattr(value, "shape"):
        return [describe(part) for part in value]
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    if hasattr(value, "item"):  # NumPy's numbers
        return value.item()
    return _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    own = {name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, PLAIN)}
    own = {name: part for name, part in own.items() if not name.startswith("_") and name != "training"}
    return {"type": type(value).__name__, **own}


def check_identity(own: str, made_by: str | None, name: str, function: Callable | None = None) -> None:
    """Raise ValueError for a state (`name` in the message) that another configuration made. function: the constructor,
    for its defaults."""
    if made_by is None or made_by == own:
        return
    try:
        theirs = json.loads(made_by)
    except (TypeError, ValueError):
        theirs = None
    if not isinstance(theirs, dict):
        raise wrong(f"{name}.configuration", made_by, "as the call before returned it, or None")
    parameters = inspect.signature(function).parameters if function else {}
    defaults = {key: describe(p.default) for key, p in parameters.items() if p.default is not p.empty}
    _compare(json.loads(own), theirs, name, defaults)


def _compare(own: dict, theirs: dict, name: str, defaults: Mapping) -> None:
    absent = Words("its default")
    for key in [*own, *(key for key in theirs if key not in own)]:
        mine, other = (made.get(key, defaults.get(key, absent)) for made in (own, theirs))
        if isinstance(mine, dict) and isinstance(other, dict):
            _compare(mine, other, f"{name}.{key}", {})
        elif mine != other:
            raise wrong(f"{name}.{key}", _shown(other), repr(_shown(mine)))


def _shown(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
