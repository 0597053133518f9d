"""Figures for light and dark pages: a pale background, dark lines, colours that differ in lightness."""

import importlib.util
from pathlib import Path

from titans_pytorch.common.checks import missing
from titans_pytorch.common.files import replacing

GROUND, INK, FAINT = "#fbfbf9", "#1f2328", "#c9ccd1"
COLOURS = ("#0b5cad", "#d9541e", "#6b7280", "#2a8f5c", "#8a4fbf")  # colour-blind safe in this order
STYLE = {
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def check_drawing() -> None:
    """Raise MissingPackage if figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("a picture", "matplotlib", "bench")


def new_figure(width: float, height: float):
    """Make a matplotlib figure in this style, in inches. Draw on it inside `with style():`."""
    check_drawing()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style():
    check_drawing()
    from matplotlib import rc_context

    return rc_context(STYLE)


def plain(axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 of each decade if they fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def save_png(figure, path: str | Path) -> None:
    with style(), replacing(path) as part:
        figure.savefig(part, format="png", dpi=130, facecolor=GROUND)
