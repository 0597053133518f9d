"""Do pages protect what was stored? Two tasks with the same keys and other values, written one after the other.

python benchmarks/benchmark_paging.py --output-json runs/paging.json --output-png runs/paging.png    # minutes
python benchmarks/benchmark_paging.py --quick                                                        # seconds

The arm has --pages pages. Its controls, trained alike on the same data, are a plain memory with as many heads and
parameters, and the same arm with pages that never turn. See tasks/interference.py for the task.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.program import Benchmark, Plan, whole
from tasks.interference import Interference


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(2), default=32, help="of a token: a key and a value")
    p.add_argument("--seq-len", "--seq_len", type=whole(2), default=16, help="tokens of one writing, 4 of them context")
    p.add_argument("--batch", "--batch-size", type=whole(1), default=16)
    p.add_argument("--chunk-size", "--chunk_size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--threshold", type=float, help="what turns a page (default: set for --switch-rate)")
    p.add_argument("--switch-rate", type=float, default=0.5, help="switches per opportunity the threshold is set for")
    p.add_argument("--context-strength", type=float, default=0.0, help="context in each pair and question")


def paging_arm(args: argparse.Namespace) -> Arm:
    memory: dict[str, Any] = {"use_symplectic_gating": True, "num_pages": args.pages}
    if args.threshold is not None:
        return Arm("paging", {**memory, "symplectic_page_threshold": args.threshold}, "threshold as given")
    return Arm("paging", memory, "threshold set for the switch rate", switch_rate=args.switch_rate)


def plan(args: argparse.Namespace, session) -> Plan:
    task = Interference(
        dim=args.dim,
        pairs=args.seq_len - 4,
        context_strength=args.context_strength,
        batch_size=args.batch,
        chunk_size=args.chunk_size,
    )
    baseline = Arm("baseline", {}, "one head, no gates, no pages", controls=False)
    return Plan([task], [baseline, paging_arm(args)])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Losses are relative errors of the carried, frozen memory; the improvement is that over the best control."""
    task = result["tasks"]["interference"]
    names = {
        "pre_a_loss": "error_a_before",
        "post_a_loss": "error_a_after",
        "post_b_loss": "error_b",
        "forgetting_delta": "forgetting",
    }
    means = {
        arm: {ours: record["metrics"][metric]["mean"] for ours, metric in names.items()}
        for arm, record in task["arms"].items()
    }
    gain = task["arms"]["paging"]["gains"]["error_a_after"]
    reference = means[gain["against"]]["post_a_loss"]
    return {
        "variants": means,
        "interference_improvement_pct": 100 * gain["mean"] / reference,
        "switch_rate": task["arms"]["paging"]["pages"]["switch_rate"],
    }


BENCHMARK = Benchmark("paging", __doc__, plan, flags=flags, fields=fields, quick={"steps": 6, "batch": 4})

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
