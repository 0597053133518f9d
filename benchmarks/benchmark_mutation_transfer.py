"""Does the champion of a search by mutation beat settings made by hand on tasks that it was not chosen for?

python benchmarks/benchmark_mutation_transfer.py --output-json runs/transfer.json --output-png runs/transfer.png
python benchmarks/benchmark_mutation_transfer.py --champion runs/mutation.json      # of benchmark_mutation_selection.py
python benchmarks/benchmark_mutation_transfer.py --quick

The champion is compared with each other arm, seed by seed. Tasks and score: tasks/transfer.py.
"""

import argparse
import sys
from typing import Any

from gate_genes import GENES, Candidate, arm_of, hierarchy
from harness.arms import Arm
from harness.gates import phase_quorum, symplectic
from harness.program import Benchmark, whole
from tasks import transfer

from titans_pytorch.common.files import read_json

CHAMPION = "mutation_champion"
# found by an earlier search, on one seed
KNOWN = {
    "phase_mix": 0.5,
    "quorum_mix": 0.75,
    "budget_topk_ratio": 0.3,
    "hierarchical": False,
    "hierarchy_mix": 1.0,
    "quorum_window": 3,
    "quorum_threshold": 0.2,
    "quorum_temperature": 0.15,
}
MANUAL = ("symplectic_paging", "phase_quorum_paging", "quorum_budget_paging", "hierarchical_paging")
VERSUS = tuple((CHAMPION, name) for name in MANUAL)


def flags(p: argparse.ArgumentParser) -> None:
    transfer.paging_flags(p)
    p.add_argument("--hier-pages", type=whole(2), default=4)
    p.add_argument(
        "--champion",
        type=champion,
        default=KNOWN,
        metavar="FILE",
        help="result file of benchmark_mutation_selection.py",
    )


def champion(path: str) -> Candidate:
    """Read `best.candidate` from a result file."""
    try:
        found = read_json(path)["best"]["candidate"]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(f"{path}: not a result of benchmark_mutation_selection") from None
    if set(found) != set(GENES) or any(found[gene] not in values for gene, values in GENES.items()):
        raise argparse.ArgumentTypeError(f"{path}: its candidate has other genes than {', '.join(GENES)}")
    return found


def arms(args: argparse.Namespace) -> list[Arm]:
    gate, pages, rate = phase_quorum(args.dim), {"num_pages": args.pages}, {"switch_rate": args.switch_rate}
    budget = {**gate, "budget_topk_ratio": 0.2}
    return [
        Arm(MANUAL[0], {**symplectic(), **pages}, "gate", **rate),
        Arm(MANUAL[1], {**symplectic(**gate), **pages}, "phase and quorum", **rate),
        Arm(MANUAL[2], {**symplectic(**budget), **pages}, "phase, quorum and budget", **rate),
        Arm(MANUAL[3], {**symplectic(**gate), **hierarchy(args.hier_pages)}, "coarse and fine pages", **rate),
        arm_of(args.champion, CHAMPION, args.dim, args.pages, args.hier_pages, args.switch_rate, "winner of a search"),
    ]


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    manual = {name: transfer.percent(result, CHAMPION, name) for name in MANUAL}
    return {**transfer.comparison(result, args, VERSUS), "mutation_vs_manual": manual}


QUICK = {**transfer.QUICK, "steps": 1, "batch_size": 2}
BENCHMARK = Benchmark(
    "mutation_transfer", __doc__, transfer.planner(arms, VERSUS), flags=flags, fields=fields, quick=QUICK, steps=80
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
