"""Which settings of a memory diverge: the figures of docs/stability.md.

python docs/scripts/stability.py                # 4 minutes of one core
python docs/scripts/stability.py --quick        # short streams: shows that it runs

edge: the largest 2 C theta |k|^2 / d at which a memory that reads one repeated token converges.
streams: the norm of the fast weights after a long stream (noise; a repeated phrase of 32 tokens; one token),
as a multiple of the initial norm, the worst of all; chunks and mini-batches of 16 tokens.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the tables of the experiments

from harness.tables import table

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

LIMIT = 1e4  # times the initial norm: the memory has diverged


class Constant:
    """A learning rate that is the same for every token."""

    def __init__(self, step: float):
        self.step = step

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, self.step)


def logit(share: float) -> float:
    return math.log(share / (1 - share)) if share > 0 else -100.0


# edge


def simple(chunk: int, per_token: bool, depth: int, wrapped: bool, eta: float, alpha: float, step: float):
    """Build a memory with tokens as keys, rotated tokens as values, and constant rates."""
    dim = 16
    memory = NeuralMemory(
        dim,
        1 if per_token else chunk,
        batch_size=chunk,
        model=MemoryMLP(dim, depth),
        pre_rmsnorm=False,
        mem_model_norm_add_residual=wrapped,
        adaptive_step_transform=Constant(step),
        momentum=eta > 0,
        init_momentum_bias=logit(eta),
        init_decay_bias=logit(alpha),
    ).double()
    nn.init.eye_(memory.projections.to_keys.weight)
    nn.init.orthogonal_(memory.projections.to_values.weight)
    return memory


@torch.no_grad()
def settles(tokens: int, seed: int, **setting) -> bool:
    """Return whether the loss of one repeated token falls below half of its first value and stays there."""
    torch.manual_seed(seed)
    memory = simple(**setting)
    token = torch.randn(1, 1, memory.dim, dtype=torch.float64)
    token = token / token.square().mean().sqrt()  # |k|^2 = d
    seq = token.expand(-1, tokens, -1)
    _, _, (loss, _) = memory(seq, return_surprises=True)
    return bool(loss.isfinite().all() and loss[..., tokens // 2 :].max() <= loss[..., 0].max() / 2)


def edge(chunk: int, tokens: int, **setting) -> float:
    """Return the largest 2 C theta at which both of two memories converge."""
    low, high = 0.0, 64.0
    while high - low > 0.02 * high and high > 0.05:
        middle = (low + high) / 2
        step = middle / (2 * chunk)
        kept = all(settles(tokens, seed, chunk=chunk, step=step, **setting) for seed in (0, 1))
        low, high = (middle, high) if kept else (low, middle)
    return (low + high) / 2


def edges(chunks: int) -> list[tuple]:
    rows = []
    bare = {"depth": 1, "wrapped": False, "alpha": 0.0}
    settings = [
        ("linear memory, no momentum", {**bare, "eta": 0.0}),
        ("linear, momentum 0.5", {**bare, "eta": 0.5}),
        ("linear, momentum 0.9", {**bare, "eta": 0.9}),
        ("linear, decay 0.1", {**bare, "eta": 0.0, "alpha": 0.1}),
        ("two layers, no momentum", {**bare, "depth": 2, "eta": 0.0}),
        ("two layers, wrapped, no momentum", {**bare, "depth": 2, "wrapped": True, "eta": 0.0}),
    ]
    for name, setting in tqdm(settings, desc="edge", disable=None):
        found = [edge(16, 16 * chunks, per_token=per_token, **setting) for per_token in (False, True)]
        rows.append((name, *(f"{x:.2f}" for x in found)))
    return rows


# streams

DIM, CHUNK = 64, 16
WRAPPED = "LayerNorm and residual"
BASES = {
    f"{WRAPPED}, fast decay": {},  # the default: each rate about a half at first
    f"{WRAPPED}, slow decay": {"init_decay_bias": -6.0},  # 0.0025
    "bare, slow decay": {"init_decay_bias": -6.0, "mem_model_norm_add_residual": False},
}
OPTIONS = {
    "nothing": {},
    "anchor never moves": {"batch_size": None},
    "qk_rmsnorm": {"qk_rmsnorm": True},
    "largest step 0.03": {"default_step_transform_max_lr": 0.03},
    "largest step 0.03, qk_rmsnorm": {"default_step_transform_max_lr": 0.03, "qk_rmsnorm": True},
    "max_grad_norm 1": {"max_grad_norm": 1.0},
    "spectral_norm_surprises": {"spectral_norm_surprises": True},
    "surprise_threshold 0.1": {"surprise_threshold": 0.1},
    "gated_transition": {"gated_transition": True},
}


def streams(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1000 + seed)
    phrase = torch.randn(1, 32, DIM, generator=rng)
    return {
        "noise": torch.randn(1, tokens, DIM, generator=rng),
        "phrase": phrase.repeat(1, tokens // 32, 1),
        "one token": phrase[:, :1].expand(-1, tokens, -1),
    }


@torch.no_grad()
def growth(memory: NeuralMemory, seq: torch.Tensor, piece: int = 512) -> tuple[float, int]:
    """Return (norm of the fast weights as a multiple of its initial value, tokens read). Stops once it has diverged."""
    start = math.sqrt(sum(w.square().sum().item() for w in memory.init_weights(1).values()))
    state, ratio = None, 1.0
    for at in range(0, seq.shape[1], piece):
        _, state = memory(seq[:, at : at + piece], state=state)
        ratio = math.sqrt(sum(w.double().square().sum().item() for w in state.states[0].values())) / start
        if not ratio < LIMIT:
            return ratio, at + piece
    return ratio, seq.shape[1]


def growths(tokens: int, seeds: int) -> list[tuple]:
    rows = []
    for option, changes in tqdm(OPTIONS.items(), desc="streams", disable=None):
        cells = []
        for base in BASES.values():
            keywords = {"batch_size": CHUNK, **base, **changes}
            cells.append(cell(lambda keywords=keywords: NeuralMemory(DIM, CHUNK, **keywords), tokens, seeds))
        rows.append((option, *cells))
    paper = cell(lambda: NeuralMemory.paper(DIM, 64), tokens, seeds)
    return [*rows, ("NeuralMemory.paper", "", "", paper)]


def cell(build, tokens: int, seeds: int) -> str:
    """Return the largest factor of all seeds and streams, or the token by which the first diverged, and its stream."""
    found = []
    for seed in range(seeds):
        for kind, seq in streams(tokens, seed).items():
            torch.manual_seed(seed)
            found.append((*growth(build(), seq), kind))
    lost = [(read, kind) for ratio, read, kind in found if not ratio < LIMIT]
    if lost:
        return f"lost by {min(lost)[0]:,} ({', '.join(sorted({kind for _, kind in lost}))})"
    return f"{max(ratio for ratio, _, _ in found):.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="length of a stream [16384]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short streams, one seed")
    args = parser.parse_args(argv)
    choose_threads(args.threads, DIM)
    print(table(("edge of 2 C theta", "a rate per chunk", "a rate per token"), edges(20 if args.quick else 200)))
    tokens, seeds = (1024, 1) if args.quick else (args.tokens, args.seeds)
    print(table((f"weights after {tokens:,} tokens", *BASES), growths(tokens, seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
