"""AdamW with decay on linear maps only, and a learning rate that is a function of the step."""

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.optimizer import Optimizer

from titans_pytorch.training.config import TrainConfig

__all__ = ["build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Weights of linear maps decay; embeddings, gains, biases, tokens and initial memories do not."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied to the output map
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the update that takes `step` to `step + 1`: linear warm-up, then half a cosine down to the lowest rate."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    through = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * through))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
