"""Which page to switch to: the next one, or the one that the phase angle selects?

python benchmarks/benchmark_manifold_paging_transfer.py --output-json runs/manifold.json --output-png runs/manifold.png
python benchmarks/benchmark_manifold_paging_transfer.py --quick

threshold_paging and manifold_keyed_paging differ only in this choice, and are compared with each other, seed by seed.
Both switch above a threshold set for --switch-rate, or above --threshold. Tasks and score: tasks/transfer.py.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.gates import phase_quorum, symplectic
from harness.program import Benchmark
from tasks import transfer

VERSUS = (("manifold_keyed_paging", "threshold_paging"),)


def flags(p: argparse.ArgumentParser) -> None:
    transfer.paging_flags(p)
    p.add_argument("--threshold", type=float, help="complexity that switches a page (default: set for --switch-rate)")


def arms(args: argparse.Namespace) -> list[Arm]:
    memory = {**symplectic(**phase_quorum(args.dim)), "num_pages": args.pages}
    rate = {"switch_rate": args.switch_rate} if args.threshold is None else {}
    if args.threshold is not None:
        memory["symplectic_page_threshold"] = args.threshold
    return [
        Arm("threshold_paging", memory, "the next page", **rate),
        Arm("manifold_keyed_paging", {**memory, "manifold_state_keyed_paging": True}, "page by phase", **rate),
    ]


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return {**transfer.comparison(result, args, VERSUS), "comparison": transfer.percent(result, *VERSUS[0])}


BENCHMARK = Benchmark(
    "manifold_paging_transfer",
    __doc__,
    transfer.planner(arms, VERSUS),
    flags=flags,
    fields=fields,
    quick=transfer.QUICK,
    steps=80,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
