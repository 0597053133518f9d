"""The main regression benchmark: gates and pages on curves with noise, and on a curve that returns after an
interruption.

python benchmarks/benchmark_symplectic.py --output-json runs/symplectic.json --output-png runs/symplectic.png
python benchmarks/benchmark_symplectic.py --quick

spiral and helix_drift: the next vector of a curve whose plane is new in every row (tasks/curves.py); the helix turns
faster and drifts. long_horizon_recovery: another curve in between, the state carried. Errors are those of a frozen
memory on data it was not trained on, 1 for predicting zero. Page thresholds are set for --switch-rate.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.program import Benchmark, Plan, whole
from tasks.curves import Recovery, curve_tasks
from tasks.transfer import long_flags, long_setting

PAGED = ("symplectic_paging", "dmd_paging", "symplectic_dmd_paging", "symplectic_phase_paging")


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(4), default=16)
    p.add_argument("--seq-len", type=whole(8), default=48, help="tokens of a curve")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument(
        "--long-seq-len", type=whole(24), default=48, help="tokens of the three parts of a recovery together"
    )
    long_flags(p)
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the thresholds are set for, per opportunity"
    )


def arms(dim: int, rate: float) -> list[Arm]:
    symplectic = {"use_symplectic_gating": True}
    soft = {"gated": True, "diag": True, "gate_mode": "soft", "phase_pairs": max(1, dim // 8)}
    both = {**symplectic, "use_dmd_gating": True, "combine_symplectic_and_dmd": True}
    paged = {
        "symplectic_paging": symplectic,
        "dmd_paging": {"use_dmd_gating": True},
        "symplectic_dmd_paging": {**both, "symplectic_gate_kwargs": {**soft, "phase_mix": 0.25}},
        "symplectic_phase_paging": {**symplectic, "symplectic_gate_kwargs": {**soft, "phase_mix": 0.5}},
    }
    return [
        Arm("baseline", {}, "one head, no gate, no pages", controls=False),
        Arm("symplectic", symplectic, "gate, one page"),
        *(Arm(name, {**memory, "num_pages": 2}, "two pages", switch_rate=rate) for name, memory in paged.items()),
    ]


def plan(args: argparse.Namespace, session) -> Plan:
    shared = {"dim": args.dim, "batch_size": args.batch_size, "chunk_size": args.chunk_size}
    tasks = [*curve_tasks(args.seq_len, **shared), Recovery(length=args.long_seq_len // 3, **shared)]
    settings = {tasks[-1].name: long_setting(args, session.setting)}
    return Plan(tasks, arms(args.dim, args.switch_rate), settings=settings)


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    tasks, times = result["tasks"], result["timing"]["arms"]
    own = [arm.name for arm in arms(args.dim, args.switch_rate)]

    def means(task: str, metric: str) -> dict[str, float]:
        return {arm: tasks[task]["arms"][arm]["metrics"][metric]["mean"] for arm in own}

    spiral = means("spiral", "error")
    recovery = tasks["long_horizon_recovery"]["arms"]
    timing: dict[str, Any] = dict(result["timing"])
    if times:
        for kind in ("fwd_ms", "train_ms"):
            timing[kind] = {arm: times[arm][kind] for arm in own}
        timing["overhead_pct"] = {
            f"{short}_{arm}": 100 * (times[arm][kind] / times["baseline"][kind] - 1)
            for short, kind in (("fwd", "fwd_ms"), ("train", "train_ms"))
            for arm in own[1:]
        }
    return {
        "timing": timing,
        "reconstruction": {
            "baseline": spiral["baseline"],
            "symplectic": spiral["symplectic"],
            "improvement_pct": 100 * (1 - spiral["symplectic"] / spiral["baseline"]),
        },
        "spiral": spiral,
        "helix_drift": means("helix_drift", "error"),
        "long_horizon_recovery": {arm: {m: got["mean"] for m, got in recovery[arm]["metrics"].items()} for arm in own},
        "diagnostics": {
            "page_switch_events": tasks["spiral"]["arms"]["symplectic_paging"]["pages"]["events"],
            "switch_rate": {arm: tasks["spiral"]["arms"][arm]["pages"]["switch_rate"] for arm in PAGED},
        },
    }


QUICK = {"steps": 2, "batch_size": 4, "seq_len": 32, "long_seq_len": 48}
BENCHMARK = Benchmark("symplectic", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=80)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
