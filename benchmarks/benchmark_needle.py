"""Do gates and pages keep a needle? A few pairs are written, then distractors; then the needles are read.

python benchmarks/benchmark_needle.py --output-json runs/needle.json --output-png runs/needle.png    # minutes
python benchmarks/benchmark_needle.py --quick                                                        # seconds

symplectic: a gate on one page. symplectic_paging: --pages pages, their threshold set for --switch-rate. Each runs
beside a plain memory with as many heads and parameters and beside pages that never switch. See tasks/needle.py.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.compare import improvement_pct
from harness.gates import symplectic
from harness.program import Benchmark, Plan, whole
from tasks.needle import Needle


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(2), default=32, help="features of a token: a key and a value")
    p.add_argument("--needles", type=whole(1), default=7, help="pairs to remember; with a marking token, whole chunks")
    p.add_argument("--seq-len", type=whole(1), default=24, help="distractors after them, a multiple of the chunk")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the threshold is set for, per opportunity"
    )


def plan(args: argparse.Namespace, session) -> Plan:
    task = Needle(args.dim, args.needles, args.seq_len, args.batch_size, args.chunk_size)
    paged = {**symplectic(), "num_pages": args.pages}
    arms = [
        Arm("baseline", {}, "one head, no gate, no pages", controls=False),
        Arm("symplectic", symplectic(), "gate, one page"),
        Arm("symplectic_paging", paged, "threshold set for the switch rate", switch_rate=args.switch_rate),
    ]
    return Plan([task], arms)


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """final_loss: error of the needles; improvement_pct: the gain over the best control, in percent of its error."""
    found = {
        name: {
            "final_loss": arm["metrics"]["error"]["mean"],
            "train_tail_loss": arm["training"]["loss_tail"]["mean"],
            "improvement_pct": improvement_pct(arm, "error"),
        }
        for name, arm in result["tasks"]["needle"]["arms"].items()
    }
    return {"needle": found}


QUICK = {"steps": 4, "batch_size": 4}
BENCHMARK = Benchmark("needle", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=200)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
