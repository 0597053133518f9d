"""Measure what docs/in_your_own_model.md recommends: the model of examples/own_model.py with another memory, another
place for the memory, another learning rate.

python docs/scripts/own_model.py             # all tables, three seeds: 12 minutes of one core
python docs/scripts/own_model.py --table constructors
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from titans_pytorch import NeuralMemory
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.tasks.recall import Recall
from titans_pytorch.training.options import OneLineParser

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
own_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_model)

DIM, SEGMENT, HEADS = 32, 16, 2
STREAM = {"batch_size": 64, "qk_rmsnorm": True, "default_step_transform_max_lr": 0.01, "init_decay_bias": -6.0}


def paper(**changes) -> NeuralMemory:
    return NeuralMemory.paper(DIM, SEGMENT, **{"heads": HEADS, "max_step": 1 / SEGMENT, **changes})


# settings of `arm`; attention in front joins key and value where the memory has no convolution
CONSTRUCTORS = {
    "`NeuralMemory.paper(dim, 16, heads=2, max_step=1 / 16)`": {"build": paper},
    "`NeuralMemory(dim, 8, heads=2)`, attention in front": {
        "build": lambda: NeuralMemory(DIM, 8, heads=HEADS),
        "window": 8,
    },
    "the same with the README's settings for streams": {
        "build": lambda: NeuralMemory(DIM, 8, heads=HEADS, **STREAM),
        "window": 8,
    },
}


class WindowAttention(nn.Module):
    """x + causal attention to the last `window` tokens, 4 heads, behind an RMSNorm."""

    def __init__(self, dim: int, window: int = 8):
        super().__init__()
        self.norm, self.window = nn.RMSNorm(dim), window
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at
        near = (distance >= 0) & (distance < self.window)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return x + self.out(heads.transpose(1, 2).flatten(-2))


class Placed(nn.Module):
    """A memory whose input and output pass through other modules: x -> after(memory(before(x)))."""

    def __init__(self, memory: NeuralMemory, before: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.memory, self.before, self.after = memory, before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor, state=None):
        read, state = self.memory(self.before(x), state=state)
        return self.after(read), state


class Scale(nn.Module):
    """x times a learned scalar that starts at zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class MinusInput(Placed):
    """memory(x) - x: takes the residual connection of the model away."""

    def forward(self, x: Tensor, state=None):
        read, state = super().forward(x, state)
        return read - x, state


PLACES = {
    "`x + memory(x)`": paper,
    "`x + memory(norm(x))`": lambda: Placed(paper(), before=nn.RMSNorm(DIM)),
    "`x + norm(memory(x))`": lambda: Placed(paper(), after=nn.RMSNorm(DIM)),
    "`x + scale * memory(x)`, `scale` starts at 0": lambda: Placed(paper(), after=Scale()),
    "`memory(x)`": lambda: MinusInput(paper()),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def arm(
    build: Callable[[], nn.Module], seed: int, steps: int, lr: float = 1e-2, window: int = 0
) -> tuple[float, float]:
    """Return the accuracy of the example's model with this memory, with writing on and off."""
    torch.manual_seed(seed)
    task = Recall(length=48, queries=8, seed=seed)
    model = own_model.OwnModel(task.vocab_size, DIM)
    model.memory = build()
    if window:
        model.embed = nn.Sequential(model.embed, WindowAttention(DIM, window))
    with redirect_stdout(StringIO()):
        own_model.train(model, task, steps, lr=lr)
    on = task.score(lambda ids: model(ids)[0], batch_size=50).accuracy
    with storing_off(model):
        return on, task.score(lambda ids: model(ids)[0], batch_size=50).accuracy


TABLES: dict[str, dict[str, dict]] = {
    "constructors": CONSTRUCTORS,
    "places": {name: {"build": build} for name, build in PLACES.items()},
    "rates": {f"lr={lr:g}": {"build": paper, "lr": lr} for lr in RATES},
}


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--table", choices=TABLES, action="append", help="one of the tables [all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=350, help="training steps of each arm [350]")
    args = parser.parse_args(argv)
    choose_threads(args.threads, DIM)
    for table in args.table or TABLES:
        print(f"{table}: accuracy with writing on (lowest to highest of {args.seeds} seeds), with writing off")
        for name, settings in tqdm(TABLES[table].items(), disable=None):
            found = [arm(seed=seed, steps=args.steps, **settings) for seed in range(args.seeds)]
            on, off = zip(*found, strict=True)
            line = f"{statistics.mean(on):.3f} ({min(on):.3f} to {max(on):.3f})"
            print(f"| {name} | {line} | {statistics.mean(off):.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
