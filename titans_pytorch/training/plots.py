"""The pictures of a run: its loss over the steps, and the accuracy on a task with writing on and off."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pytorch.common.files import replacing
from titans_pytorch.training.metrics import RunningMean, read_metrics

__all__ = ["draw_accuracy", "draw_loss_curve"]

ON, OFF, GUESS = "tab:blue", "tab:orange", "gray"


def draw_loss_curve(
    metrics: Path, target: Path, title: str, unit: str = "byte", levels: dict[str, float] | None = None
) -> bool:
    """Draw the loss in bits over the steps.

    Args:
        metrics: of the run, a line of JSON for each step.
        target: the file, a PNG.
        title: of the picture.
        unit: what one prediction is.
        levels: name -> bits, drawn as horizontal lines.

    Returns:
        False if matplotlib is not installed.
    """
    figure = new_figure(8)
    if figure is None:
        return False
    records = read_metrics(metrics)
    train = [(r["step"], r["loss"] / math.log(2)) for r in records if "loss" in r]
    held_out = [(r["step"], r["held_out_bits_per_byte"]) for r in records if "held_out_bits_per_byte" in r]
    axes = figure.subplots()
    if train:
        steps, values = zip(*train, strict=True)
        mean = RunningMean()
        axes.plot(steps, values, color=ON, alpha=0.25, linewidth=0.8)
        axes.plot(steps, [mean.add(value) for value in values], color=ON, label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=OFF, marker="o", markersize=3, label="held out (some)")
    for (name, value), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=GUESS, linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    axes.set(xlabel="training step", ylabel=f"bits per {unit}", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return saved(figure, target)


def draw_accuracy(
    metrics: Path, target: Path, title: str, name: str, chance: float, scores: Sequence[dict[str, Any]] = ()
) -> bool:
    """Draw the accuracy on a task: over the steps and, beside it, at the end, each with writing on and off.

    Args:
        metrics: of the run, a line of JSON for each step.
        target: the file, a PNG.
        title: of the picture.
        name: of the accuracy in the metrics; NAME_storing_off beside it is the one with writing switched off.
        chance: the accuracy of guessing, drawn as a line.
        scores: the final ones, with `length`, `accuracy` and, if there is a memory, `storing_off`.

    Returns:
        False if matplotlib is not installed.
    """
    figure = new_figure(9.5 if scores else 6)
    if figure is None:
        return False
    records, panels = read_metrics(metrics), [1.9, 1.0] if scores else [1.0]
    axes, *beside = figure.subplots(1, len(panels), squeeze=False, width_ratios=panels, sharey=True)[0]
    memory = any(f"{name}_storing_off" in r for r in records)
    for key, colour, label in (
        (name, ON, "writing on" if memory else "this model"),
        (f"{name}_storing_off", OFF, "writing off"),
    ):
        found = [(r["step"], 100 * r[key]) for r in records if key in r]
        if found:
            axes.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set(xlabel="training step", ylabel="accuracy on held-out rows, %", ylim=(0, 108))
    for one in (axes, *beside):
        one.axhline(100 * chance, color=GUESS, linestyle="--", linewidth=1, label=f"chance {chance:.1%}")
        one.grid(alpha=0.3, axis="y")
    axes.legend(loc="center right")
    if beside:
        final_bars(beside[0], scores)
    figure.suptitle(title, fontsize=10)
    return saved(figure, target)


def final_bars(axes: Any, scores: Sequence[dict[str, Any]]) -> None:
    """Draw a pair of bars for each length, each with its number."""
    kinds = [kind for kind in (("accuracy", ON), ("storing_off", OFF)) if kind[0] in scores[0]]
    width = 0.8 / len(kinds)
    for i, (key, colour) in enumerate(kinds):
        at = [j + (i - (len(kinds) - 1) / 2) * width for j in range(len(scores))]
        bars = axes.bar(at, [100 * score[key] for score in scores], width, color=colour)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of the line of chance
        axes.bar_label(bars, fmt="%.1f %%", fontsize=8, padding=4, bbox=clear)
    axes.set_xticks(range(len(scores)), [f"{score['length']:,} tokens" for score in scores])
    axes.set_xlabel("after training")


def new_figure(width: float) -> Any:
    """Return a figure of `width` inches; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, 4.5), layout="constrained")


def saved(figure: Any, target: Path) -> bool:
    with replacing(target) as part:
        figure.savefig(part, dpi=120, format="png")
    return True
