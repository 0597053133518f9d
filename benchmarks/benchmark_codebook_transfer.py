"""Does a codebook in the gate help on tasks that it was not chosen for?

python benchmarks/benchmark_codebook_transfer.py --output-json runs/codebook.json --output-png runs/codebook.png
python benchmarks/benchmark_codebook_transfer.py --quick

codebook_champion_paging is phase_quorum_paging with a codebook of 16 entries for half of its score. Both choose pages
by phase angle. Tasks and score: tasks/transfer.py; codebooks are chosen by benchmark_codebook_sweep.py.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.gates import phase_quorum, symplectic
from harness.program import Benchmark
from tasks import transfer

CODEBOOK = {"codebook_mix": 0.5, "codebook_size": 16, "codebook_temperature": 0.1}
CHAMPION = "codebook_champion_paging"
VERSUS = ((CHAMPION, "phase_quorum_paging"), (CHAMPION, "symplectic_paging"))


def arms(args: argparse.Namespace) -> list[Arm]:
    pages = {"num_pages": args.pages}
    keyed = {**pages, "manifold_state_keyed_paging": True}
    gate, rate = phase_quorum(args.dim), {"switch_rate": args.switch_rate}
    return [
        Arm("baseline", {}, "one head, no gate, no pages", controls=False),
        Arm("symplectic_paging", {**symplectic(), **pages}, "gate, the next page", **rate),
        Arm("phase_quorum_paging", {**symplectic(**gate), **keyed}, "phase and quorum, page by phase", **rate),
        Arm(CHAMPION, {**symplectic(**gate, **CODEBOOK), **keyed}, "the same with a codebook", **rate),
    ]


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return {
        **transfer.comparison(result, args, VERSUS),
        "champion_vs_phase_quorum": transfer.percent(result, *VERSUS[0]),
        "champion_vs_symplectic": transfer.percent(result, *VERSUS[1]),
    }


BENCHMARK = Benchmark(
    "codebook_transfer",
    __doc__,
    transfer.planner(arms, VERSUS),
    flags=transfer.paging_flags,
    fields=fields,
    quick=transfer.QUICK,
    steps=80,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
