"""What gates and pages cost in a training step, and how often a threshold turns pages.

python benchmarks/gate_costs.py                       # both, some minutes on one core
python benchmarks/gate_costs.py --part bands          # thresholds only
python benchmarks/gate_costs.py --quick               # seconds, to see it run

Costs: forward and backward of train_mac.py's memory (dim 384, 4 heads of 64, chunk 4, batch 128) on 4 x 512 tokens,
each option on four pages or alone, against a plain memory with as many heads (16). Arms take turns; the least CPU time
of all turns counts. Without orthogonalised updates, with which a memory with pages is the cheaper one (--spectral).

Bands: switches in 12 chunks, each of which may switch (page_switch_every = the chunk), at untrained weights: mean and
standard deviation over seeds. The sequences: a spiral and a helix in noise, and noise alone.
"""

import argparse
import math
import statistics
import time

import torch
from harness.environment import run_record
from harness.results import write_json
from harness.tables import table, times
from torch import Tensor

from titans_pytorch import MemoryMLP, NeuralMemory, calibrate_page_threshold, gate_trace

SCHEMA = 1
HEADS, PAGES = 4, 4
GATE = {"use_symplectic_gating": True}
DMD = {"use_dmd_gating": True}
BOTH = {**GATE, **DMD, "combine_symplectic_and_dmd": True}
KINETICS = {"kinetics_coupling": True, "kinetics_mix": 0.5}
PAGED = {"num_pages": PAGES, "symplectic_page_threshold": 0.05, "page_switch_every": 128, "heads": HEADS}


def gate(**kwargs):
    return {**GATE, "symplectic_gate_kwargs": kwargs}


COSTS = {
    "plain, 16 heads": {},
    "gate": GATE,
    "dmd": DMD,
    "gate and dmd": BOTH,
    "kinetics": KINETICS,
    "gate, 4 pages": {**GATE, **PAGED},
    "dmd, 4 pages": {**DMD, **PAGED},
    "gate and dmd, 4 pages": {**BOTH, **PAGED},
    "gate and kinetics, 4 pages": {**GATE, **KINETICS, **PAGED},
    "phase, keyed pages": {**gate(phase_mix=0.5), "manifold_state_keyed_paging": True, **PAGED},
    "phase, hierarchical pages": {**gate(phase_mix=0.5), "hierarchical_paging": True, **PAGED},
    "quorum and budget, 4 pages": {**gate(quorum_mix=0.5, budget_topk_ratio=0.3), **PAGED},
    "codebook, 4 pages": {**gate(codebook_mix=0.5), **PAGED},
    "gated top-k, 4 pages": {**gate(gated=True, top_k=96), **PAGED},
    "quantile, 4 pages": {**GATE, "page_threshold_quantile": 0.9, **PAGED},
}
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.12, 0.14, 0.16, 0.2, 0.5, 0.8, 0.85, 0.9, 0.95)
WINDOWS, CHUNK, WIDTH, ROWS = 12, 32, 128, 4


def measure_costs(repeats: int, spectral: bool, tokens: int) -> dict[str, float]:
    """Least CPU seconds of each arm."""
    seq = torch.randn(4, tokens, 384, generator=torch.Generator().manual_seed(0))
    arms = {}
    for name, options in COSTS.items():
        torch.manual_seed(0)
        arms[name] = NeuralMemory(
            384,
            4,
            batch_size=128,
            dim_head=64,
            model=MemoryMLP(64, depth=2, expansion_factor=2.0),
            qk_rmsnorm=True,
            attn_pool_chunks=True,
            per_parameter_lr_modulation=True,
            default_step_transform_max_lr=0.1,
            spectral_norm_surprises=spectral,
            **{"heads": HEADS * PAGES, **options},
        )
    least = dict.fromkeys(arms, math.inf)
    for turn in range(repeats + 1):
        for name, memory in arms.items():
            memory.zero_grad()
            began = time.process_time()
            memory(seq)[0].square().mean().backward()
            if turn:  # the first finds everything cold
                least[name] = min(least[name], time.process_time() - began)
    return least


def spiral(n: int, generator: torch.Generator) -> Tensor:
    """[rows n width]: cosine, sine, ramp, then noise."""
    return _curve(n, 4, 0.1, generator)


def helix(n: int, generator: torch.Generator) -> Tensor:
    return _curve(n, 6, 0.08, generator)


def noise(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, n, WIDTH, generator=generator)


def _curve(n, half_turns, size, generator):
    t = torch.linspace(0, half_turns * math.pi, n)
    seq = size * torch.randn(ROWS, n, WIDTH, generator=generator)
    seq[..., 0], seq[..., 1], seq[..., 2] = t.cos(), t.sin(), t / t[-1]
    return seq


SEQUENCES = {"spiral": spiral, "helix": helix, "noise": noise}
BANDS = {"gate": GATE, "gate, dim_free": gate(dim_free=True), "dmd": DMD}


def measure_bands(seeds: list[int], thresholds) -> list[dict]:
    """Switches per row in 12 windows, for each gate, sequence and threshold."""
    found = []
    for gate_name, options in BANDS.items():
        for sequence, make in SEQUENCES.items():
            counts: dict[object, list[float]] = {threshold: [] for threshold in (*thresholds, "calibrated to 3")}
            for seed in seeds:
                torch.manual_seed(seed)
                memory = NeuralMemory(WIDTH, CHUNK, num_pages=2, page_switch_every=CHUNK, **options)
                seq = make(WINDOWS * CHUNK, torch.Generator().manual_seed(seed))
                for threshold, values in counts.items():
                    if isinstance(threshold, str):
                        calibrate_page_threshold(memory, seq, 3 / WINDOWS, set_threshold=True)
                    else:
                        memory.symplectic_page_threshold = threshold
                    values.append(gate_trace(memory, seq).switch_rate * WINDOWS)
            for threshold, values in counts.items():
                found.append(
                    {
                        "gate": gate_name,
                        "sequence": sequence,
                        "threshold": threshold,
                        "switches": statistics.mean(values),
                        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                    }
                )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("costs", "bands", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each arm")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds the bands are taken over")
    parser.add_argument("--spectral", action="store_true", help="with orthogonalised updates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few tokens, one turn, one seed")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds = list(range(1 if args.quick else args.seeds))
    result = {"schema": SCHEMA, "run": run_record(vars(args), seeds, "cpu", args.threads)}

    if args.part != "bands":
        seconds = measure_costs(1 if args.quick else args.repeats, args.spectral, 32 if args.quick else 512)
        plain = seconds["plain, 16 heads"]
        result["costs"] = [{"arm": k, "cpu_seconds": v, "to_plain": v / plain} for k, v in seconds.items()]
        print(table(("arm", "CPU s", "to plain"), [(k, f"{v:.3f}", times(v / plain)) for k, v in seconds.items()]))
    if args.part != "costs":
        result["bands"] = measure_bands(seeds, THRESHOLDS)
        columns = (*THRESHOLDS, "calibrated to 3")
        cells = {(r["gate"], r["sequence"], r["threshold"]): r for r in result["bands"]}
        rows = [
            (g, s, *(f"{cells[g, s, t]['switches']:.1f}±{cells[g, s, t]['deviation']:.1f}" for t in columns))
            for g in BANDS
            for s in SEQUENCES
        ]
        print(f"\nswitches in {WINDOWS} windows, by threshold")
        print(table(("gate", "sequence", *map(str, columns)), rows, left=2))
    if args.output_json:
        write_json(args.output_json, result)


if __name__ == "__main__":
    main()
