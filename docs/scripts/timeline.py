"""Draws docs/images/timeline.svg: when tokens are written and which fast weights each reads.

python docs/scripts/timeline.py
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from titans_pytorch.common.files import replacing
from titans_pytorch.training.options import OneLineParser

CHUNK, BATCH, TOKENS = 4, 8, 16
INK, PAPER, LINE = "#263238", "#fafafa", "#90a4ae"
SHADES = ("#b0bec5", "#90caf9", "#a5d6a7", "#ffcc80", "#ce93d8")  # of the entries M_0, M_1, ...
TOKEN_ROW, READ_ROW, START_ROW = 3.0, 1.6, 0.2


def box(axes, start: float, stop: float, y: float, colour: str, text: str, **style) -> None:
    """Draw a box from token `start` to before token `stop`."""
    rounded = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch((start + 0.05, y), stop - start - 0.1, 0.6, boxstyle=rounded, linewidth=0)
    patch.set(facecolor=colour, **style)
    axes.add_patch(patch)
    axes.text((start + stop) / 2, y + 0.3, text, ha="center", va="center", color=INK, fontsize=9)


def draw() -> Figure:
    figure = Figure(figsize=(9, 3.4), facecolor=PAPER)
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set(xlim=(-3.3, TOKENS + 0.4), ylim=(-0.45, 4.75))
    axes.axis("off")
    for y, label in (
        (TOKEN_ROW, "tokens, in chunks"),
        (READ_ROW, "fast weights that\na token reads"),
        (START_ROW, "mini-batch\nstart weights"),
    ):
        axes.text(-0.25, y + 0.3, label, ha="right", va="center", color=INK, fontsize=10)
    for t in range(TOKENS):
        box(axes, t, t + 1, TOKEN_ROW, SHADES[t // CHUNK + 1], str(t))
    for chunk in range(TOKENS // CHUNK):
        end = (chunk + 1) * CHUNK
        axes.text(end - CHUNK / 2, TOKEN_ROW + 0.85, f"chunk {chunk}", ha="center", color=INK, fontsize=9)
        # complete at its last token, which is the first to read what it wrote
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 1}
        axes.annotate("", (end - 0.5, READ_ROW + 0.6), (end - 0.5, TOKEN_ROW - 0.02), arrowprops=style)
        axes.text(
            end - 0.62, TOKEN_ROW - 0.4, "written", ha="right", va="center", color=INK, fontsize=8, style="italic"
        )
    for entry in range(TOKENS // CHUNK + 1):
        start, stop = max(entry * CHUNK - 1, 0), min((entry + 1) * CHUNK - 1, TOKENS)
        box(axes, start, stop, READ_ROW, SHADES[entry], f"$M_{entry}$")
    for batch in range(TOKENS // BATCH):
        entry = batch * BATCH // CHUNK
        box(axes, batch * BATCH, (batch + 1) * BATCH, START_ROW, SHADES[entry], f"$M_{entry}$")
    axes.plot([BATCH, BATCH], [START_ROW - 0.35, TOKEN_ROW + 1.2], color=LINE, linewidth=1.2, linestyle="--")
    axes.text(BATCH, TOKEN_ROW + 1.35, "a new mini-batch starts", ha="center", color=INK, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images" / "timeline.svg")
    args = parser.parse_args(argv)
    matplotlib.rcParams["svg.hashsalt"] = "timeline"  # the same file every time
    with replacing(args.out) as part:
        draw().savefig(part, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
