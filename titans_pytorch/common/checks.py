"""Errors for wrong arguments: the argument, the expected value, the given value."""

import inspect
import math
from collections.abc import Callable, Mapping

LONGEST = 300  # characters of a value in a message


class Words(str):
    """A given value in words, printed without quotes."""

    def __repr__(self):
        return str(self)


def wrong(name: str, got, takes: str) -> ValueError:
    return ValueError(f"{name} must be {takes}, got {shown(got)}")


def shown(value) -> str:
    """Return repr in a line of bounded length."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer with more digits than Python prints, a list that contains itself
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 40]} ... ({len(text)} characters)"


def positive_int(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, value, "an integer of at least 1")
    return value


def positive_number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise wrong(name, value, "a finite number above 0")
    return value


def number_at_least_0(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise wrong(name, value, "a finite number of at least 0")
    return value


def number_or_none(value, name: str) -> float | None:
    threshold_or_none(value, name)
    if value is not None and not math.isfinite(value):
        raise wrong(name, value, "a finite number or None")
    return value


def threshold_or_none(value, name: str) -> float | None:
    """Check a threshold. Infinite values are allowed: they mean never and always."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
        raise wrong(name, value, "a number or None")
    return value


def one_of(value, allowed, name: str):
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, value, f"one of {', '.join(allowed)}")
    return value


def callable_or_none(value, name: str):
    if value is not None and not callable(value):
        raise wrong(name, value, "a callable or None")
    return value


def check_flags(function: Callable, given: Mapping) -> None:
    """Check a call of `function`: arguments whose default is True or False must be booleans. given: name -> value."""
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, bool):
            flags(**{name: given[name]})


def flags(**given) -> None:
    """Raise ValueError for values that are no booleans. The string "false" would count as true."""
    for name, value in given.items():
        if value is not True and value is not False and not _is_flag(value):
            raise wrong(name, value, "True or False")


def _is_flag(value) -> bool:
    """Return whether a value is a boolean, of Python or NumPy."""
    return hasattr(type(value), "__bool__") and value in (True, False)


def check_tokens(x, name: str, dim: int, weight=None, letters: str = "b n") -> None:
    """Check floating-point tokens [b n dim], each letter at least 1. Without autocast they need the dtype of the weight
    that they are multiplied with."""
    takes = f"a floating point tensor [{letters} {dim}]"
    if not hasattr(x, "is_floating_point"):
        raise wrong(name, Words(type(x).__name__), takes)
    if not x.is_floating_point():
        raise wrong(name, x.dtype, takes)
    shape = tuple(x.shape)
    if len(shape) != len(letters.split()) + 1 or shape[-1] != dim:
        raise wrong(name, shape, takes)
    if any(size == 0 for size in shape[:2]):
        raise wrong(name, shape, f"{takes} with at least one row and one token")
    if hasattr(weight, "is_floating_point") and weight.is_floating_point() and x.dtype != weight.dtype:
        from torch import is_autocast_enabled

        if not is_autocast_enabled(x.device.type):
            raise wrong(name, x.dtype, f"{weight.dtype}, the dtype of the parameters")


def of_kind(value, kinds, name: str, takes: str):
    if not isinstance(value, kinds):
        raise wrong(name, Words(type(value).__name__), takes)
    return value


class MissingPackage(ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


def missing(what: str, package: str, extra: str) -> MissingPackage:
    return MissingPackage(f"{what} needs {package}: pip install -e '.[{extra}]' in a clone of this repository")
