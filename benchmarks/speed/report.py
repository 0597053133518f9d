"""Reports the measurements: ratios to the peer, goals, the share of the matrix-product rate, a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.operations import training_operations
from harness.tables import percent, seconds, size, table, times

from .cases import QUANTITIES

HEADER = ("case", "quantity", "ours", "peer", "attention", "to peer", "goal", "met", "of matmul")
VALUE = {"forward": "best", "train": "best", "memory": "over_idle", "decode": "tokens_per_second"}
SHOWN = {"forward": seconds, "train": seconds, "memory": size, "decode": lambda rate: f"{rate:.0f} tokens/s"}


def judge(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a case with `ratios`, `shares` and `goals`.

    ratios: of forward, train and decode how many times as fast as the peer, of memory the share of the peer's.
    shares: operations needed per second over the machine's matrix-product rate, measured in the same process.
    """
    ratios = {q: ratio for q in QUANTITIES if (ratio := _ratio(record, q)) is not None}
    forward = sum(record["operations"].values())
    needed = {"forward": forward, "train": training_operations(forward)}
    rate = record["matmul_operations_per_second"]
    shares = {q: needed[q] / took / rate for q in needed if rate and (took := value(record, "ours", q)) is not None}
    goals = [_goal(record, ratios, **goal) for goal in record["case"]["goals"]]
    return {**record, "ratios": ratios, "shares": shares, "goals": goals}


def value(record: Mapping[str, Any], arm: str, quantity: str) -> float | None:
    """Return seconds, bytes over idle, or tokens per second; None if not measured."""
    result = record["arms"].get(arm, {}).get(quantity)
    return result[VALUE[quantity]] if result is not None and result["status"] == "ok" else None


def _ratio(record: Mapping[str, Any], quantity: str) -> float | None:
    ours, peer = value(record, "ours", quantity), value(record, "peer", quantity)
    if ours is None or peer is None or min(ours, peer) <= 0:
        return None
    return peer / ours if quantity in ("forward", "train") else ours / peer


def _goal(record: Mapping[str, Any], ratios: Mapping[str, float], quantity: str, target: float) -> dict[str, Any]:
    """Judge a goal. `met` is None if ours or the peer was not measured."""
    goal: dict[str, Any] = {"quantity": quantity, "target": target, "got": None, "met": None}
    measured = "memory" if quantity == "gigabytes" else quantity
    if measured not in record["arms"]["ours"]:
        return goal
    ours = value(record, "ours", measured)
    if ours is None:
        return {**goal, "met": False}
    got = ours / 1e9 if quantity == "gigabytes" else ratios.get(quantity)
    if got is None:
        return goal
    return {**goal, "got": got, "met": got >= target if quantity in ("forward", "train", "decode") else got <= target}


def rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table, one for each quantity."""
    out = []
    for quantity in QUANTITIES:
        if quantity not in record["arms"]["ours"]:
            continue
        goal = next((g for g in record["goals"] if g["quantity"] in (quantity, _absolute(quantity))), None)
        ratio, share = record["ratios"].get(quantity), record["shares"].get(quantity)
        arms = [_cell(record["arms"].get(name, {}).get(quantity), quantity) for name in ("ours", "peer", "attention")]
        out.append(
            (
                record["name"] if not out else "",
                quantity,
                *arms,
                "" if ratio is None else times(ratio),
                "" if goal is None else _target(goal),
                "" if goal is None else {True: "yes", False: "no", None: "?"}[goal["met"]],
                "" if share is None else percent(share),
            )
        )
    return out


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, the failures, and the number of goals met."""
    lines = [table(HEADER, [row for record in records for row in rows(record)], left=2)]
    lines += [f"{record['name']}: {text}" for record in records for text in _troubles(record)]
    goals = [goal for record in records for goal in record["goals"]]
    if goals:
        met, open_ = sum(g["met"] is True for g in goals), sum(g["met"] is None for g in goals)
        lines.append(f"goals: {met} of {len(goals)} met" + (f", {open_} not judged" if open_ else ""))
    return "\n".join(lines)


def failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cases in which ours or full attention gave no result. Failures of the peer do not count."""
    return [
        f"{record['name']}: {name} {quantity}: {result['status']}"
        for record in records
        for name, results in record["arms"].items()
        if name != "peer"
        for quantity, result in results.items()
        if result["status"] != "ok"
    ]


def _absolute(quantity: str) -> str | None:
    return "gigabytes" if quantity == "memory" else None


def _target(goal: Mapping[str, Any]) -> str:
    return f"{goal['target']:g} GB" if goal["quantity"] == "gigabytes" else times(goal["target"])


def _cell(result: Mapping[str, Any] | None, quantity: str) -> str:
    if result is None:
        return ""
    return SHOWN[quantity](result[VALUE[quantity]]) if result["status"] == "ok" else result["status"]


def _troubles(record: Mapping[str, Any]) -> list[str]:
    out = []
    for name, results in record["arms"].items():
        said: dict[str, list[str]] = {}
        for quantity, result in results.items():
            if result["status"] != "ok":
                said.setdefault(f"{result['status']}: {result['message']}", []).append(quantity)
            elif "stopped" in result:
                stopped = result["stopped"]
                text = f"fewer repeats, {stopped['status']}: {stopped['message']}"
                said.setdefault(text, []).append(quantity)
        out += [f"{name}, {', '.join(quantities)}: {text}" for text, quantities in said.items()]
    if record["gate"].get("peer", {}).get("status") == "no answer":
        out.append(f"not compared with the peer, which gave no answer: {record['gate']['peer']['message']}")
    return out
