"""The numbers to compare, and the tolerance of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.statistics import t_quantile

from .comparable import NotComparable
from .records import at

LEVEL = 0.99
# task -> its metrics, and whether lower or higher is better
SYMPLECTIC = {
    "spiral": {"error": "lower"},
    "helix_drift": {"error": "lower"},
    "long_horizon_recovery": {"clean_mse_post": "lower", "phase_recovery_gain": "higher"},
}
CODEBOOK = {
    "long_horizon": {"clean_mse_post": "lower", "phase_err_post": "lower"},
    "interference": {"error_a_after": "lower"},
}
TIMED = {"symplectic": "symplectic_phase_paging", "codebook_transfer": "codebook_champion_paging"}
Shares = Mapping[str, float]  # "lower", "higher", "time" -> share of the baseline that a number may always be worse by


@dataclass(frozen=True)
class Check:
    """worse: how much worse the latest is (below zero: better); tolerance: how much worse it may be."""

    name: str
    baseline: float
    latest: float
    worse: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worse <= self.tolerance  # False for NaN


def check(name: str, spread: Mapping[str, Any] | None, latest: Any, better: str, share: float) -> Check:
    """spread: n, mean and sd in the baseline; latest: the mean."""
    ours = number(name, "baseline", at(spread or {}, "mean"))
    theirs = number(name, "latest", latest)
    if not math.isfinite(ours):
        raise NotComparable(f"{name}: not a finite number in the baseline")
    tolerance = max(chance(spread["n"], spread["sd"]), share * abs(ours))
    return Check(name, ours, theirs, theirs - ours if better == "lower" else ours - theirs, tolerance)


def chance(n: int, sd: float | None) -> float:
    """Return the one-sided 99 % bound of the difference between means of two sets of n seeds; 0 for one seed."""
    return 0.0 if n < 2 or sd is None else t_quantile(LEVEL, n - 1) * sd * math.sqrt(2 / n)


def number(name: str, which: str, value: Any) -> float:
    """Return a number; null, which stands for values that are not finite in a result file, as NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NotComparable(f"{name}: {value!r} in the {which} result, takes a number")
    return float(value)


def quality_checks(
    metrics: Mapping[str, Mapping[str, str]], baseline: Mapping[str, Any], latest: Mapping[str, Any], shares: Shares
) -> list[Check]:
    """Check the metrics of every arm but controls."""
    out = []
    for task, wanted in metrics.items():
        arms = [arm for arm in at(baseline, "tasks", task, "arms") or {} if "/" not in arm]
        if not arms:
            raise NotComparable(f"tasks.{task} is missing in the baseline result")
        for arm in arms:
            for metric, better in wanted.items():
                path = ("tasks", task, "arms", arm, "metrics", metric)
                spreads = [at(r, *path) for r in (baseline, latest)]
                for which, found in zip(("baseline", "latest"), spreads, strict=True):
                    if not isinstance(found, Mapping) or not {"n", "mean", "sd"} <= set(found):
                        raise NotComparable(f"{'.'.join(path)} is missing in the {which} result")
                out.append(check(f"{task} {arm} {metric}", spreads[0], spreads[1]["mean"], better, shares[better]))
    return out


def symplectic_checks(baseline: Mapping[str, Any], latest: Mapping[str, Any], shares: Shares) -> list[Check]:
    return quality_checks(SYMPLECTIC, baseline, latest, shares)


def codebook_checks(baseline: Mapping[str, Any], latest: Mapping[str, Any], shares: Shares) -> list[Check]:
    checks = quality_checks(CODEBOOK, baseline, latest, shares)
    for arm, variant in (at(baseline, "variants") or {}).items():
        if "/" in arm:
            continue
        theirs, spread = at(latest, "variants", arm), at(variant, "transfer_score_spread")
        if spread is None or "transfer_score" not in (theirs or {}):
            raise NotComparable(f"variants.{arm}.transfer_score is missing")
        score = theirs["transfer_score"]
        checks.append(check(f"{arm} transfer_score", spread, score, "lower", shares["lower"]))
    return checks


def time_checks(benchmark: str, baseline: Mapping[str, Any], latest: Mapping[str, Any], shares: Shares) -> list[Check]:
    """Check forward and training step of one arm; times up to the slowest call of the baseline pass."""
    out = []
    for kind in ("fwd_ms", "train_ms"):
        path = ("timing", "arms", TIMED[benchmark])
        ours, theirs = (number(kind, which, at(r, *path, kind)) for which, r in named(baseline, latest))
        calls = at(baseline, *path, f"{kind}_calls") or [ours]
        tolerance = max(max(calls) - ours, shares["time"] * ours)
        out.append(Check(f"{TIMED[benchmark]} {kind}", ours, theirs, theirs - ours, tolerance))
    return out


def named(baseline: Mapping[str, Any], latest: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return ("baseline", baseline), ("latest", latest)
