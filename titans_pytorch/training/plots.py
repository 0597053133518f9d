"""The loss curve of a run."""

import math
from pathlib import Path

from titans_pytorch.common.files import replacing
from titans_pytorch.training.metrics import read_metrics

__all__ = ["draw_loss_curve"]


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(total / weight)
    return out


def draw_loss_curve(metrics: Path, target: Path, title: str, levels: dict[str, float] | None = None) -> bool:
    """Draw bits per byte over steps, with `levels` as horizontal lines. Returns False if matplotlib is not
    installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_metrics(metrics)
    train = [(r["step"], r["loss"] / math.log(2)) for r in records if "loss" in r]
    held_out = [(r["step"], r["held_out_bits_per_byte"]) for r in records if "held_out_bits_per_byte" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(list(values)), color="tab:blue", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=3, label="held out (some)")
    for (name, value), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(target) as part:
        figure.savefig(part, dpi=120, format="png")
    return True
