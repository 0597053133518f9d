"""fig2.png: results. Speed and memory against the peer over length, bits per byte, paging under interference.

python benchmarks/draw_fig2.py              # fig2.png of the repository, from benchmarks/results
python benchmarks/draw_fig2.py --chunk 16 other.png

The entry "command" of each result file reproduces it: speed_sweep.json, text.json and paging.json.
"""

import sys
from collections.abc import Sequence

from benchmark_text import draw_bars
from harness.environment import REPOSITORY
from harness.plots import COLOURS, INK, new_figure, plain, save_png, style
from speed.figure import ARM_COLOURS, ARM_LABELS
from speed.report import value

from titans_pytorch.common.files import read_json
from titans_pytorch.training.options import OneLineParser

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGING = {
    "recognised": "pages, switched by a gate\nthat recognises the context",
    "recognised/plain": "plain memory, same size",
    "recognised/never": "the same pages, never switched",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = OneLineParser(description=__doc__)
    arguments.add_argument("png", nargs="?", default=str(REPOSITORY / "fig2.png"), help="output file [fig2.png]")
    arguments.add_argument("--chunk", type=int, default=4, help="chunk size of the sweep [4]")
    args = arguments.parse_args(argv)
    try:
        read = {name: read_json(RESULTS / f"{name}.json") for name in ("speed_sweep", "text", "paging")}
        chunks = sorted({record["case"]["sweep"]["chunk"] for record in read["speed_sweep"]["cases"]})
        if args.chunk not in chunks:
            arguments.error(f"chunk must be one of {', '.join(map(str, chunks))}, got {args.chunk}")
        draw(read, args.chunk, args.png)
    except (OSError, ValueError) as error:
        print(f"draw_fig2.py: {error}", file=sys.stderr)
        return 1
    return 0


def draw(read: dict, chunk: int, path: str) -> None:
    cases = [record for record in read["speed_sweep"]["cases"] if record["case"]["sweep"]["chunk"] == chunk]
    with style():
        figure = new_figure(10.4, 6.2)
        (speed, memory), (text, paging) = figure.subplots(2, 2)
        draw_over_length(speed, cases, "train", lambda took, tokens: tokens / took)
        speed.set(title="training step of the layer: tokens per second", ylabel="tokens/s")
        draw_over_length(memory, cases, "memory", lambda taken, tokens: taken / 1e6)
        memory.set(title="its peak memory over idle", ylabel="MB")
        speed.legend(loc="best", fontsize=8)
        draw_bars(text, read["text"])
        text.set_title(f"bits per byte on held-out Wikipedia, {len(read['text']['run']['seeds'])} seeds")
        draw_interference(paging, read["paging"]["tasks"]["interference"])
    save_png(figure, path)


def draw_over_length(axes, cases, quantity: str, shown) -> None:
    for arm, colour in ARM_COLOURS.items():
        points = sorted(
            (record["case"]["tokens"], shown(measured, record["case"]["tokens"]))
            for record in cases
            if (measured := value(record, arm, quantity)) is not None
        )
        if not points:
            continue
        dashes = "--" if arm == "attention" else "-"
        axes.plot(*zip(*points, strict=True), dashes, marker="o", color=colour, label=ARM_LABELS[arm])
        if arm == "peer" and len(points) < len(cases):
            axes.annotate(
                "then out of\nmemory or time",
                points[-1],
                (8, -2 if quantity == "train" else -14),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    lengths = sorted({record["case"]["tokens"] for record in cases})
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xticks([], minor=True)
    plain(axes.yaxis)


def draw_interference(axes, task: dict) -> None:
    """Draw the error on task A, before and after task B was written with the same keys."""
    places = range(len(PAGING))[::-1]
    for place, arm in zip(places, PAGING, strict=True):
        metrics = task["arms"][arm]["metrics"]
        for metric, shift, colour, label in (
            ("error_a_before", 0.2, COLOURS[2], "before"),
            ("error_a_after", -0.2, COLOURS[1], "after"),
        ):
            found = metrics[metric]
            half = found["high"] - found["mean"]
            axes.barh(place + shift, found["mean"], height=0.36, color=colour, xerr=half, ecolor=INK, capsize=2,
                      label=f"{label} task B is written" if place == 0 else None)  # fmt: skip
            axes.annotate(
                f"{found['mean']:.2f}",
                (found["high"], place + shift),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(list(places), list(PAGING.values()))
    seeds = task["arms"]["recognised"]["metrics"]["error_a_after"]["n"]
    axes.set(
        title=f"error on task A, {seeds} seeds",
        xlabel="relative error (1: predicting zero)",
        xlim=(0, 0.95),
    )
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper right", fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
