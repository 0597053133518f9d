"""Which codebook in the gate, if any, helps a memory with motifs that return?

python benchmarks/benchmark_codebook_sweep.py --output-json runs/codebooks.json --output-png runs/codebooks.png
python benchmarks/benchmark_codebook_sweep.py --quick

A grid of mixes, sizes and top-k is tried on selection seeds, and as many codebooks drawn at random from the ranges that
the grid spans. The winner of each search, and the gate without a codebook, are then measured on the reported seeds.
Without a mix, size and top-k have no effect: that cell is one arm, tried once. Task: tasks/motifs.py.
"""

import argparse
import random
import sys
from typing import Any

from harness.arms import Arm
from harness.gates import phase_quorum, symplectic
from harness.program import Benchmark, Plan, numbers, whole
from harness.search import Search, random_search
from tasks.motifs import MultiMotif

VERSUS = (("grid_best", "no_codebook"), ("grid_best", "random_best"))


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(8), default=16)
    p.add_argument("--seq-len", type=whole(24), default=96, help="a multiple of three chunks and of six segments")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=2)
    p.add_argument(
        "--mixes", type=numbers, default=numbers("0,0.5,0.7"), help="weights of the codebook score, with commas"
    )
    p.add_argument("--sizes", type=sizes, default=sizes("8,16,24"), help="numbers of codebook entries, with commas")
    p.add_argument(
        "--topks",
        type=sizes,
        default=sizes("none,2,4"),
        help="numbers of entries used per token (none: all), with commas",
    )
    p.add_argument(
        "--boundary-weight", type=float, default=0.7, help="weight of mse_boundary, in [0, 1]; mse_total has the rest"
    )
    p.add_argument(
        "--latency-weight",
        type=float,
        default=0.0,
        help="penalty per millisecond of a training step, reported separately",
    )
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the threshold is set for, per opportunity"
    )
    p.add_argument("--search-seeds", type=whole(1), default=2, help="seeds on which codebooks are chosen")


def sizes(text: str) -> list[int | None]:
    """Whole numbers of at least 1, or "none"."""
    try:
        found = [None if part.strip() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if any(n is not None and n < 1 for n in found):
        raise argparse.ArgumentTypeError(f"must be whole numbers or none, with commas between, got {text!r}")
    return list(dict.fromkeys(found))


def arm_of(args: argparse.Namespace, params: dict[str, Any], name: str = "codebook") -> Arm:
    gate = phase_quorum(args.dim)
    if params["codebook_mix"] > 0:
        gate |= {**params, "codebook_temperature": 0.1}
    memory = {**symplectic(**gate), "num_pages": args.pages, "manifold_state_keyed_paging": True}
    about = ", ".join(f"{k.removeprefix('codebook_')} {v}" for k, v in params.items())
    return Arm(name, memory, about, switch_rate=args.switch_rate)


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"codebook_mix": mix, "codebook_size": size, "codebook_topk": topk}
        for mix in args.mixes
        for size in args.sizes
        for topk in args.topks
        if topk is None or topk <= size
    ]


def drawn(args: argparse.Namespace, source: random.Random) -> dict[str, Any]:
    """Draw a codebook from the ranges that the grid spans."""
    size = source.randint(min(args.sizes), max(args.sizes))
    most = max((k for k in args.topks if k is not None), default=0)
    topk = source.choice([None, *range(1, min(most, size) + 1)])
    mix = round(source.uniform(min(args.mixes), max(args.mixes)), 3)
    return {"codebook_mix": mix, "codebook_size": size, "codebook_topk": topk}


def plan(args: argparse.Namespace, session) -> Plan:
    if None in args.sizes:
        raise ValueError("--sizes must be whole numbers, got none")
    if not 0 <= args.boundary_weight <= 1:
        raise ValueError(f"--boundary-weight must be a number in [0, 1], got {args.boundary_weight}")
    task = MultiMotif(args.dim, args.seq_len, batch_size=args.batch_size, chunk_size=args.chunk_size)

    def value(params, outcomes) -> float:
        got, w = outcomes[task.name]["metrics"], args.boundary_weight
        return w * got["mse_boundary"] + (1 - w) * got["mse_total"]

    search = Search(session, [task], session.selection_seeds(args.search_seeds), lambda p: arm_of(args, p), value)
    for params in grid(args):
        search.trial(params)
    others = random_search(search.fresh(), lambda source: drawn(args, source), search.budget, args.seed)
    arms = [
        arm_of(args, {"codebook_mix": 0.0}, "no_codebook"),
        arm_of(args, search.best.params, "grid_best"),
        arm_of(args, others.best.params, "random_best"),
    ]
    return Plan([task], arms, versus=VERSUS, extra={"grid": search.record(), "random": others.record()})


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """best and trials: values on the selection seeds. Verdicts about the best are in `versus`."""
    ms = result["timing"]["arms"].get("grid_best", {}).get("train_ms")
    trials = [{**trial, "stats": trial["stats"]["multi_motif"]} for trial in result["grid"]["trials"]]
    latency = None if ms is None else args.latency_weight * ms
    return {"best": {**trials[0], "latency_term": latency}, "top5": trials[:5], "trials": trials}


QUICK = {
    "steps": 2,
    "batch_size": 4,
    "seq_len": 48,
    "mixes": numbers("0,0.5"),
    "sizes": sizes("8,16"),
    "topks": sizes("none"),
    "search_seeds": 1,
}
BENCHMARK = Benchmark("codebook_sweep", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=50)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
