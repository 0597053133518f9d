"""Figure of a result: for each task the main metric of every arm, and the gains over controls, with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import COLOURS, INK, new_figure, save_png, style


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    tasks = result["tasks"]
    rows = [len(task["arms"]) for task in tasks.values()]
    with style():
        figure = new_figure(10.5, sum(1.2 + 0.27 * n for n in rows))
        grid = figure.subplots(len(tasks), 2, squeeze=False, height_ratios=[2 + n for n in rows])
        for (name, task), (left, right) in zip(tasks.items(), grid, strict=True):
            draw_values(left, name, task)
            draw_gains(right, name, task, result["versus"])
        seeds, threads = len(result["run"]["seeds"]), result["run"]["threads"]
        about = (
            f"{result['benchmark']}: {seeds} seed(s), means and 95 % intervals, {result['device']}, {threads} thread(s)"
        )
        figure.suptitle(about, fontsize=9, x=0.01, ha="left")
    save_png(figure, path)


def draw_values(axis, name: str, task: Mapping[str, Any]) -> None:
    metric = task["metrics"][0]["name"]
    arms = list(task["arms"].items())
    for i, (arm, record) in enumerate(arms):
        got = record["metrics"][metric]
        colour = COLOURS[0] if record["controls"] or "/" not in arm else COLOURS[2]
        point(axis, got, i, colour)
    axis.axvline(task["constant"][metric]["mean"], color=INK, linewidth=0.9, linestyle=":", label="constant answer")
    if task["naive"]:
        axis.axvline(
            task["naive"][metric]["mean"], color=COLOURS[1], linewidth=0.9, linestyle="--", label="naive memory"
        )
    axis.set_yticks(range(len(arms)), [arm for arm, _ in arms])
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_title(f"{name}: {metric} ({task['metrics'][0]['better']} is better)")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.12 if len(arms) > 4 else -0.25), ncols=2)


def draw_gains(axis, name: str, task: Mapping[str, Any], versus: Sequence[Mapping[str, Any]]) -> None:
    """Draw gains of arms over their best control, and over the arms they were compared with."""
    metric = task["metrics"][0]["name"]
    own = [(arm, r["gains"][metric]) for arm, r in task["arms"].items() if metric in r["gains"]]
    judged = [(f"{arm}\nover {gain['against'].partition('/')[2]}", gain) for arm, gain in own]
    judged += [(f"{v['arm']}\nover {v['other']}", v) for v in versus if v["what"] == f"{name}, {metric}"]
    for i, (_, gain) in enumerate(judged):
        good, bad = gain["verdict"].startswith("better"), gain["verdict"].startswith("worse")
        point(axis, gain, i, COLOURS[3] if good else COLOURS[1] if bad else COLOURS[2])
    axis.axvline(0.0, color=INK, linewidth=0.9)
    axis.set_yticks(range(len(judged)), [label for label, _ in judged], fontsize=8)
    axis.set_ylim(max(len(judged), 1) - 0.5, -0.5)
    axis.set_title(f"refused: {task['refused'].partition(':')[0]}" if task["refused"] else "gain (right of 0: better)")


def point(axis, got: Mapping[str, Any], row: int, colour: str) -> None:
    if got["low"] is not None:
        axis.plot((got["low"], got["high"]), (row, row), color=colour, linewidth=1.6)
    axis.plot(got["mean"], row, marker="o", color=colour)
