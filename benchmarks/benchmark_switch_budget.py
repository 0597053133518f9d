"""Does a penalty bring the switch rate of pages to a target, and what does it cost?

python benchmarks/benchmark_switch_budget.py --output-json runs/budget.json --output-png runs/budget.png
python benchmarks/benchmark_switch_budget.py --quick

unconstrained and constrained are the same memory with the same threshold, trained without and with the penalty of
budget.py. Rates and entropies are counted on held-out data, with the outer weights frozen.
"""

import argparse
import sys
from typing import Any

import budget
from budget import SwitchBudget
from harness.program import Benchmark, Plan


def flags(p: argparse.ArgumentParser) -> None:
    budget.flags(p)
    p.add_argument("--page-threshold", type=float, default=0.1)
    p.add_argument("--budget-ratio", type=float, default=0.2, help="share of positions that keep their quorum")
    p.add_argument("--switch-target", type=float, default=0.5, help="target switch rate, per opportunity")
    p.add_argument(
        "--entropy-target", type=float, default=0.5, help="target entropy of the pages written (1: all equally often)"
    )


def penalty(args: argparse.Namespace) -> SwitchBudget:
    targets = args.switch_target, args.switch_weight, args.entropy_target, args.entropy_weight
    return SwitchBudget(*targets, args.temperature)


def plan(args: argparse.Namespace, session) -> Plan:
    arms = budget.pair(args, args.page_threshold, args.budget_ratio, penalty(args))
    return Plan(budget.tasks(args), arms, versus=[("constrained", "unconstrained")])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    wanted, arms = penalty(args), ("unconstrained", "constrained")
    found = {task: {arm: budget.arm_fields(result, task, arm, wanted) for arm in arms} for task in result["tasks"]}
    lines = budget.nearer(result, "constrained", "unconstrained", wanted)
    # the tasks' records stay where every result has them
    return {"switch_budget": found, "versus": [*result["versus"], *lines]}


QUICK = {"steps": 4, "batch_size": 4, "seq_len": 32}
BENCHMARK = Benchmark("switch_budget", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=80)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
