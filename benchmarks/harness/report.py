"""A result as text and as CSV rows."""

from collections.abc import Iterator, Mapping
from typing import Any

from .arms import digest
from .tables import table


def show(result: Mapping[str, Any]) -> None:
    for name, task in result["tasks"].items():
        print("\n".join(task_lines(name, task, len(result["run"]["seeds"]))), end="\n\n")
    if result["versus"]:
        print("\n".join(versus_line(line) for line in result["versus"]), end="\n\n")
    times = result["timing"]["arms"]
    if times:
        print(f"time on {result['timing']['task']}, medians after warm-up (no part of any score)")
        rows = [(arm, f"{t['fwd_ms']:.1f}", f"{t['train_ms']:.1f}") for arm, t in times.items()]
        print(table(("arm", "forward ms", "training step ms"), rows))


def task_lines(name: str, task: Mapping[str, Any], seeds: int) -> Iterator[str]:
    metrics = [m["name"] for m in task["metrics"]]
    yield f"{name}: mean and half width of the 95 % interval over {seeds} seed{'s' if seeds > 1 else ''}"
    rows = [
        (arm, *(interval(r["metrics"][m]) for m in metrics), str(r["parameters"]), rate(r["pages"]), pages(r["pages"]))
        for arm, r in task["arms"].items()
    ]
    if task["naive"]:
        rows.append(("naive", *(interval(task["naive"][m]) for m in metrics), "", "", ""))
    rows.append(("constant", *(interval(task["constant"][m]) for m in metrics), "0", "", ""))
    yield table(("arm", *metrics, "parameters", "switch rate", "pages written"), rows)
    if task["refused"]:
        yield f"REFUSED, nothing is concluded: {task['refused']}"
    for line in task["warnings"]:
        yield f"warning: {line}"
    judged = [(arm, m, g) for arm, record in task["arms"].items() for m, g in record["gains"].items() if g["verdict"]]
    yield from (verdict_line(*found) for found in judged)
    if len(judged) > 3 and not task["refused"]:
        yield f"({len(judged)} verdicts at 95 %: about {len(judged) / 20:.1g} of them would differ by chance alone)"


def verdict_line(arm: str, metric: str, gain: Mapping[str, Any]) -> str:
    return f"{arm}, {metric}: {gain['verdict']} (gain over {gain['against']} {gain['mean']:+.4f}, {how_sure(gain)})"


def versus_line(line: Mapping[str, Any]) -> str:
    gain = f"gain {line['mean']:+.4f}, {how_sure(line)}"
    return f"{line['arm']} against {line['other']}, {line['what']}: {line['verdict']} ({gain})"


def how_sure(seen: Mapping[str, Any]) -> str:
    return (
        "one seed, no interval" if seen["low"] is None else f"95 % interval {seen['low']:+.4f} to {seen['high']:+.4f}"
    )


def interval(record: Mapping[str, Any]) -> str:
    mean, high = record["mean"], record["high"]
    return f"{mean:.4f}" if high is None else f"{mean:.4f} ± {high - mean:.4f}"


def rate(pages: Mapping[str, Any] | None) -> str:
    return "" if not pages else f"{pages['switch_rate']:.0%}"


def pages(record: Mapping[str, Any] | None) -> str:
    return "" if not record else " ".join(f"{share:.0%}" for share in record["occupancy"])


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = {
        "timestamp_utc": result["timestamp_utc"],
        "benchmark": result["benchmark"],
        "schema": result["schema"],
        "tag": result["tag"],
        "configuration": digest(result["config"]),
        "commit": result["run"]["commit"],
        "device": result["run"]["device"]["class"],
    }
    rows = []
    for name, task in result["tasks"].items():
        for arm, record in task["arms"].items():
            rows += [{**common, "task": name, "arm": arm, **row} for row in arm_rows(task, record)]
        for metric in task["metrics"]:
            rows.append({**common, "task": name, "arm": "constant", **metric_row(metric, task["constant"])})
    return rows


def arm_rows(task: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for metric in task["metrics"]:
        row = {**metric_row(metric, record["metrics"]), "parameters": record["parameters"]}
        if record["pages"]:
            row["switch_rate"] = record["pages"]["switch_rate"]
        if gain := record["gains"].get(metric["name"]):
            row |= {"control": gain["against"], "gain": gain["mean"], "gain_low": gain["low"]}
            row |= {"gain_high": gain["high"], "verdict": gain["verdict"]}
        yield row


def metric_row(metric: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    got = values[metric["name"]]
    row = {"metric": metric["name"], "better": metric["better"], "seeds": got["n"]}
    return {**row, **{k: got[k] for k in ("mean", "sd", "low", "high")}}
