"""Ten gates and ways to switch pages, on noisy curves, with statistics of each gate.

python benchmarks/benchmark_gate_variants.py --output-json runs/gates.json --output-png runs/gates.png    # minutes
python benchmarks/benchmark_gate_variants.py --quick                                                      # seconds

Every variant runs beside a plain memory with as many heads and parameters, and beside pages that never switch. It is
also compared with constant_gate, which scores all tokens equally: a gain over it comes from telling tokens apart, not
from a smaller forget gate everywhere. Gate statistics are taken after training, on held-out data, from the tokens that
the memory passes to its gate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.arms import Arm
from harness.gates import QUORUM, elementwise, phase, symplectic
from harness.later import torch
from harness.program import Benchmark, Plan, whole
from tasks.curves import Curves, Follow

import titans_pytorch

NAMES = ("complexity_mean", "complexity_max", "codebook_mean", "quorum_mean", "quorum_active_frac", "sparse_k_mean")


@dataclass(frozen=True)
class FollowGated(Follow):
    """The task Follow, with statistics of the gate."""

    def notes(self, model: torch.nn.Module, batch: Curves) -> Mapping[str, float]:
        return gate_statistics(model, batch.noisy[:, :-1])


def gate_statistics(memory: torch.nn.Module, seq: torch.Tensor) -> dict[str, float]:
    """Return statistics of the gate on a sequence [b n d]; codebook, quorum, budget and sparse k only where it
    has them.
    """
    gate = getattr(memory, "symplectic_gate", None)
    if not isinstance(gate, titans_pytorch.SymplecticGating):
        return {}
    seen: list[torch.Tensor] = []
    hook = gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        memory(seq)
    finally:
        hook.remove()
    calls = [gate(x, return_codebook_map=True, return_quorum_map=True, return_sparse_k=True) for x in seen]
    complexity, codebook, quorum, sparse_k = zip(*calls, strict=True)
    complexity = torch.cat(complexity, dim=1)
    found = {"complexity_mean": complexity.mean().item(), "complexity_max": complexity.max().item()}
    if gate.codebook_mix > 0:
        found["codebook_mean"] = torch.cat(codebook, dim=1).mean().item()
    if gate.quorum_mix > 0:
        found["quorum_mean"] = torch.cat(quorum, dim=1).mean().item()
    if gate.budget_topk_ratio is not None:
        found["quorum_active_frac"] = (torch.cat(quorum, dim=1) > 0).float().mean().item()
    if sparse_k[0] is not None:
        found["sparse_k_mean"] = torch.cat(sparse_k, dim=1).float().mean().item()
    return found


def variants(dim: int, pages: int) -> dict[str, dict[str, Any]]:
    soft, hard = elementwise(), elementwise("hard")
    codebook = {"codebook_mix": 0.7, "codebook_size": 16, "codebook_temperature": 0.1, "codebook_topk": 3}
    budget = {**QUORUM, "quorum_mix": 0.75, "budget_topk_ratio": 0.2}
    paged = {"num_pages": pages} if pages > 1 else {}
    four = max(pages + pages % 2, 4)
    return {
        "symplectic_default": {**symplectic(), **paged},
        "hard_diag": {**symplectic(**hard), **paged},
        "soft_diag": {**symplectic(**soft), **paged},
        "hard_topk8": {**symplectic(**hard, top_k=min(8, dim)), **paged},
        "adaptive_topk": {**symplectic(**soft, adaptive_topk_ratio=0.6, adaptive_topk_min_k=1), **paged},
        "phase_mix": {**symplectic(**soft, **phase(dim, 0.5)), **paged},
        "quorum_budget": {**symplectic(**soft, **phase(dim, 0.5), **budget), **paged},
        "kinetics_coupled": {**symplectic(**soft, **QUORUM), "kinetics_coupling": True, "kinetics_mix": 0.5, **paged},
        "combinatorial_codebook": {**symplectic(**soft, **QUORUM, **codebook), **paged},
        "hierarchical_route": {
            **symplectic(**soft, **phase(dim, 0.5)),
            "num_pages": four,
            "hierarchical_paging": True,
            "coarse_pages": 2,
            "fine_pages": four // 2,
        },
    }


def chosen_names(text: str) -> list[str]:
    names = list(variants(16, 2))
    wanted = text.split(",")
    if unknown := set(wanted) - set(names):
        raise argparse.ArgumentTypeError(f"must be names of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return [name for name in names if name in wanted]


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(4), default=16)
    p.add_argument("--seq-len", type=whole(4), default=48, help="tokens of a curve, a multiple of two chunks")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument(
        "--pages", type=whole(1), default=2, help="pages of all variants; hierarchical_route has at least four"
    )
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the thresholds are set for, per opportunity"
    )
    p.add_argument(
        "--variants", type=chosen_names, default=list(variants(16, 2)), help="names of variants, with commas"
    )


def plan(args: argparse.Namespace, session) -> Plan:
    shared = {"dim": args.dim, "length": args.seq_len, "batch_size": args.batch_size, "chunk_size": args.chunk_size}
    known = variants(args.dim, args.pages)
    rate = {name: args.switch_rate if known[name].get("num_pages", 1) > 1 else None for name in args.variants}
    arms = [Arm(name, known[name], switch_rate=rate[name]) for name in args.variants]
    from tasks.constant_gate import constant_gate_memory

    constant = Arm("constant_gate", {}, "all tokens equally complex", make=constant_gate_memory, controls=False)
    tasks = [FollowGated("spiral", **shared), FollowGated("helix", **shared, turns=(9.0, 18.0), rise=2.0)]
    return Plan(tasks, [constant, *arms], versus=[(arm.name, constant.name) for arm in arms])


def fields(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """gate: means on the spiral, None where a gate has no such part."""
    found: dict[str, Any] = {}
    for name in args.variants:
        arms = {task: record["arms"][name] for task, record in result["tasks"].items()}
        notes = {k: got["mean"] for k, got in arms["spiral"]["notes"].items()}
        found[name] = {task: {"final_loss": arm["metrics"]["error"]["mean"]} for task, arm in arms.items()}
        found[name]["gate"] = {k: notes.get(k) for k in NAMES}
        if name in result["timing"]["arms"]:
            found[name]["spiral"]["step_ms"] = result["timing"]["arms"][name]["train_ms"]
    return {"variants": found}


FEW = ["symplectic_default", "quorum_budget", "hierarchical_route"]
QUICK = {"steps": 2, "batch_size": 2, "seq_len": 16, "repeats": 0, "variants": FEW}
BENCHMARK = Benchmark("gate_variants", __doc__, plan, flags=flags, fields=fields, quick=QUICK, steps=100)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
