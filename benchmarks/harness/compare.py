"""Compares arms seed by seed: spreads, gains over controls, verdicts, rejected tasks, warnings."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .arms import Arm, controls_of, described
from .statistics import NO_DIFFERENCE, Spread, paired, spread
from .task import Metric, Task

Outcomes = Mapping[str, Sequence[Mapping[str, Any]]]  # arm name -> what Task.run returned, seed by seed


def summary(
    task: Task,
    arms: Sequence[Arm],
    outcomes: Outcomes,
    constants: Sequence[Mapping[str, float]],
    naive: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The result of one task. arms: with their controls; constants, naive: seed by seed, as outcomes."""
    refused = refusal(task, naive, constants)
    record: dict[str, Any] = {
        "settings": described(task),
        "metrics": [asdict(m) for m in task.metrics],
        "refused": refused,
        "constant": {m.name: stated([c[m.name] for c in constants]) for m in task.metrics},
        "naive": naive and {m.name: stated(of(naive, m.name)) for m in task.metrics},
        "arms": {arm.name: arm_record(task, arm, outcomes, refused) for arm in arms},
    }
    record["warnings"] = warnings(task, arms, record)
    return record


def arm_record(task: Task, arm: Arm, outcomes: Outcomes, refused: str | None) -> dict[str, Any]:
    mine = outcomes[arm.name]
    controls = [control.name for control in controls_of(arm)]
    graded = [m for m in task.metrics if m.better is not None and controls]
    against = {c: outcomes[c] for c in controls}
    gains = {m.name: gain(m, mine, against, refused, m.judged or m == task.metrics[0]) for m in graded}
    for m in graded:
        if m.beside:
            gains[m.name]["verdict"] = qualified(gains[m.name]["verdict"], m.beside, gains[m.beside]["side"])
    return {
        "about": arm.about,
        "memory": described(arm.memory),
        "parameters": mine[0]["parameters"],
        "state": mine[0].get("state"),
        "pages": pooled([o["pages"] for o in mine]),
        "metrics": {m.name: stated(of(mine, m.name)) for m in task.metrics},
        "notes": {name: stated([o["notes"][name] for o in mine]) for name in mine[0].get("notes", {})},
        "training": {"loss_tail": stated([o["training"]["loss_tail"] or math.nan for o in mine])},
        "controls": controls,
        "gains": gains,
    }


def gain(
    metric: Metric, mine: Sequence[Mapping], controls: Outcomes, refused: str | None = None, judged: bool = True
) -> dict[str, Any]:
    """Return the arm's gain over the best of its controls (above zero: better), seed by seed, and a verdict (None for a
    metric that is not judged).

    "better" needs an interval above zero against every control, "worse" one below zero against the best of them.
    """
    against = {name: difference(metric, mine, theirs) for name, theirs in controls.items()}
    best = min(against, key=lambda name: against[name].mean)
    if not judged:
        verdict = None
    elif refused is not None:
        verdict = "refused"
    elif all(s.side > 0 for s in against.values()):
        verdict = f"better than {' and '.join(against)}"
    elif against[best].side < 0:
        verdict = f"worse than {best}"
    else:
        verdict = NO_DIFFERENCE
    return {
        "against": best,
        **asdict(against[best]),
        "side": against[best].side,
        "verdict": verdict,
        "each": {name: asdict(s) for name, s in against.items()},
    }


def qualified(verdict: str | None, beside: str, side: int) -> str | None:
    """Qualify a verdict "better" by the metric beside it. side: above zero if that metric is better too."""
    if not (verdict or "").startswith("better") or side > 0:
        return verdict
    return f"{verdict}, but {beside} is {'worse' if side < 0 else 'no better'}"


def difference(metric: Metric, mine: Sequence[Mapping], theirs: Sequence[Mapping]) -> Spread:
    """Return the paired difference; above zero: mine are better."""
    return advantage(of(mine, metric.name), of(theirs, metric.name), metric.better)


def advantage(ours: Sequence[float], theirs: Sequence[float], better: str | None = "lower") -> Spread:
    """Return the advantage; above zero: ours are better."""
    return paired(ours, theirs) if better == "higher" else paired(theirs, ours)


def between(
    what: str, arm: str, other: str, ours: Sequence[float], theirs: Sequence[float], better: str | None = "lower"
) -> dict[str, Any]:
    """Compare two arms seed by seed: their difference (above zero: `arm` is better) and a verdict."""
    seen = advantage(ours, theirs, better)
    verdict = {1: f"better than {other}", -1: f"worse than {other}"}.get(seen.side, NO_DIFFERENCE)
    return {"what": what, "arm": arm, "other": other, **asdict(seen), "verdict": verdict}


