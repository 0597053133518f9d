"""Draws docs/images/pages.png: what a gate and pages do along a sequence.

python docs/scripts/paged.py

Two contexts take turns, each a rotation in a plane of its own, in noise. Nothing is trained: the default gate with
`dim_free`, four pages, a threshold calibrated for a switch in every fourth window.
"""

import math
import sys
from pathlib import Path

import torch

from titans_pytorch import NeuralMemory, calibrate_page_threshold, gate_trace, plot_gate_trace
from titans_pytorch.training.options import OneLineParser

DIM, TURN = 32, 64


def contexts(tokens: int, rng: torch.Generator) -> torch.Tensor:
    """[1 n d]: a slow rotation, then a fast one in another plane, and again."""
    planes = torch.linalg.qr(torch.randn(DIM, DIM, generator=rng))[0][:4].unflatten(0, (2, 2))
    t = torch.arange(tokens)
    which = t // TURN % 2
    angle = 2 * math.pi * t / torch.where(which == 0, 64, 9)
    points = torch.stack((angle.cos(), angle.sin()), dim=-1).unsqueeze(-1) * planes[which]
    return (4 * points.sum(dim=1) + 0.1 * torch.randn(tokens, DIM, generator=rng)).unsqueeze(0)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images" / "pages.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    memory = NeuralMemory(
        DIM,
        chunk_size=8,
        use_symplectic_gating=True,
        symplectic_gate_kwargs={"dim_free": True},
        num_pages=4,
        page_switch_every=16,
    )
    seq = contexts(512, torch.Generator().manual_seed(args.seed))
    calibrate_page_threshold(memory, seq, target_switch_rate=0.25, set_threshold=True)
    plot_gate_trace(gate_trace(memory, seq), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
