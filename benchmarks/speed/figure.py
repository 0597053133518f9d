"""The figure of benchmark_speed.py: ratios to the peer with their goals, and the sweep over lengths and chunks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.plots import COLOURS, INK, new_figure, plain, save_png, style

from .report import value

ARM_COLOURS = dict(zip(("ours", "peer", "attention"), COLOURS, strict=False))
ARM_LABELS = {"ours": "ours", "peer": "titans-pytorch 0.5.5", "attention": "full attention"}
SWEPT = {
    "train": ("training tokens/s", lambda record, took: record["case"]["batch"] * record["case"]["tokens"] / took),
    "memory": ("training memory\nover idle, MB", lambda record, taken: taken / 1e6),
    "decode": ("decoded tokens/s", lambda record, rate: rate),
}


def draw(records: Sequence[Mapping[str, Any]], path: str | Path, subtitle: str) -> bool:
    """Draw the figure. Returns False if there is nothing to draw."""
    bars = _bars(records)
    swept = [record for record in records if record["case"]["sweep"]]
    chunks = sorted({record["case"]["sweep"]["chunk"] for record in swept})
    kept = [q for q in SWEPT if any(value(r, arm, q) is not None for r in swept for arm in ARM_COLOURS)]
    if not bars and not kept:
        return False
    heights = ([0.9 + 0.24 * len(bars)] if bars else []) + [2.1 * len(kept)] * bool(kept)
    with style():
        figure = new_figure(max(7.5, 2.1 * len(chunks) + 1), sum(heights) + 0.5)
        figure.suptitle(subtitle, fontsize=8, x=0.01, ha="left")
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if bars:
            _draw_ratios(next(parts), bars)
        if kept:
            _draw_sweep(next(parts), swept, chunks, kept)
    save_png(figure, path)
    return True


def _bars(records) -> list[tuple[str, float, float | None]]:
    """Return (label, factor over the peer, goal) of each ratio; for memory the factor of saving."""
    out = []
    for record in records:
        goals = {goal["quantity"]: goal["target"] for goal in record["goals"]}
        for quantity, ratio in record["ratios"].items():
            if record["case"]["sweep"]:
                continue
            goal = goals.get(quantity)
            if quantity == "memory":
                ratio, goal = 1 / ratio, goal and 1 / goal
            out.append((f"{record['name']}, {quantity}", ratio, goal))
    return out


def _draw_ratios(part, bars):
    axes = part.subplots()
    places = range(len(bars))[::-1]
    axes.barh(places, [ratio for _, ratio, _ in bars], height=0.6, color=COLOURS[0], label="measured")
    marked = [(place, goal) for place, (_, _, goal) in zip(places, bars, strict=True) if goal]
    if marked:
        y, x = zip(*marked, strict=True)
        axes.scatter(x, y, marker="|", s=150, linewidths=2.5, color=COLOURS[1], label="goal", zorder=3)
    for place, (_, ratio, _) in zip(places, bars, strict=True):
        axes.annotate(f"{ratio:.3g}x", (ratio, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(list(places), [label for label, _, _ in bars])
    axes.set_xscale("log")
    plain(axes.xaxis)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15, y=0.02)
    axes.set_title("how many times as fast as titans-pytorch 0.5.5 (memory: as small)")
    if marked:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_sweep(part, swept, chunks, kept):
    grid = part.subplots(len(kept), len(chunks), sharex=True, sharey="row", squeeze=False)
    lengths = sorted({record["case"]["tokens"] for record in swept})
    lines = {}
    for i, quantity in enumerate(kept):
        for axes, chunk in zip(grid[i], chunks, strict=True):
            for arm, colour in ARM_COLOURS.items():
                points = sorted(
                    (record["case"]["tokens"], SWEPT[quantity][1](record, measured))
                    for record in swept
                    if record["case"]["sweep"]["chunk"] == chunk
                    and (measured := value(record, arm, quantity)) is not None
                )
                if points:
                    style = "--" if arm == "attention" else "-"
                    (lines[arm],) = axes.plot(*zip(*points, strict=True), marker="o", color=colour, linestyle=style)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axes.set_xticks([], minor=True)
            axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
            plain(axes.yaxis)
            if i == 0:
                axes.set_title(f"chunk {chunk}")
            if i + 1 == len(kept):
                axes.set_xlabel("tokens")
        grid[i][0].set_ylabel(SWEPT[quantity][0])
    part.legend(lines.values(), [ARM_LABELS[arm] for arm in lines], loc="outside upper right", ncols=3)
