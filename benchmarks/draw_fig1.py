"""fig1.png: how it works. A segment reads the memory, attention mixes, the segment is written; a gate, pages.

python benchmarks/draw_fig1.py              # fig1.png of the repository
python benchmarks/draw_fig1.py other.png
"""

import math
import sys
from collections.abc import Sequence

from harness.environment import REPOSITORY
from harness.plots import COLOURS, FAINT, INK, new_figure, save_png, style

from titans_pytorch.training.options import OneLineParser

BLUE, ORANGE, GREY, GREEN, PURPLE = COLOURS
PAPER = "#ffffff"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = OneLineParser(description=__doc__)
    arguments.add_argument("png", nargs="?", default=str(REPOSITORY / "fig1.png"), help="output file [fig1.png]")
    path = arguments.parse_args(argv).png
    try:
        draw(path)
    except OSError as error:
        print(f"draw_fig1.py: {path}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def draw(path: str) -> None:
    with style():
        figure = new_figure(10.4, 6.4)
        upper, lower = figure.subplots(2, 1, height_ratios=(3.1, 1.35))
        for axes in (upper, lower):
            axes.set_axis_off()
        upper.set(xlim=(0, 104), ylim=(0, 47))
        draw_reading(upper)
        lower.set(xlim=(0, 104), ylim=(0, 19.5))
        draw_gate(lower)
    save_png(figure, path)


# --- above: one segment -------------------------------------------------------------------------------------------


def draw_reading(axes) -> None:
    axes.text(
        0,
        45.6,
        "Neural memory learns at test time (here: memory as context)",
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    for start, name, colour in ((24, "segment t - 1", FAINT), (43, "segment t", BLUE), (62, "segment t + 1", FAINT)):
        tokens(axes, start, 38.6, 7, colour, label=name)
    axes.text(22.5, 39.6, "the sequence ...", ha="right", va="center", fontsize=9, color=GREY)

    memory(axes, 1.5, 11.6, "fast weights before", "written with segments 1 to t - 1")
    memory(axes, 84.5, 11.6, "fast weights after", "also written with segment t")

    # the input of attention
    box(axes, 30, 20.2, 44, 8.2, PAPER, FAINT)
    axes.text(52, 29.9, "input of attention", ha="center", fontsize=9, color=GREY)
    tokens(axes, 32.2, 23.6, 4, PURPLE, label="persistent\ntokens", below=True)
    tokens(axes, 43.2, 23.6, 7, ORANGE, label="read from\nthe memory", below=True)
    tokens(axes, 59.0, 23.6, 7, BLUE, label="segment t", below=True)

    box(axes, 38, 8.2, 28, 5.6, GREEN, GREEN)
    axes.text(52, 11, "attention within the segment", ha="center", va="center", fontsize=10.5, color=PAPER)
    axes.text(52, 2.0, "output of the segment", ha="center", va="center", fontsize=9.5)

    arrow(axes, (48.6, 38.2), (63.5, 26.6), BLUE, curve=-0.18)
    arrow(axes, (46, 38.2), (20.4, 28.6), ORANGE, curve=0.1)
    numbered(axes, 28.6, 36.2, 1, "read: M(q) for each token's query q", ORANGE, right=True)
    arrow(axes, (19.6, 24.4), (30, 24.4), ORANGE)
    arrow(axes, (52, 20.2), (52, 13.9), GREEN)
    numbered(axes, 53.6, 16.9, 2, "attend", GREEN)
    arrow(axes, (52, 8.2), (52, 3.4), INK)
    arrow(axes, (66, 11), (84, 17.0), BLUE, curve=0.1)
    numbered(axes, 66.6, 6.2, 3, "write: gradient descent", BLUE)
    axes.text(68.5, 4.0, "surprise = -gradient of |M(k) - v|²", fontsize=8.5, va="center")
    axes.text(68.5, 1.9, "learning rate, momentum and forget gate depend on tokens", fontsize=8.5, va="center")


def memory(axes, x: float, y: float, title: str, text: str) -> None:
    """Draw a stack of pages, the first as a small network."""
    for back in (2, 1, 0):
        box(axes, x + 1.1 * back, y + 1.1 * back, 16.5, 15.5, PAPER, ORANGE if back == 0 else FAINT)
    layers = [(x + 2.8, 3), (x + 8.2, 5), (x + 13.6, 3)]
    places = [[(at, y + 7.75 + 2.7 * (i - (n - 1) / 2)) for i in range(n)] for at, n in layers]
    for left, right in zip(places, places[1:], strict=False):
        for a in left:
            for b in right:
                axes.plot(*zip(a, b, strict=True), color=ORANGE, linewidth=0.6, alpha=0.55)
    for layer in places:
        axes.plot(*zip(*layer, strict=True), "o", color=ORANGE, markersize=4)
    axes.text(x + 9.2, y + 21.2, title, ha="center", fontsize=10, fontweight="bold")
    axes.text(x + 9.2, y - 1.8, text, ha="center", fontsize=8.5, color=GREY)


def tokens(axes, x: float, y: float, count: int, colour: str, label: str, below: bool = False) -> None:
    for i in range(count):
        box(axes, x + 2.05 * i, y, 1.75, 2.0, colour, colour, sharp=True)
    middle = x + 2.05 * count / 2
    if below:
        axes.text(middle, y - 0.5, label, ha="center", va="top", fontsize=7.5, linespacing=0.95)
    else:
        axes.text(middle, y + 3.4, label, ha="center", va="center", fontsize=9)


def box(axes, x, y, width, height, face, edge, sharp: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    rounding = 0.15 if sharp else 0.9
    shape = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=1.2))


def arrow(axes, start, end, colour, curve: float = 0.0) -> None:
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", end, start, arrowprops=look)


def numbered(axes, x, y, number: int, text: str, colour: str, right: bool = False) -> None:
    circle = {"boxstyle": "circle,pad=0.22", "facecolor": colour, "edgecolor": colour}
    axes.text(x, y, str(number), color=PAPER, fontsize=9, fontweight="bold", ha="center", va="center", bbox=circle)
    axes.text(x - 1.9 if right else x + 1.9, y, text, fontsize=9.5, va="center", ha="right" if right else "left")


# --- below: gate and pages along the sequence ---------------------------------------------------------------------


def draw_gate(axes) -> None:
    """Schematic: complexity rises where another context begins; above the threshold the page is switched."""
    axes.plot([0, 104], [19.2, 19.2], color=FAINT, linewidth=0.8)
    axes.text(0, 16.9, "Optional: a gate and pages", fontsize=11, fontweight="bold", va="center")
    lines = (
        "The gate scores the complexity of tokens.",
        "Complex chunks forget less. Above the",
        "threshold the memory writes to the next",
        "page. Inactive pages do not change.",
    )
    for i, line in enumerate(lines):
        axes.text(0, 13.4 - 2.6 * i, line, fontsize=9, va="center")
    left, right, base = 36.0, 102.0, 5.2
    turns = (53.0, 75.0)
    edges = (left, *turns, right)
    for page, (start, end) in zip((1, 2, 1), zip(edges, edges[1:], strict=False), strict=True):
        colour = ORANGE if page == 1 else PURPLE
        axes.fill_between([start, end], 0.4, 3.6, color=colour, alpha=0.85, linewidth=0)
        axes.text(
            (start + end) / 2, 2.0, f"page {page} is written", ha="center", va="center", fontsize=8.5, color=PAPER
        )
    xs = [left + (right - left) * i / 400 for i in range(401)]
    ys = [
        base + 1.6 + 0.5 * math.sin(x * 1.3) + 0.35 * math.sin(x * 3.1) + sum(bump(x, at) for at in turns) for x in xs
    ]
    axes.plot(xs, ys, color=INK, linewidth=1.5)
    axes.plot([left, right], [base + 6.2] * 2, "--", color=GREY, linewidth=1)
    axes.text(left, base + 7.4, "threshold", fontsize=8.5, color=GREY, va="center")
    axes.text(left, base + 3.6, "complexity", fontsize=8.5, va="center")
    for at in turns:
        axes.plot([at, at], [0.4, base + 10.5], color=BLUE, linewidth=1)
        axes.text(at + 0.8, base + 10.6, "another context: switch the page", fontsize=8.5, color=BLUE, va="center")


def bump(x: float, at: float) -> float:
    return 7.0 * math.exp(-(((x - at - 0.3) / 1.5) ** 2))


if __name__ == "__main__":
    sys.exit(main())
