"""Measure a training step with one and with two threads, by width of the model: from which width on do two pay?

python docs/scripts/threads.py                        # two minutes of two idle cores
python docs/scripts/threads.py --widths 128,1024
"""

import sys
import time

import torch

from titans_pytorch import TitansConfig, build_model
from titans_pytorch.training.options import OneLineParser, whole_numbers


def seconds(width: int, threads: int, turns: int) -> float:
    """The least time of a training step of MAC on [4 512] bytes, on the clock of the wall."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = build_model(TitansConfig.tiny(variant="mac", d_model=width, d_hidden=width // 2))
    ids = torch.randint(0, 256, (4, 513))
    times = []
    for _ in range(turns + 1):
        begun = time.perf_counter()
        model(ids, return_loss=True).backward()
        times.append(time.perf_counter() - begun)
    return min(times[1:])  # the first one warms up


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--widths", type=whole_numbers, default=(64, 128, 256, 512, 1024), help="d_model, with commas")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each [5]")
    options = parser.parse_args(argv)
    print("| width | one thread | two threads | two / one |\n|--:|--:|--:|--:|")
    for width in options.widths:
        one, two = (seconds(width, threads, options.turns) for threads in (1, 2))
        print(f"| {width} | {1e3 * one:.0f} ms | {1e3 * two:.0f} ms | {two / one:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
