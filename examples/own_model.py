"""A memory in a model of your own: embedding, memory, output. It learns to recall values by their keys.

A row gives 8 keys with their values, pauses, and asks for all of them. Only the memory connects tokens, so accuracy is
at chance with writing switched off. docs/in_your_own_model.md explains every choice.

python examples/own_model.py                              # about a minute of one core
python examples/own_model.py --steps 100 --seed 1 --threads 2
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch import NeuralMemory
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.tasks.recall import Recall


class OwnModel(nn.Module):
    """Token ids [b n] -> logits [b n tokens], and the state for the next call."""

    def __init__(self, tokens: int, dim: int = 32, segment: int = 16):
        super().__init__()
        self.embed = nn.Embedding(tokens, dim)
        self.memory = NeuralMemory.paper(dim, segment, heads=2, max_step=1 / segment)
        self.out = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, tokens))

    def forward(self, ids: Tensor, state=None):
        x = self.embed(ids)
        read, state = self.memory(x, state=state)
        return self.out(x + read), state


def train(model: nn.Module, task: Recall, steps: int, rows: int = 32, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        batch = task.batch(step * rows, rows)  # ids, and targets: -100 where nothing is asked
        logits, _ = model(batch.ids)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 0 or (step + 1) % 100 == 0:
            print(f"step {step + 1:>4}: loss {loss.item():.3f}")


def accuracy(model: nn.Module, task: Recall) -> float:
    """On 200 rows that were not trained on."""
    return task.score(lambda ids: model(ids)[0], batch_size=50).accuracy


@torch.no_grad()
def streaming_error(model: nn.Module, ids: Tensor, cut: int, path: Path) -> float:
    """Read up to `cut`, save the state, load it, read on token by token: the largest difference from one call."""
    whole, _ = model(ids)
    first, state = model(ids[:, :cut])
    torch.save(state._replace(updates=None), path)
    state, pieces = torch.load(path, weights_only=True), [first]
    for token in ids[:, cut:].split(1, dim=1):
        logits, state = model(token, state)
        pieces.append(logits)
    return (torch.cat(pieces, dim=1) - whole).abs().max().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps [500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more gain nothing at this size [1]")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    task = Recall(length=48, queries=8, seed=options.seed)
    model = OwnModel(task.vocab_size)
    train(model, task, options.steps)
    on = accuracy(model, task)
    with storing_off(model):
        off = accuracy(model, task)
    print(f"accuracy: {on:.1%} with writing on, {off:.1%} with writing off, chance {task.chance:.1%}")

    with tempfile.TemporaryDirectory() as folder:
        error = streaming_error(model, task.batch(0, 4, held_out=True).ids, 20, Path(folder) / "state.pt")
    print(f"token by token from a saved state, logits differ by {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