def versus(name: str, task: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Apply `between` to pairs of arms in the judged metrics of a task's record; nothing if the task is rejected."""
    if task["refused"]:
        return []
    known = {m["name"]: m for m in task["metrics"]}
    judged = [m for i, m in enumerate(task["metrics"]) if m["judged"] or i == 0]

    def values(metric: str, *arms: str) -> list[Sequence[float]]:
        return [task["arms"][arm]["metrics"][metric]["values"] for arm in arms]

    lines = []
    for arm, other in pairs:
        for m in judged:
            line = between(f"{name}, {m['name']}", arm, other, *values(m["name"], arm, other), m["better"])
            if beside := m.get("beside"):
                side = advantage(*values(beside, arm, other), known[beside]["better"]).side
                line["verdict"] = qualified(line["verdict"], beside, side)
            lines.append(line)
    return lines


def improvement_pct(record: Mapping[str, Any], metric: str) -> float | None:
    """Return the gain of an arm (its record), in percent of the value of its best control, for a metric of which lower
    is better; None for an arm without controls."""
    if metric not in record["gains"]:
        return None
    gain = record["gains"][metric]["mean"]
    return 100 * gain / (record["metrics"][metric]["mean"] + gain)


def of(outcomes: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [o["metrics"][metric] for o in outcomes]


def stated(values: Sequence[float]) -> dict[str, Any]:
    return {**asdict(spread(values)), "values": list(values)}


def pooled(pages: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Pool page counts over the seeds: summed events and opportunities, mean occupancy, the rate of each seed."""
    seen = [p for p in pages if p]
    if not seen:
        return None
    events, opportunities = sum(p["events"] for p in seen), sum(p["opportunities"] for p in seen)
    return {
        "events": events,
        "layers": [sum(counts) for counts in zip(*(p["layers"] for p in seen), strict=True)],
        "opportunities": opportunities,
        "switch_rate": events / opportunities if opportunities else 0.0,
        "occupancy": [statistics.fmean(share) for share in zip(*(p["occupancy"] for p in seen), strict=True)],
        "switch_rates": [p["switch_rate"] for p in seen],
    }


def refusal(
    task: Task, naive: Sequence[Mapping[str, Any]] | None, constants: Sequence[Mapping[str, float]]
) -> str | None:
    """Why a memory task cannot show what protects a memory, in the words after which the reason comes, or None. naive,
    constants: seed by seed.
    """
    if task.forgetting is None or naive is None:
        return None
    who, main = "a plain memory of one head", task.metrics[0]
    seen = spread(of(naive, task.forgetting))
    if seen.side > 0:
        return None
    mine, level = of(naive, main.name), [c[main.name] for c in constants]
    if not all(math.isfinite(value) for value in (seen.mean, *mine)):
        return f"has diverged: {who} gives numbers that are not finite"
    learned = paired(mine, level) if main.better == "higher" else paired(level, mine)
    if main.better is not None and (learned.mean <= 0 or (learned.low is not None and learned.side <= 0)):
        means = f"{statistics.fmean(mine):.3g}, {statistics.fmean(level):.3g}"
        return f"has learned nothing: {who} is not seen to be better than the same answer always ({main.name} {means})"
    if seen.low is None and seen.mean > 0:
        return f"too few seeds: one does not show whether {who} forgets ({task.forgetting} {seen.mean:.3g})"
    got = f"{seen.mean:.3g}" if seen.low is None else f"{seen.mean:.3g} [{seen.low:.3g}, {seen.high:.3g}]"
    return f"too easy: {who} is not seen to forget ({task.forgetting} {got})"


def warnings(task: Task, arms: Sequence[Arm], record: Mapping[str, Any]) -> list[str]:
    from .switches import warning

    found = []
    main = task.metrics[0]
    level = record["constant"][main.name]["mean"]
    for arm in arms:
        mine = record["arms"][arm.name]
        if arm.pages > 1 and arm.controls:
            found.append(warning(arm.name, mine["pages"]))
        mean = mine["metrics"][main.name]["mean"]
        worse = mean < level if main.better == "higher" else mean > level
        if main.better is not None and (worse or not math.isfinite(mean)):
            found.append(f"{arm.name}: {main.name} {mean:.4g} is worse than the same answer always, {level:.4g}")
    return [line for line in found if line]
