"""Which score tells ordered sequences from disturbed ones: error of DMD, or symplectic complexity? Nothing is trained.

python benchmarks/benchmark_dmd.py --output-json runs/dmd.json --output-png runs/dmd.png
python benchmarks/benchmark_dmd.py --quick

Every score has a control NAME_shuffled, in which the tokens of all sequences are reordered: no score can tell them
apart, and its area under the ROC curve is 0.5. See tasks/detect.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from harness.arms import Arm
from harness.plots import COLOURS, FAINT, INK, new_figure, save_png, style
from harness.program import Benchmark, Plan, numbers, whole
from tasks.detect import KINDS, Detect

LINES = tuple(COLOURS[i] for i in (0, 1, 3, 4))  # the third colour is grey, as controls are


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(4), default=16)
    p.add_argument("--seq-len", type=whole(8), default=32)
    p.add_argument("--modes", type=whole(1), default=2, help="pairs of modes of the linear systems")
    p.add_argument("--batch-size", type=whole(2), default=128, help="sequences of each class in a batch")
    p.add_argument(
        "--noises", type=numbers, default=numbers("0.1,0.3,1,3"), help="noise over the signal's size, with commas"
    )


def scores(modes: int) -> list[tuple[str, dict[str, Any], Any, str]]:
    from tasks.detectors import Complexity, DmdError

    return [
        ("dmd", {}, DmdError, "all directions"),
        ("dmd_low_rank", {"rank": 2 * modes}, DmdError, "as many directions as there are modes"),
        ("symplectic", {}, Complexity, "twist alone"),
        ("symplectic_phase", {"phase_mix": 0.5}, Complexity, "twist and phase"),
    ]


def plan(args: argparse.Namespace, session) -> Plan:
    shared = {"dim": args.dim, "length": args.seq_len, "modes": args.modes, "rows": args.batch_size}
    tasks = [Detect(kind, noise, **shared) for kind in KINDS for noise in args.noises]
    arms, versus = [], []
    for name, options, make, about in scores(args.modes):
        control = f"{name}_shuffled"
        arms.append(Arm(name, options, about, make=make, controls=False))
        arms.append(Arm(control, {**options, "shuffled": True}, "all tokens reordered", make=make, controls=False))
        versus.append((name, control))
    return Plan(tasks, arms, versus=[*versus, ("dmd", "symplectic"), ("dmd_low_rank", "symplectic")])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """detection: task -> score -> area, mean scores of both classes. ms: milliseconds for one batch."""
    names = [name for name, *_ in scores(args.modes)]
    detection = {
        task: {name: {metric: got["mean"] for metric, got in record["arms"][name]["metrics"].items()} for name in names}
        for task, record in result["tasks"].items()
    }
    times = result["timing"]["arms"]
    return {"detection": detection, "ms": {name: times[name]["fwd_ms"] for name in names if name in times}}


def picture(result: Mapping[str, Any], path: str) -> None:
    """Area against noise, for each kind of disturbance; controls are grey."""
    noises = result["config"]["noises"]
    with style():
        figure = new_figure(8.5, 3.4)
        for axis, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
            for i, (name, *_) in enumerate(scores(result["config"]["modes"])):
                for arm, colour in ((f"{name}_shuffled", FAINT), (name, LINES[i])):
                    found = [result["tasks"][f"{kind}, noise {n:g}"]["arms"][arm]["metrics"]["area"] for n in noises]
                    means = [got["mean"] for got in found]
                    half = [0.0 if got["high"] is None else got["high"] - got["mean"] for got in found]
                    at = [k + 0.06 * (i - 1.5) for k in range(len(noises))]
                    label = name if arm == name else "tokens reordered (controls)" if i == 0 else None
                    axis.errorbar(at, means, half, color=colour, marker="o", label=label)
            axis.axhline(0.5, color=INK, linewidth=0.9, linestyle=":")
            axis.set_xticks(range(len(noises)), [f"{n:g}" for n in noises])
            axis.set(title=f"{kind}: area under the ROC curve", xlabel="noise, over the signal's size")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_png(figure, path)


QUICK = {"batch_size": 32, "noises": numbers("0.3,1")}
BENCHMARK = Benchmark("dmd", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=0, picture=picture)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
