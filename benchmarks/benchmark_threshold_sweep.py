"""Error and switch rate as a function of the page threshold.

python benchmarks/benchmark_threshold_sweep.py --output-json runs/thresholds.json --output-png runs/thresholds.png
python benchmarks/benchmark_threshold_sweep.py --quick

Each threshold is an arm with controls of its own, on interference and on following a noisy spiral. To choose a
threshold from data instead, see titans_pytorch.calibrate_page_threshold.
"""

import argparse
import math
import statistics
import sys
from typing import Any

from harness.arms import Arm
from harness.program import Benchmark, Plan, numbers, whole
from tasks.curves import Follow
from tasks.interference import Interference


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(4), default=32)
    p.add_argument("--seq-len", type=whole(8), default=48, help="tokens of a curve")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--thresholds", type=numbers, default=numbers("0.05,0.1,0.2,0.35,0.5,0.7"), help="with commas")


def plan(args: argparse.Namespace, session) -> Plan:
    shared = {"batch_size": args.batch_size, "chunk_size": args.chunk_size}
    writing = args.chunk_size * math.ceil(8 / args.chunk_size)  # few pairs, so that they are learned in these few steps
    tasks = [
        Interference(dim=args.dim, pairs=writing - 4, **shared),
        Follow("spiral", dim=args.dim, length=args.seq_len, **shared),
    ]
    arms = [
        Arm(
            f"{threshold:.4f}",
            {"use_symplectic_gating": True, "num_pages": args.pages, "symplectic_page_threshold": threshold},
        )
        for threshold in args.thresholds
    ]
    return Plan(tasks, arms)


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """threshold -> task -> final_loss (error on held-out data), switches; switch_rate is per opportunity."""
    sweep: dict[str, Any] = {}
    for threshold in (f"{t:.4f}" for t in args.thresholds):
        found = {}
        for name, task in result["tasks"].items():
            arm, main = task["arms"][threshold], task["metrics"][0]["name"]
            pages = arm["pages"]
            found[name] = {
                "final_loss": arm["metrics"][main]["mean"],
                "switch_events": pages["events"],
                "switch_rate": pages["switch_rate"],
            }
        each = list(found.values())
        found["aggregate"] = {
            "mean_loss": statistics.fmean(f["final_loss"] for f in each),
            "mean_switch_rate": statistics.fmean(f["switch_rate"] for f in each),
        }
        sweep[threshold] = found
    return {"threshold_sweep": sweep}


QUICK = {"steps": 3, "batch_size": 4, "thresholds": numbers("0.1,0.5")}
BENCHMARK = Benchmark("threshold_sweep", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=80)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
