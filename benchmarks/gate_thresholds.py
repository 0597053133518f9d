"""How often a page threshold switches pages, for each gate, on a spiral and a helix in noise and on noise alone.

python benchmarks/gate_thresholds.py                  # about a minute on one core
python benchmarks/gate_thresholds.py --quick          # seconds: shows that it runs

Switches in 12 chunks, each of which may switch (page_switch_every = the chunk), at untrained weights and dim 128: mean
and standard deviation over seeds. The last column is a threshold from `calibrate_page_threshold` for 3 switches.
"""

from __future__ import annotations

import math
import statistics
import sys

from harness.environment import run_record
from harness.later import torch
from harness.tables import table
from tqdm import tqdm

import titans_pytorch
from titans_pytorch.common.files import write_json
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

SCHEMA = 1
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.12, 0.14, 0.16, 0.2, 0.5, 0.8, 0.85, 0.9, 0.95)
CALIBRATED = "for 3"
WINDOWS, CHUNK, WIDTH, ROWS = 12, 32, 128, 4


def spiral(n: int, generator: torch.Generator) -> torch.Tensor:
    """Make sequences [rows n width]: cosine, sine, ramp, then noise."""
    return _curve(n, 4, 0.1, generator)


def helix(n: int, generator: torch.Generator) -> torch.Tensor:
    return _curve(n, 6, 0.08, generator)


def noise(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, n, WIDTH, generator=generator)


def _curve(n, half_turns, size, generator):
    t = torch.linspace(0, half_turns * math.pi, n)
    seq = size * torch.randn(ROWS, n, WIDTH, generator=generator)
    seq[..., 0], seq[..., 1], seq[..., 2] = t.cos(), t.sin(), t / t[-1]
    return seq


SEQUENCES = {"spiral": spiral, "helix": helix, "noise": noise}
GATES = {
    "gate": {"use_symplectic_gating": True},
    "gate, dim_free": {"use_symplectic_gating": True, "symplectic_gate_kwargs": {"dim_free": True}},
    "dmd": {"use_dmd_gating": True},
}


def measure(seeds: list[int], thresholds=THRESHOLDS) -> list[dict]:
    """Count switches per row in 12 windows, for each gate, sequence and threshold."""
    found = []
    for gate_name, options in tqdm(GATES.items(), unit="gate", file=sys.stderr, disable=None):
        for sequence, make in SEQUENCES.items():
            counts: dict[object, list[float]] = {threshold: [] for threshold in (*thresholds, CALIBRATED)}
            for seed in seeds:
                torch.manual_seed(seed)
                memory = titans_pytorch.NeuralMemory(WIDTH, CHUNK, num_pages=2, page_switch_every=CHUNK, **options)
                seq = make(WINDOWS * CHUNK, torch.Generator().manual_seed(seed))
                for threshold, values in counts.items():
                    if isinstance(threshold, str):
                        titans_pytorch.calibrate_page_threshold(memory, seq, 3 / WINDOWS, set_threshold=True)
                    else:
                        memory.symplectic_page_threshold = threshold
                    values.append(titans_pytorch.gate_trace(memory, seq).switch_rate * WINDOWS)
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


def report(found: list[dict]) -> str:
    columns = list(dict.fromkeys(r["threshold"] for r in found))
    cells = {(r["gate"], r["sequence"], r["threshold"]): f"{r['switches']:.1f}±{r['deviation']:.1f}" for r in found}
    rows = [(g, s, *(cells[g, s, t] for t in columns)) for g in GATES for s in SEQUENCES]
    return table(("gate", "sequence", *map(str, columns)), rows, left=2)


def main():
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    threads = choose_threads(args.threads, WIDTH)
    seeds = list(range(args.seed, args.seed + (1 if args.quick else args.seeds)))
    found = measure(seeds)
    print(report(found))
    if args.output_json:
        write_json(
            args.output_json, {"schema": SCHEMA, "run": run_record(vars(args), seeds, "cpu", threads), "bands": found}
        )


if __name__ == "__main__":
    main()
