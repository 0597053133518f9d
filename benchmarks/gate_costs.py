"""What each option of gates and pages costs in a training step.

python benchmarks/gate_costs.py                              # some minutes on one core
python benchmarks/gate_costs.py --arms "pages|kinetics"      # those whose name matches
python benchmarks/gate_costs.py --quick                      # few tokens: shows that it runs

Forward and backward of the memory of train_mac.py (dim 384, heads of 64, chunk 4, batch 128) on 4 x 512 tokens, against
a plain memory of 16 heads; a memory with pages has 4 pages of 4 heads. Arms are measured in rounds; the least CPU time
of all rounds counts (on CUDA the least time). Updates are not orthogonalised unless --spectral is given. With it a
memory with pages is cheaper than a plain one, since it orthogonalises the updates of one page only.
"""

from __future__ import annotations

import argparse
import math
import re
import sys

from harness.environment import run_record
from harness.later import torch
from harness.program import whole
from harness.tables import table
from harness.timing import cpu_seconds
from tqdm import tqdm

import titans_pytorch
from titans_pytorch.common.files import write_json
from titans_pytorch.training.options import OneLineParser

SCHEMA = 2
HEADS, DIM, BATCH = 16, 384, 128
PLAIN = f"plain, {HEADS} heads"
DMD = {"use_dmd_gating": True}
KINETICS = {"kinetics_coupling": True, "kinetics_mix": 0.5}


def gate(**kwargs) -> dict:
    return {"use_symplectic_gating": True, "symplectic_gate_kwargs": kwargs}


def pages(count: int, every: int | None = BATCH) -> dict:
    """Keywords of a memory with pages, with a threshold that most chunks exceed."""
    return {
        "num_pages": count,
        "heads": HEADS // count,
        "symplectic_page_threshold": 0.01,
        "page_switch_every": every,
    }


BOTH = {**gate(), **DMD, "combine_symplectic_and_dmd": True}
PHASE = gate(phase_mix=0.5)
KEYED = {"manifold_state_keyed_paging": True}
ALL = gate(gated=True, top_k=96, phase_mix=0.3, codebook_mix=0.3, quorum_mix=0.5, budget_topk_ratio=0.3)
ARMS = {
    PLAIN: {},
    "gate": gate(),
    "dmd": DMD,
    "gate and dmd": BOTH,
    "kinetics": KINETICS,
    "gate, 4 pages": {**gate(), **pages(4)},
    "gate, 2 pages": {**gate(), **pages(2)},
    "gate, 8 pages": {**gate(), **pages(8)},
    "gate, 16 pages": {**gate(), **pages(16)},
    "gate, 4 pages, a switch in a call": {**gate(), **pages(4, every=None)},
    "gate, 4 pages, a switch in a chunk": {**gate(), **pages(4, every=4)},
    "gate, 4 pages by quantile": {**gate(), **pages(4), "page_threshold_quantile": 0.5},
    "gate and kinetics, 4 pages": {**gate(), **KINETICS, **pages(4)},
    "dmd, 4 pages": {**DMD, **pages(4)},
    "gate and dmd, 4 pages": {**BOTH, **pages(4)},
    "gated, 4 pages": {**gate(gated=True), **pages(4)},
    "gated diag, 4 pages": {**gate(gated=True, diag=True), **pages(4)},
    "gated soft, 4 pages": {**gate(gated=True, gate_mode="soft"), **pages(4)},
    "gated top-k, 4 pages": {**gate(gated=True, top_k=96), **pages(4)},
    "gated adaptive top-k, 4 pages": {**gate(gated=True, adaptive_topk_ratio=0.5), **pages(4)},
    "phase, 4 pages": {**PHASE, **pages(4)},
    "phase, 4 keyed pages": {**PHASE, **KEYED, **pages(4)},
    "phase, 4 hierarchical pages": {**PHASE, "hierarchical_paging": True, "coarse_pages": 2, **pages(4)},
    "codebook, 4 pages": {**gate(codebook_mix=0.5), **pages(4)},
    "codebook top-k, 4 pages": {**gate(codebook_mix=0.5, codebook_topk=4), **pages(4)},
    "quorum, 4 pages": {**gate(quorum_mix=0.5), **pages(4)},
    "quorum and budget, 4 pages": {**gate(quorum_mix=0.5, budget_topk_ratio=0.3), **pages(4)},
    "all of the gate, 4 keyed pages": {**ALL, **KEYED, **pages(4)},
    "all of it and dmd and kinetics": {**BOTH, **ALL, **KINETICS, **KEYED, **pages(4)},
}


def build(options: dict, spectral: bool, device: str) -> titans_pytorch.NeuralMemory:
    torch.manual_seed(0)
    return titans_pytorch.NeuralMemory(
        DIM,
        4,
        batch_size=BATCH,
        dim_head=64,
        model=titans_pytorch.MemoryMLP(64, depth=2, expansion_factor=2.0),
        qk_rmsnorm=True,
        attn_pool_chunks=True,
        per_parameter_lr_modulation=True,
        default_step_transform_max_lr=0.1,
        spectral_norm_surprises=spectral,
        **{"heads": HEADS, **options},
    ).to(device)


def train_step(memory: torch.nn.Module, seq: torch.Tensor):
    memory.zero_grad()
    memory(seq)[0].square().mean().backward()


def measure(arms: dict[str, dict], repeats: int, spectral: bool, tokens: int, device: str = "cpu") -> list[dict]:
    """Measure each arm: least seconds, their ratio to the plain memory's, and switches in a step."""
    seq = torch.randn(4, tokens, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    memories = {name: build(options, spectral, device) for name, options in arms.items()}
    least, switches = dict.fromkeys(memories, math.inf), dict.fromkeys(memories, 0)
    with tqdm(total=(repeats + 1) * len(memories), unit="step", file=sys.stderr, disable=None) as bar:
        for turn in range(repeats + 1):
            for name, memory in memories.items():
                memory.page_switch_events.zero_()
                seconds = cpu_seconds(lambda memory=memory: train_step(memory, seq), device)
                if turn:  # the first call finds cold caches
                    least[name] = min(least[name], seconds)
                switches[name] = int(memory.page_switch_events)
                bar.update()
    return [
        {"arm": name, "seconds": s, "to_plain": s / least[PLAIN], "switches": switches[name]}
        for name, s in least.items()
    ]


def cost_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all scripts for costs share."""
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each arm")
    parser.add_argument(
        "--threads",
        type=whole(1),
        default=1,
        metavar="N",
        help="CPU threads; CPU time is counted [1]",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few tokens, one round")
    parser.add_argument("--output-json")


def write_costs(args: argparse.Namespace, schema: int, found: list[dict]) -> None:
    if args.output_json:
        run = run_record(vars(args), [0], args.device, args.threads)
        write_json(args.output_json, {"schema": schema, "run": run, "costs": found})


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--arms", default="", help="a regular expression; the plain memory is always included")
    parser.add_argument("--spectral", action="store_true", help="with orthogonalised updates")
    cost_flags(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    arms = {name: options for name, options in ARMS.items() if name == PLAIN or re.search(args.arms, name)}
    found = measure(arms, 1 if args.quick else args.repeats, args.spectral, 32 if args.quick else 512, args.device)
    rows = [(r["arm"], f"{r['seconds']:.3f}", f"{r['to_plain']:.2f}", str(r["switches"])) for r in found]
    print(table(("arm", "seconds", "to plain", "switches"), rows))
    write_costs(args, SCHEMA, found)


if __name__ == "__main__":
    main()
