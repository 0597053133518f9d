"""Figure of traces: one column for each memory."""

from pathlib import Path

from titans_pytorch.analysis.trace import MemoryTrace
from titans_pytorch.common.files import replacing

__all__ = ["ROWS", "plot_traces"]

# field of a trace, and what it is called
ROWS = (
    ("surprise", "inner loss"),
    ("step", "learning rate"),
    ("decay", "forget gate"),
    ("momentum", "momentum"),
    ("change", "|M - M0| / |M0|"),
)


def smoothed(values: list[float], width: int) -> list[float]:
    """Return means over `width` neighbours, fewer at the ends."""
    half = width // 2
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def plot_traces(traces: list[MemoryTrace], target: Path, title: str = "") -> bool:
    """Draw every trace over position, thin, with a running mean, to a PNG.

    Args:
        traces: result of `trace_memories`.
        target: the file; its folder is made.
        title: title of the figure.

    Returns:
        False, with nothing drawn, if matplotlib (the extra `bench`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(3.6 * len(traces) + 0.6, 8.5), layout="constrained")
    grid = figure.subplots(len(ROWS), len(traces), squeeze=False, sharex=True, sharey="row")
    for column, trace in enumerate(traces):
        for row, (name, label) in enumerate(ROWS):
            axes, values = grid[row][column], getattr(trace, name)
            every = trace.piece if name == "change" else trace.tokens_per_entry
            positions = [(i + 1) * every for i in range(len(values))]
            if name == "change":
                axes.plot(positions, values, color="tab:orange", marker="o", markersize=2.5)
            else:
                axes.plot(positions, values, color="tab:blue", alpha=0.25, linewidth=0.6)
                axes.plot(positions, smoothed(values, max(1, len(values) // 40)), color="tab:blue", linewidth=1.4)
            if not values:
                axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray")
            if column == 0:
                axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        grid[0][column].set_title(trace.name, fontsize=9)
        grid[-1][column].set_xlabel("tokens read")
    figure.suptitle(title, fontsize=10)
    with replacing(target) as part:
        figure.savefig(part, dpi=120, format="png")
    return True
