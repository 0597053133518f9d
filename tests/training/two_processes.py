"""Trains a tiny model on a task and on text, in as many processes as the launcher says: `two_processes.py OUT`.

Every row asks for another number of answers, so that processes have unequal shares of them.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.tasks.registry import build_task
from titans_pytorch.tasks.subject import TaskSubject
from titans_pytorch.training.config import TaskConfig, TrainConfig
from titans_pytorch.training.data import ByteData
from titans_pytorch.training.loop import Trainer
from titans_pytorch.training.metrics import read_metrics
from titans_pytorch.training.processes import processes_here
from titans_pytorch.training.text import Text

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.embed, self.out = nn.Embedding(tokens, 8), nn.Linear(8, tokens)
        self.memory = NeuralMemory(8, 2, batch_size=4, model=MemoryMLP(8, 1), default_step_transform_max_lr=0.1)

    def forward(self, ids, return_loss=False):
        if return_loss:
            return nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        x = self.embed(ids)
        return self.out(x + self.memory(x)[0])


def patterns(config: TrainConfig) -> TaskSubject:
    """Rows of 12 tokens at first, then of 20."""
    task = build_task("patterns", {"length": 20, "shortest_period": 3, "longest_period": 9})
    return TaskSubject(task, config, TaskConfig("patterns", first_len=12))


def losses(out: Path) -> dict[str, list[float]]:
    drawn = torch.randint(97, 105, (1000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = {}
    for name in ("task", "text", "two stages"):
        settings = {"steps": 4, "batch_size": 4, "grad_accum": 2, "seq_len": 12, "lr": 1e-2, "warmup_steps": 0}
        settings |= {"validate_every": 0, "checkpoint_every": 0, "core_steps": 2 if name == "two stages" else 0}
        config = TrainConfig(**settings)
        text = Text(ByteData("drawn", None, "", 1000, drawn, drawn), config)
        torch.manual_seed(0)
        model = Model(256).double()
        processes = processes_here(CPU)
        subject = patterns(config) if name == "task" else text
        Trainer(model, subject, config, out / name, device=CPU, processes=processes).fit()
        found[name] = [[r["loss"], r["grad_norm"]] for r in read_metrics(out / name / "metrics.jsonl")]
        found[f"{name}: weights"] = [float(p.detach().square().sum()) for p in model.parameters()]
        processes.wait()
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    result = losses(target)
    if processes_here(CPU).main:
        (target / "losses.json").write_text(json.dumps(result))
