"""Errors of the exact rule in float32 and bfloat16, beside float64: the figures of docs/fast_path.md.

python docs/scripts/exact_precision.py
"""

import copy
import sys

import torch
from torch import Tensor

from titans_pytorch import NeuralMemory
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

TOKENS, DIM = 4096, 64


def streams() -> dict[str, Tensor]:
    """Return noise, slow waves, one token with a little noise, and a repeated phrase of 61 letters: [1 n d]."""
    noise = torch.randn(1, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time, letters = torch.arange(TOKENS, dtype=torch.float64)[:, None] / 40, torch.arange(TOKENS) % 61
    waves = torch.sin(time * torch.arange(1, DIM + 1) / 8 + torch.arange(DIM))[None] + 0.1 * noise
    return {"noise": noise, "slow waves": waves, "one token": noise[:, :1] + 0.01 * noise, "text": noise[:, letters]}


def run(memory: NeuralMemory, seq: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Return the reads, the last fast weights, and the gradients of the mean square of the reads."""
    memory.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, state = memory(seq)
    out.double().square().mean().backward()
    grads = torch.cat([p.grad.double().flatten() for p in memory.parameters()])
    return {"reads": out.detach(), "fast weights": state.states[0]["weights.0"].detach(), "gradients": grads}


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of `wanted`."""
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def main(argv: list[str] | None = None) -> int:
    """Print the largest error over the streams."""
    choose_threads(OneLineParser(description=__doc__, threads=True).parse_args(argv).threads, DIM)
    for momentum in (False, True):
        found: dict[tuple[str, str], float] = {}
        for seq in streams().values():
            torch.manual_seed(0)
            memory = NeuralMemory.exact(DIM, momentum=momentum, output_gate=None).double()
            wanted, single = run(memory, seq), copy.deepcopy(memory).float()
            got = {
                "float32": run(single, seq.float()),
                "autocast": run(single, seq.float(), autocast=True),
                "bfloat16": run(copy.deepcopy(memory).bfloat16(), seq.bfloat16()),
            }
            for kind, results in got.items():
                for what, value in results.items():
                    found[kind, what] = max(found.get((kind, what), 0.0), error(value, wanted[what]))
        for (kind, what), largest in found.items():
            print(f"momentum {momentum}: {what} in {kind}: {largest:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
