"""Do gates and pages help to close brackets? A value that an inner bracket of the same kind has overwritten must be
read again.

python benchmarks/benchmark_grammar.py --output-json runs/grammar.json --output-png runs/grammar.png    # minutes
python benchmarks/benchmark_grammar.py --quick                                                          # seconds

symplectic and dmd have --pages pages each, their thresholds set for --switch-rate. See tasks/grammar.py.
"""

import argparse
import sys
from typing import Any

from harness.arms import Arm
from harness.compare import improvement_pct
from harness.gates import symplectic
from harness.program import Benchmark, Plan, whole
from tasks.grammar import Grammar


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(2), default=32, help="features of a token: a key and a value")
    p.add_argument("--kinds", type=whole(1), default=4, help="kinds of brackets")
    p.add_argument("--depth", type=whole(2), default=3, help="largest nesting depth")
    p.add_argument("--seq-len", type=whole(4), default=32)
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=1)
    p.add_argument("--memory-batch", type=whole(1), default=8, help="tokens of a mini-batch")
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--threshold", type=float, help="complexity that switches a page (default: set for --switch-rate)")
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the thresholds are set for, per opportunity"
    )


def plan(args: argparse.Namespace, session) -> Plan:
    task = Grammar(args.dim, args.kinds, args.depth, args.seq_len, args.batch_size, args.chunk_size, args.memory_batch)
    pages: dict[str, Any] = {"num_pages": args.pages}
    rate = args.switch_rate
    if args.threshold is not None:
        pages["symplectic_page_threshold"], rate = args.threshold, None
    arms = [
        Arm("baseline", {}, "one head, no gate, no pages", controls=False),
        Arm("symplectic", {**symplectic(), **pages}, "pages by complexity", switch_rate=rate),
        Arm("dmd", {"use_dmd_gating": True, **pages}, "pages by the error of DMD", switch_rate=rate),
    ]
    return Plan([task], arms, versus=[("symplectic", "dmd")])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """strategies: final_loss is the error at closings; improvement_pct: the gain over the best control, in
    percent of its error.
    """
    found = {
        name: {
            "final_loss": arm["metrics"]["error"]["mean"],
            "deep_loss": arm["metrics"]["error_deep"]["mean"],
            "improvement_pct": improvement_pct(arm, "error"),
        }
        for name, arm in result["tasks"]["grammar"]["arms"].items()
    }
    return {"strategies": found}


QUICK = {"steps": 3, "batch_size": 4}
BENCHMARK = Benchmark("grammar", __doc__, plan, flags=flags, fields=fields, quick=QUICK)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
