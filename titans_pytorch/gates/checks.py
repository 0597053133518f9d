"""Checks of constructor arguments: each returns the value, or raises a ValueError that names the argument."""

import math
from numbers import Integral, Real


def int_between(name: str, value, least: int = 1, most: int | None = None) -> int:
    right = isinstance(value, Integral) and not isinstance(value, bool)
    if not right or value < least or (most is not None and value > most):
        takes = f"an int of at least {least}" if most is None else f"an int in [{least}, {most}]"
        raise ValueError(f"{name} must be {takes}, got {value!r}")
    return int(value)


def number(name: str, value) -> float:
    if not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def positive(name: str, value) -> float:
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def fraction(name: str, value, zero: bool = True) -> float:
    """Return a number in [0, 1], or in (0, 1] with `zero = False`."""
    if not _is_finite(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}")
    return float(value)


def one_of(name: str, value, choices: tuple):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
