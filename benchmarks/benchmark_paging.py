"""Do pages reduce forgetting? Two tasks with the same keys and other values, written one after the other.

python benchmarks/benchmark_paging.py --output-json runs/paging.json --output-png runs/paging.png    # minutes
python benchmarks/benchmark_paging.py --quick                                                        # seconds

Arms, all with --pages pages (choose with --arms):

  paging             the defaults: the next page, where the gate's complexity passes a threshold; all pages are read
  recognised         a gate trained with labels of the tasks' contexts; only the active page is read
  recognised_pooled  the same, but all pages are read
  told               an oracle in place of the gate: an upper bound
  keyed              (only with --arms) untrained: the phase angle of the first chunk of every write or read selects
                     the page; only the active page is read

paging, recognised and keyed run beside a plain memory with as many heads and parameters, trained alike on the same
data, and beside themselves with pages that never switch. See tasks/interference.py for the task, tasks/routers.py for
the gates.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.gates import symplectic
from harness.program import Benchmark, Plan, whole
from tasks.interference import Interference

DEFAULT = ("paging", "recognised", "recognised_pooled", "told")
ARMS = (*DEFAULT, "keyed")
VERSUS = (("recognised", "recognised_pooled"), ("told", "recognised"), ("recognised", "paging"))


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(ARMS)}, with commas, got {unknown[0]!r}")
    return [name for name in ARMS if name in chosen]


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(2), default=32, help="features of a token: a key and a value")
    p.add_argument(
        "--seq-len", "--seq_len", type=whole(2), default=16, help="tokens of one write, including its context"
    )
    p.add_argument("--context", type=whole(1), help="tokens of context before the pairs (default: a chunk)")
    p.add_argument("--batch", "--batch-size", type=whole(1), default=16)
    p.add_argument("--chunk-size", "--chunk_size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--arms", type=names, default=list(DEFAULT), help="arms to run, with commas")
    p.add_argument(
        "--threshold", type=float, help="complexity that switches a page in `paging` (default: set for --switch-rate)"
    )
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the threshold is set for, per opportunity"
    )
    p.add_argument(
        "--context-strength", type=float, default=0.0, help="share of the context added to each pair and query"
    )


def arms(args: argparse.Namespace) -> list[Arm]:
    memory = {**symplectic(), "num_pages": args.pages}
    alone = {**memory, "read_active_page_only": True}
    if args.threshold is None:
        paging = Arm("paging", memory, "threshold set for the switch rate", switch_rate=args.switch_rate)
    else:
        paging = Arm("paging", {**memory, "symplectic_page_threshold": args.threshold}, "threshold as given")
    from tasks.routers import lesson, recognising_memory, told_memory

    about = "a gate that was taught the contexts"
    taught: dict[str, Any] = {"make": recognising_memory, "penalty": lesson}
    every = [
        paging,
        Arm("recognised", alone, f"{about}; the active page is read", **taught),
        Arm("recognised_pooled", memory, f"{about}; all pages are read", **taught, controls=False),
        Arm("told", alone, "an oracle; the active page is read", make=told_memory, controls=False),
        Arm("keyed", keyed(args), "page by the phase of a writing's first chunk; the active page is read"),
    ]
    return [arm for arm in every if arm.name in args.arms]


def keyed(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **symplectic(phase_mix=0.5),
        "num_pages": args.pages,
        "manifold_state_keyed_paging": True,
        "page_switch_every": args.seq_len,
        "symplectic_page_threshold": 0.0,
        "read_active_page_only": True,
    }


def plan(args: argparse.Namespace, session) -> Plan:
    context = args.chunk_size if args.context is None else args.context
    if context >= args.seq_len:
        raise ValueError(f"--context must be less than the {args.seq_len} tokens of --seq-len, got {context}")
    task = Interference(
        dim=args.dim,
        pairs=args.seq_len - context,
        context=context,
        context_strength=args.context_strength,
        batch_size=args.batch,
        chunk_size=args.chunk_size,
    )
    baseline = Arm("baseline", {}, "one head, no gates, no pages", controls=False)
    versus = [pair for pair in VERSUS if set(pair) <= set(args.arms)]
    return Plan([task], [baseline, *arms(args)], versus=versus)


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Losses are relative errors of the carried, frozen memory; improvements are relative to the best control."""
    task = result["tasks"]["interference"]
    metrics = {
        "pre_a_loss": "error_a_before",
        "post_a_loss": "error_a_after",
        "post_b_loss": "error_b",
        "forgetting_delta": "forgetting",
    }
    means = {
        arm: {ours: record["metrics"][metric]["mean"] for ours, metric in metrics.items()}
        for arm, record in task["arms"].items()
    }
    improved, rates = {}, {}
    for name in args.arms:
        arm = task["arms"][name]
        rates[name] = arm["pages"]["switch_rate"]
        if gain := arm["gains"].get("error_a_after"):
            improved[name] = 100 * gain["mean"] / means[gain["against"]]["post_a_loss"]
    return {"variants": means, "interference_improvement_pct": improved, "switch_rate": rates}


QUICK = {"steps": 4, "batch": 4, "arms": ["paging", "recognised"]}
BENCHMARK = Benchmark("paging", __doc__, plan, flags=flags, fields=fields, quick=QUICK, schema=2)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
