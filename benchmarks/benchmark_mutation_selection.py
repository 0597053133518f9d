"""Does a search by mutation find better gates and pages than as many random draws, or than settings made by hand?

python benchmarks/benchmark_mutation_selection.py --output-json runs/mutation.json --output-png runs/mutation.png
python benchmarks/benchmark_mutation_selection.py --quick

Fitness, lower is better, is the mean error on spiral and helix_drift over the selection seeds; with
--use-transfer-fitness partly the transfer score (tasks/transfer.py). The search by mutation, a random search over
as many different candidates, and the candidate made by hand each plan one arm on the reported seeds. --seed starts both
searches. benchmark_mutation_transfer.py --champion FILE tests the champion of a result on other tasks.
"""

import argparse
import random
import statistics
import sys
from typing import Any

from gate_genes import BY_HAND, Candidate, arm_of, drawn, mutated
from harness.program import Benchmark, Plan, whole
from harness.search import Search, random_search
from tasks import transfer
from tasks.curves import curve_tasks

VERSUS = (("mutation_champion", "random_champion"), ("mutation_champion", "by_hand"))
WRITING = 8  # tokens of one write of interference


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(8), default=16)
    p.add_argument("--seq-len", type=whole(16), default=48, help="tokens of a curve")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--hier-pages", type=whole(2), default=4, help="pages of hierarchical candidates")
    p.add_argument("--population", type=whole(2), default=8)
    p.add_argument("--generations", type=whole(1), default=4)
    p.add_argument(
        "--elites", type=whole(1), default=3, help="parents: best candidates of a generation that are mutated"
    )
    p.add_argument("--mutation-prob", type=float, default=0.35, help="probability of mutating each gene")
    p.add_argument("--search-seeds", type=whole(1), default=2, help="seeds on which candidates are chosen")
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the thresholds are set for, per opportunity"
    )
    p.add_argument(
        "--latency-weight",
        type=float,
        default=0.0,
        help="penalty per millisecond of a training step, reported separately",
    )
    p.add_argument(
        "--use-transfer-fitness",
        action="store_true",
        help="include the transfer score in the fitness; without it the flags below have no effect",
    )
    p.add_argument("--transfer-weight", type=float, default=0.5, help="weight of the transfer score, in [0, 1]")
    p.add_argument(
        "--long-seq-len", type=whole(24), default=48, help="tokens of the three parts of a long horizon together"
    )
    transfer.phase_flags(p)


def evolve(search: Search, args: argparse.Namespace, source: random.Random) -> list[dict[str, Any]]:
    """Run the generations; return the best of each. Repeated candidates are not measured again."""
    people: list[Candidate] = [BY_HAND, *(drawn(source) for _ in range(args.population - 1))]
    history = []
    for generation in range(args.generations):
        ranked = sorted((search.trial(c) for c in people), key=lambda trial: trial.score)
        history.append({"generation": generation, "tried": search.budget, "best": ranked[0].record()})
        elites = [trial.params for trial in ranked[: args.elites]]
        children = [mutated(source.choice(elites), args.mutation_prob, source) for _ in people[len(elites) :]]
        people = [*elites, *children]
    return history


def plan(args: argparse.Namespace, session) -> Plan:
    for name in ("mutation_prob", "transfer_weight"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be a number in [0, 1], got {getattr(args, name)}")
    curves = curve_tasks(args.seq_len, dim=args.dim, batch_size=args.batch_size, chunk_size=args.chunk_size)
    others = transfer.tasks(argparse.Namespace(**{**vars(args), "seq_len": WRITING}))
    tasks = [*curves, *(others if args.use_transfer_fitness else [])]
    settings = transfer.settings(args, session.setting)

    def arm(candidate: Candidate, name: str = "candidate", about: str = ""):
        return arm_of(candidate, name, args.dim, args.pages, args.hier_pages, args.switch_rate, about)

    def fitness(_, outcomes) -> float:
        error = statistics.fmean(outcomes[task.name]["metrics"]["error"] for task in curves)
        if not args.use_transfer_fitness:
            return error
        w, (score,) = args.transfer_weight, transfer.scores({name: [found] for name, found in outcomes.items()})
        return (1 - w) * error + w * score

    search = Search(session, tasks, session.selection_seeds(args.search_seeds), arm, fitness, settings)
    history = evolve(search, args, random.Random(args.seed))
    chance = random_search(search.fresh(), drawn, search.budget, args.seed + 1)
    arms = [
        arm(search.best.params, "mutation_champion", "best of the search by mutation"),
        arm(chance.best.params, "random_champion", "best of as many random draws"),
        arm(BY_HAND, "by_hand", "made by hand"),
    ]
    found = {"generation_history": history, "mutation": search.record(), "random": chance.record()}
    return Plan(tasks, arms, versus=VERSUS, extra=found, settings=settings)


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """best: the champion, its fitness on the selection seeds, and its errors on the reported ones."""
    best = result["mutation"]["trials"][0]
    reported = {
        name: {m: got["mean"] for m, got in task["arms"]["mutation_champion"]["metrics"].items()}
        for name, task in result["tasks"].items()
    }
    ms = result["timing"]["arms"].get("mutation_champion", {}).get("train_ms")
    latency = None if ms is None else args.latency_weight * ms
    return {
        "best": {"candidate": best["params"], "fitness": best["score"], "reported": reported, "latency_term": latency}
    }


QUICK = {"steps": 2, "batch_size": 4, "seq_len": 32, "population": 2, "generations": 2, "elites": 1, "search_seeds": 1}
BENCHMARK = Benchmark("mutation_selection", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=40)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
