"""Whether two results may be compared at all: the same benchmark, schema, configuration and device type."""

from collections.abc import Mapping
from typing import Any

from .records import at

# flags that the configuration holds under other names, or the device
APART = {"quick", "device"}
FEWEST_CALLS = 3


class NotComparable(Exception):
    """Two results cannot be compared: one line for the user."""


def check_comparable(benchmark: str, baseline: Mapping[str, Any], latest: Mapping[str, Any]) -> None:
    same("benchmark", *(at(r, "benchmark") for r in (baseline, latest)), wanted=benchmark)
    same("schema", *(at(r, "schema") for r in (baseline, latest)))
    same("device", *(at(r, "run", "device", "type") for r in (baseline, latest)))
    ours, theirs = (at(r, "config") for r in (baseline, latest))
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        raise NotComparable("a result without its configuration")
    for name in sorted((set(ours) | set(theirs)) - APART):
        if name not in ours or name not in theirs:
            raise NotComparable(f"configuration: only the {'baseline' if name in ours else 'latest'} result has {name}")
        if ours[name] != theirs[name]:  # None is a valid value here
            raise NotComparable(f"configuration: {name}: baseline {ours[name]!r}, latest {theirs[name]!r}")
    same("seeds", *(at(r, "run", "seeds") for r in (baseline, latest)))


def same(what: str, baseline: Any, latest: Any, wanted: Any = None) -> None:
    if baseline is None or latest is None:
        raise NotComparable(f"{what} is missing in the {'baseline' if baseline is None else 'latest'} result")
    if wanted is not None and baseline != wanted:
        raise NotComparable(f"{what}: baseline {baseline!r}, takes {wanted!r}")
    if baseline != latest:
        raise NotComparable(f"{what}: baseline {baseline!r}, latest {latest!r}")


def times_differ(baseline: Mapping[str, Any], latest: Mapping[str, Any]) -> str | None:
    """Return why times of the two results cannot be compared, or None."""
    for what, path in (("machine class", ("run", "device", "class")), ("threads", ("run", "threads"))):
        ours, theirs = at(baseline, *path), at(latest, *path)
        if ours is None or ours != theirs:
            return f"{what}: baseline {ours!r}, latest {theirs!r}"
    fewest = min(at(r, "timing", "repeats") or 0 for r in (baseline, latest))
    return f"{fewest} timed calls, takes {FEWEST_CALLS}" if fewest < FEWEST_CALLS else None
