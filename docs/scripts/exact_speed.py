"""Time and memory of the exact rule beside the paper's, a loop over tokens and full attention: figures of
docs/fast_path.md.

    python docs/scripts/exact_speed.py               # 4,096 tokens, 4 heads of 64, one thread
    python docs/scripts/exact_speed.py --lengths     # where full attention, the exact rule and the deep memory cross

Seconds of CPU time, the least of several turns; the arms take turns. Memory is the most that a training step takes over
idle, each arm in a process of its own.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from harness.resident import Watermark

from titans_pytorch import NeuralMemory
from titans_pytorch.training.options import OneLineParser

DIM, HEADS, HEAD, TOKENS, DECODED = 256, 4, 64, 4096, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


class FullAttention(nn.Module):
    """Causal attention with the same heads, by torch's fused kernel."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=state is None)
        return self.out(out.transpose(1, 2).flatten(2)), (k, v)


def memory(**keywords) -> NeuralMemory:
    return NeuralMemory.paper(DIM, heads=HEADS, dim_head=HEAD, **keywords)


ONE = {"segment": 1, "depth": 1, "max_step": 0.5}
ARMS: dict[str, Callable[[], nn.Module]] = {
    "the paper's rule, two layers": lambda: memory(segment=64),
    "the paper's rule, one matrix": lambda: memory(segment=64, depth=1),
    "exact rule": lambda: NeuralMemory.exact(DIM, heads=HEADS, dim_head=HEAD),
    "exact rule, momentum": lambda: memory(**ONE),
    "the same, a loop over tokens": lambda: memory(**ONE, engine="dual"),
    "full attention": FullAttention,
}


def forward(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def step(module: nn.Module, x: Tensor) -> None:
    module(x)[0].square().mean().backward()
    module.zero_grad()


def seconds(work: Callable[[nn.Module, Tensor], None], module: nn.Module, x: Tensor) -> float:
    began = time.process_time()
    work(module, x)
    return time.process_time() - began


@torch.no_grad()
def decode(module: nn.Module, x: Tensor) -> float:
    """Seconds a token, after all of x."""
    _, state = module(x)
    token = x[:, :1]
    best = float("inf")
    for _ in range(DECODED):
        began = time.process_time()
        _, state = module(token, state=state)
        best = min(best, time.process_time() - began)
        state = state._replace(updates=None) if hasattr(state, "updates") else state
    return best


def peak(name: str, tokens: int, queue) -> None:
    torch.set_num_threads(1)
    module, x = ARMS[name](), torch.randn(1, tokens, DIM)
    step(module, x[:, :128])  # what the first call alone takes
    mark = Watermark("cpu")
    step(module, x)
    queue.put(mark.read()["over_idle"])


def taken(name: str, tokens: int) -> int:
    """Bytes over idle of a training step, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak, args=(name, tokens, queue))
    process.start()
    got = queue.get()
    process.join()
    return got


def measured(names: list[str], tokens: int, turns: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    modules, x = {name: ARMS[name]() for name in names}, torch.randn(1, tokens, DIM)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for _ in range(turns):
        for name, module in modules.items():
            for what, work in (("forward", forward), ("train", step)):
                found[name][what] = min(found[name].get(what, float("inf")), seconds(work, module, x))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--lengths", action="store_true", help="compare lengths instead")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.lengths:
        names = [name for name in ARMS if name != "the same, a loop over tokens"]
        for tokens in LENGTHS:
            for name, found in measured(names, tokens, options.turns).items():
                times = f"forward {1e3 * found['forward']:.1f} ms, train {1e3 * found['train']:.1f} ms"
                print(f"{tokens} tokens: {name}: {times}")
        return 0
    found = measured(list(ARMS), options.tokens, options.turns)
    for name, times in found.items():
        one = decode(ARMS[name](), torch.randn(1, options.tokens, DIM))
        megabytes = taken(name, options.tokens) / 1e6
        print(
            f"{name}: forward {1e3 * times['forward']:.0f} ms, train {1e3 * times['train']:.0f} ms, "
            f"{megabytes:.0f} MB, a token {1e3 * one:.2f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
