"""Which budget for switching pages costs the least, and does any help?

python benchmarks/benchmark_switch_budget_sweep.py --output-json runs/budgets.json --output-png runs/budgets.png
python benchmarks/benchmark_switch_budget_sweep.py --quick

Every cell of thresholds, budget ratios, switch targets and entropy targets is trained with the penalty of budget.py on
selection seeds, and as many cells drawn at random from the ranges that the grid spans; the lowest mean error on spiral
and helix_drift wins. The winner (constrained), the same memory without the penalty (unconstrained), and the random
search's winner are then measured on the reported seeds.
"""

import argparse
import random
import statistics
import sys
from typing import Any

import budget
from budget import SwitchBudget
from harness.arms import Arm
from harness.program import Benchmark, Plan, numbers, whole
from harness.search import Search, random_search

VERSUS = (("constrained", "unconstrained"), ("constrained", "random_best"))


def flags(p: argparse.ArgumentParser) -> None:
    budget.flags(p)
    p.add_argument("--page-thresholds", type=numbers, default=numbers("0.05,0.2"), help="with commas")
    p.add_argument("--switch-targets", type=numbers, default=numbers("0.25,0.5"), help="with commas")
    p.add_argument("--entropy-targets", type=numbers, default=numbers("0.4,0.8"), help="with commas")
    p.add_argument("--budget-ratios", type=ratios, default=[0.2], help="with commas; none: no budget of the quorum")
    p.add_argument("--search-seeds", type=whole(1), default=2, help="seeds on which cells are chosen")


def ratios(text: str) -> list[float | None]:
    parts = [part.strip() for part in text.split(",")]
    given = ",".join(part for part in parts if part != "none")
    return ([None] if "none" in parts else []) + (numbers(given) if given else [])


def penalty(args: argparse.Namespace, params: dict[str, Any]) -> SwitchBudget:
    return SwitchBudget(
        params["switch_target"], args.switch_weight, params["entropy_target"], args.entropy_weight, args.temperature
    )


def pair(args: argparse.Namespace, params: dict[str, Any]) -> tuple[Arm, Arm]:
    return budget.pair(args, params["page_threshold"], params["budget_ratio"], penalty(args, params))


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"page_threshold": threshold, "budget_ratio": ratio, "switch_target": rate, "entropy_target": entropy}
        for threshold in args.page_thresholds
        for ratio in args.budget_ratios
        for rate in args.switch_targets
        for entropy in args.entropy_targets
    ]


def drawn(args: argparse.Namespace, source: random.Random) -> dict[str, Any]:
    def between(values: list[float]) -> float:
        return round(source.uniform(min(values), max(values)), 4)

    return {
        "page_threshold": between(args.page_thresholds),
        "budget_ratio": source.choice(args.budget_ratios),
        "switch_target": between(args.switch_targets),
        "entropy_target": between(args.entropy_targets),
    }


def plan(args: argparse.Namespace, session) -> Plan:
    tasks = budget.tasks(args)

    def error(_, outcomes) -> float:
        return statistics.fmean(found["metrics"]["error"] for found in outcomes.values())

    seeds = session.selection_seeds(args.search_seeds)
    search = Search(session, tasks, seeds, lambda params: pair(args, params)[1], error)
    for params in grid(args):
        search.trial(params)
    chance = random_search(search.fresh(), lambda source: drawn(args, source), search.budget, args.seed)
    lucky = pair(args, chance.best.params)[1]
    arms = [
        *pair(args, search.best.params),
        Arm("random_best", lucky.memory, "best of as many random draws", penalty=lucky.penalty),
    ]
    return Plan(tasks, arms, versus=VERSUS, extra={"grid": search.record(), "random": chance.record()})


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """best: on the reported seeds, beside unconstrained; trials: on the selection seeds, sorted by their error."""
    params = result["grid"]["trials"][0]["params"]
    wanted = penalty(args, params)
    found = {
        task: {arm: budget.arm_fields(result, task, arm, wanted) for arm in ("unconstrained", "constrained")}
        for task in result["tasks"]
    }
    mine = [arms["constrained"] for arms in found.values()]
    summary = {
        "mean_recon": budget.mean_of(mine, "recon_loss"),
        "mean_switch": budget.mean_of(mine, "switch_rate"),
        "mean_entropy": budget.mean_of(mine, "entropy"),
        "score": budget.mean_of(mine, "recon_loss"),
    }
    return {
        "best": {"params": params, "tasks": found, "summary": summary},
        "trials": result["grid"]["trials"],
        "versus": [*result["versus"], *budget.nearer(result, "constrained", "unconstrained", wanted)],
    }


QUICK = {
    "steps": 2,
    "batch_size": 4,
    "seq_len": 32,
    "page_thresholds": numbers("0.1"),
    "switch_targets": numbers("0.25,0.5"),
    "entropy_targets": numbers("0.5"),
    "search_seeds": 1,
}
BENCHMARK = Benchmark("switch_budget_sweep", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=40)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
