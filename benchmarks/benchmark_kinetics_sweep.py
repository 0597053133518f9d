"""Does coupling learning rate and forget gate (kinetics) help a gated memory? A sweep of the coupling's mix.

python benchmarks/benchmark_kinetics_sweep.py --output-json runs/kinetics.json --output-png runs/kinetics.png  # minutes
python benchmarks/benchmark_kinetics_sweep.py --quick                                                          # seconds

The mix is chosen by the transfer score on selection seeds, then runs on the reported seeds beside a plain memory and
beside itself with mix 0. All other mixes are shown on the reported seeds too, with their difference from mix 0; no
winner is chosen from those. The memory has a gate of phases and a quorum, and one page unless --pages says more.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.gates import phase_quorum, symplectic
from harness.program import Benchmark, Plan, numbers, whole
from harness.search import Search
from tasks import transfer

CHOSEN = "chosen"


def flags(p: argparse.ArgumentParser) -> None:
    transfer.flags(p, pages=1)
    transfer.phase_flags(p)
    p.add_argument(
        "--mixes",
        type=numbers,
        default=numbers("0,0.25,0.5,0.75,1"),
        help="strengths of the coupling, with commas; 0 is always included",
    )
    p.add_argument("--selection-seeds", type=whole(1), default=2, help="number of seeds on which the mix is chosen")
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="with --pages: switch rate that the threshold is set for"
    )


def arm_of(mix: float, args: argparse.Namespace, name: str | None = None, **more: Any) -> Arm:
    memory: dict[str, Any] = {**symplectic(**phase_quorum(args.dim)), "kinetics_coupling": True, "kinetics_mix": mix}
    rate = None
    if args.pages > 1:
        memory["num_pages"], rate = args.pages, args.switch_rate
    return Arm(name or f"mix_{mix:g}", memory, f"kinetics mix {mix:g}", switch_rate=rate, **more)


def plan(args: argparse.Namespace, session) -> Plan:
    tasks, settings = transfer.tasks(args), transfer.settings(args, session.setting)
    mixes = sorted({0.0, *args.mixes})
    if len(mixes) < 2:
        raise ValueError(f"--mixes must be at least one above 0, got {args.mixes}")
    search = Search(
        session,
        tasks,
        session.selection_seeds(args.selection_seeds),
        lambda params: arm_of(params["kinetics_mix"], args, controls=False),
        lambda params, outcomes: transfer.scores({task: [got] for task, got in outcomes.items()})[0],
        settings,
    )
    for mix in mixes[1:]:
        search.trial({"kinetics_mix": mix})
    best = search.best.params["kinetics_mix"]
    sweep = [arm_of(mix, args, controls=False) for mix in mixes]
    chosen = arm_of(best, args, CHOSEN, off={"kinetics_mix": 0.0})
    versus = [(arm.name, "mix_0") for arm in sweep[1:]]
    return Plan(
        tasks, [*sweep, chosen], extra={"selection": {"mix": best, **search.record()}}, versus=versus, settings=settings
    )


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """trials, sorted by their transfer score: against_zero is the gain over mix 0. best: the mix that was chosen."""
    trials = []
    for mix in sorted({0.0, *args.mixes}):
        name = f"mix_{mix:g}"
        trial = {"params": {"kinetics_mix": mix}, **transfer.variant(result, name, args)}
        if mix > 0:
            trial["against_zero"] = transfer.gain(result, name, "mix_0")
        trials.append(trial)
    best = {"params": {"kinetics_mix": result["selection"]["mix"]}, **transfer.variant(result, CHOSEN, args)}
    return {"best": best, "trials": sorted(trials, key=lambda trial: trial["transfer_score"])}


QUICK = {"steps": 3, "batch_size": 4, "mixes": numbers("0,0.5"), "selection_seeds": 1}
BENCHMARK = Benchmark("kinetics_sweep", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=80)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
