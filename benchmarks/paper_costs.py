"""What each part of the paper's memory costs over the bare rule.

python benchmarks/paper_costs.py                  # a minute on one core
python benchmarks/paper_costs.py --quick          # few tokens: shows that it runs

Per-token rates with gradients at the start of each 64 tokens, 4 heads of 64 at dim 256, on 2 x 1024 tokens: forward
without gradients, and forward and backward. Arms are measured in rounds; the least CPU time of all rounds counts (on
CUDA the least time). "written" is the share of pairs whose inner loss exceeds the threshold.
"""

from __future__ import annotations

import math
import sys

from gate_costs import cost_flags, train_step, write_costs
from harness.later import torch
from harness.tables import table
from harness.timing import cpu_seconds
from tqdm import tqdm

import titans_pytorch
from titans_pytorch.training.options import OneLineParser

SCHEMA = 1
DIM, SEGMENT = 256, 64
RULE = "bare rule"
BARE = {"qkv_conv_kernel": None, "activation": None, "qk_l2norm": False, "output_gate": None}
MEDIAN = {"surprise_threshold": 0.0}  # set to the median of the surprises, which half of the tokens exceed
ARMS = {
    RULE: BARE,
    "SiLU": {**BARE, "activation": "SiLU"},
    "convolution": {**BARE, "qkv_conv_kernel": 4},
    "unit norm": {**BARE, "qk_l2norm": True},
    "normalised, gated output": {**BARE, "output_gate": "silu"},
    "threshold": {**BARE, **MEDIAN},
    "threshold of the prediction": {**BARE, **MEDIAN, "surprise_source": "prediction"},
    "paper": {},
    "paper, threshold": MEDIAN,
}


def build(options: dict, seq: torch.Tensor) -> titans_pytorch.NeuralMemory:
    torch.manual_seed(0)
    if options.get("activation"):
        options = {**options, "activation": getattr(torch.nn, options["activation"])()}
    memory = titans_pytorch.NeuralMemory.paper(DIM, SEGMENT, heads=4, dim_head=64, **options).to(seq.device)
    if memory.surprise_threshold is not None:
        memory.surprise_threshold = 0.0
        with torch.no_grad():
            surprises = memory(seq, return_surprises=True)[2]
        memory.surprise_threshold = surprises[0 if memory.predictor is None else 2].median().item()
    return memory


def measure(repeats: int, tokens: int, device: str = "cpu") -> list[dict]:
    """Measure each arm: least seconds forward and in a training step, their ratios to the bare rule's, and the share of
    pairs that were written."""
    seq = torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    memories = {name: build(options, seq) for name, options in ARMS.items()}
    forward, train = dict.fromkeys(memories, math.inf), dict.fromkeys(memories, math.inf)
    with tqdm(total=(repeats + 1) * len(memories), unit="turn", file=sys.stderr, disable=None) as bar:
        for turn in range(repeats + 1):
            for name, memory in memories.items():
                with torch.no_grad():
                    seconds = cpu_seconds(lambda memory=memory: memory(seq), device)
                steps = cpu_seconds(lambda memory=memory: train_step(memory, seq), device)
                if turn:  # the first call finds cold caches
                    forward[name], train[name] = min(forward[name], seconds), min(train[name], steps)
                bar.update()
    return [
        {
            "arm": name,
            "forward": forward[name],
            "forward_to_rule": forward[name] / forward[RULE],
            "train": train[name],
            "train_to_rule": train[name] / train[RULE],
            "written": written(memory, seq),
        }
        for name, memory in memories.items()
    ]


def written(memory: titans_pytorch.NeuralMemory, seq: torch.Tensor) -> float:
    with torch.no_grad():
        _, _, (_, step, *_) = memory(seq, return_surprises=True)
    return (step > 0).double().mean().item()


def main():
    parser = OneLineParser(description=__doc__)
    cost_flags(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(1 if args.quick else args.repeats, 128 if args.quick else 1024, args.device)
    rows = [
        (r["arm"], *(f"{r[k]:.3f}" if k in ("forward", "train") else f"{r[k]:.2f}" for k in list(r)[1:])) for r in found
    ]
    print(table(("arm", "forward s", "to rule", "train s", "to rule", "written"), rows))
    write_costs(args, SCHEMA, found)


if __name__ == "__main__":
    main()
