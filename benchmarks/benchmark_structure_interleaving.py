"""Do pages keep a needle apart from a smooth background? It is written between two parts of the background, then read.

python benchmarks/benchmark_structure_interleaving.py --output-json runs/structure.json    # minutes
python benchmarks/benchmark_structure_interleaving.py --quick                              # seconds

A gate that detects the needle in the background switches to another page there; the background that follows could then
be written to another page. See tasks/interleaving.py.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.compare import improvement_pct
from harness.gates import symplectic
from harness.program import Benchmark, Plan, whole
from tasks.interleaving import Interleaving


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(4), default=32, help="features of a token: a key and a value")
    p.add_argument("--needles", type=whole(1), default=7, help="pairs to remember; with a marking token, whole chunks")
    p.add_argument("--before", type=whole(1), default=16, help="tokens of the background before them, whole chunks")
    p.add_argument("--seq-len", type=whole(1), default=24, help="tokens of the background after them, whole chunks")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=4)
    p.add_argument("--threshold", type=float, help="complexity that switches a page (default: set for --switch-rate)")
    p.add_argument(
        "--switch-rate", type=float, default=0.35, help="switch rate that the threshold is set for, per opportunity"
    )


def plan(args: argparse.Namespace, session) -> Plan:
    task = Interleaving(
        dim=args.dim,
        needles=args.needles,
        length=args.seq_len,
        batch_size=args.batch_size,
        chunk_size=args.chunk_size,
        before=args.before,
    )
    paged: dict[str, Any] = {**symplectic(), "num_pages": args.pages}
    if args.threshold is not None:
        arm = Arm("symplectic", {**paged, "symplectic_page_threshold": args.threshold}, "threshold as given")
    else:
        arm = Arm("symplectic", paged, "threshold set for the switch rate", switch_rate=args.switch_rate)
    return Plan([task], [Arm("baseline", {}, "one head, no gate, no pages", controls=False), arm])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """needle_loss: error of the needles at the end; improvement_pct: the gain over the best control, in percent
    of its error.
    """
    arms = result["tasks"]["interleaving"]["arms"]
    losses = {name: arm["metrics"]["error"]["mean"] for name, arm in arms.items()}
    return {"needle_loss": losses, "improvement_pct": improvement_pct(arms["symplectic"], "error")}


QUICK = {"steps": 3, "batch_size": 4}
BENCHMARK = Benchmark("structure_interleaving", __doc__, plan, flags=flags, fields=fields, quick=QUICK)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
