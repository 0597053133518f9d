"""Do gated pages help a memory-as-context transformer on real text? It is trained and scored on bytes.

python benchmarks/benchmark_mac_paging.py --steps 100 --pages 2 --threshold 0.2
python benchmarks/benchmark_mac_paging.py --data FILE --switch-rate 0.3 --steps 1000    # a threshold that is crossed
python benchmarks/benchmark_mac_paging.py --quick                                       # seconds

Without --data, the source text of Python's own standard library is read. Its last tenth is held out. The unit is bits
per byte. See tasks/text.py.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from harness.arms import Arm
from harness.gates import symplectic
from harness.program import Benchmark, Plan, whole
from tasks.text import Text


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", default="stdlib", help="a file (plain, .gz or .zip); default Python's standard library")
    p.add_argument("--data-dir", default="data", help="folder of unpacked bytes")
    p.add_argument("--steps", type=whole(0), default=100, help="training steps")
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument("--threshold", type=float, default=0.2, help="complexity that switches a page")
    p.add_argument(
        "--switch-rate",
        type=float,
        help="set the threshold for this switch rate per opportunity, in place of --threshold",
    )
    p.add_argument("--dim", type=whole(4), default=48)
    p.add_argument("--depth", type=whole(1), default=2)
    p.add_argument("--seq-len", type=whole(2), default=128, help="bytes of a sequence")
    p.add_argument("--batch-size", type=whole(1), default=4)


def plan(args: argparse.Namespace, session) -> Plan:
    task = Text(
        args.data, args.data_dir, dim=args.dim, depth=args.depth, length=args.seq_len, batch_size=args.batch_size
    )
    memory: dict[str, Any] = {**symplectic(), "num_pages": args.pages}
    if args.switch_rate is None:
        arm = Arm("gating_paging", {**memory, "symplectic_page_threshold": args.threshold}, "threshold as given")
    else:
        arm = Arm("gating_paging", memory, "threshold set for the switch rate", switch_rate=args.switch_rate)
    return Plan([task], [Arm("baseline", {}, "one head, no gate, no pages", controls=False), arm])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """variants: losses in nats per byte; milliseconds of a training step; switches of each memory layer over the seeds.
    val_delta: loss of gating_paging minus that of its best control."""
    arms, times = result["tasks"]["text"]["arms"], result["timing"]["arms"]
    found = {}
    for name, arm in arms.items():
        found[name] = {
            "train_loss_tail": arm["training"]["loss_tail"]["mean"],
            "val_loss": arm["metrics"]["bits_per_byte"]["mean"] * math.log(2),
            "step_ms": times[name]["train_ms"] if name in times else None,
            "switches": arm["pages"]["layers"] if arm["pages"] else [],
            "total_switches": arm["pages"]["events"] if arm["pages"] else 0,
            "switch_rate": arm["pages"]["switch_rate"] if arm["pages"] else None,
        }
    gain = arms["gating_paging"]["gains"]["bits_per_byte"]
    return {"steps": args.steps, "variants": found, "val_delta": -gain["mean"] * math.log(2)}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"\nafter {result['steps']} steps, losses in nats per byte, switches of each memory layer over the seeds"
    for name, arm in result["variants"].items():
        time = "not timed" if arm["step_ms"] is None else f"{arm['step_ms']:.1f} ms a training step"
        switches = f"switches {arm['switches']} (total {arm['total_switches']})" if arm["switches"] else "no pages"
        yield f"{name}: training {arm['train_loss_tail']:.4f}, held out {arm['val_loss']:.4f}, {time}, {switches}"
    yield f"held-out loss of gating_paging less its best control's: {result['val_delta']:+.4f}"


QUICK = {"steps": 2, "batch_size": 2, "seq_len": 32}
BENCHMARK = Benchmark("mac_paging", __doc__, plan, flags=flags, fields=fields, lines=lines, quick=QUICK, lr=3e-3)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
