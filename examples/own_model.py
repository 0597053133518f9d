"""A memory in a model of your own: embedding, memory, output. It learns to recall values by their keys.

A row gives 8 keys with their values, pauses, and asks for all of them. Only the memory connects tokens, so accuracy is
at chance with writing switched off. docs/in_your_own_model.md explains every choice.

python examples/own_model.py        # about a minute of one core
"""

import sys
import tempfile

from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

parser = OneLineParser(description=__doc__, threads=True)
parser.add_argument("--steps", type=int, default=500, help="training steps [500]")
parser.add_argument("--seed", type=int, default=0)
if __name__ == "__main__":
    parser.parse_args()  # answers --help before torch is imported, which takes a second

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


def train(model: nn.Module, task: Recall, steps: int, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        batch = task.batch(step * 32, 32)  # 32 new rows; targets are -100 where nothing is asked
        loss = F.cross_entropy(model(batch.ids)[0].flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:>4}: loss {loss.item():.3f}")


def main(argv: list[str] | None = None) -> int:
    options = parser.parse_args(argv)
    choose_threads(options.threads, width=32)
    torch.manual_seed(options.seed)
    task = Recall(length=48, queries=8, seed=options.seed)
    model = OwnModel(task.vocab_size)
    train(model, task, options.steps)

    on = task.score(lambda ids: model(ids)[0]).accuracy  # of 200 rows that were not trained on
    with storing_off(model):
        off = task.score(lambda ids: model(ids)[0]).accuracy
    print(f"accuracy: {on:.1%} with writing on, {off:.1%} with writing off, chance {task.chance:.1%}")

    ids = task.batch(0, 4, held_out=True).ids
    with torch.no_grad(), tempfile.TemporaryFile() as file:
        _, state = model(ids[:, :20])
        torch.save(state._replace(updates=None), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for token in ids[:, 20:].split(1, dim=1):
            last, state = model(token, state)
        difference = (last - model(ids)[0][:, -1:]).abs().max()
    print(f"token by token from a saved state, the last logits differ by {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
