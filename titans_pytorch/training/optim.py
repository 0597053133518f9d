"""The optimizer, and a learning rate that is a function of the step.

AdamW, or Muon for the matrices of hidden layers beside AdamW for the rest. Muon (Jordan et al. 2024; scaled as in arXiv
2502.16982, so that one learning rate serves both) orthogonalises the momentum of a matrix.
"""

import math
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.optimizer import Optimizer

from titans_pytorch.training.config import TrainConfig

__all__ = ["AnyOptimizer", "Together", "build_optimizer", "learning_rate", "set_learning_rate"]


class Together:
    """Several optimizers as one."""

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state.get("optimizers", ())) != len(self.optimizers):
            raise ValueError("it is the state of another optimizer")
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)


AnyOptimizer = Optimizer | Together


def build_optimizer(model: nn.Module, config: TrainConfig) -> AnyOptimizer:
    """Build the optimizer. Weight decay acts on linear maps, not on embeddings, gains, biases, tokens and initial fast
    weights."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    embedded = {id(p) for m in embeddings for p in m.parameters()}  # may be tied to the output map
    decayed = {id(p) for m in linear for p in matrices_of(m)} - embedded
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return adamw(trained, decayed, config)
    inner = [m for m in linear if m is not getattr(model, "to_logits", None)]
    hidden = {id(p) for m in inner for p in matrices_of(m) if min(p.shape) > 8}
    matrices = [p for p in trained if id(p) in hidden & decayed]
    rest = adamw([p for p in trained if id(p) not in hidden & decayed], decayed, config)
    if not matrices:
        return rest
    muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon, rest)


def matrices_of(linear: nn.Linear) -> list[nn.Parameter]:
    """Return the weight of a module, or the parameters it is computed from (torch.nn.utils.parametrize)."""
    return [p for p in linear.parameters() if p.ndim == 2]


def adamw(parameters: list[nn.Parameter], decayed: set[int], config: TrainConfig) -> AdamW:
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the update from `step` to `step + 1`: linear warm-up, then cosine decay.

    With two stages of training each has its own."""
    first, last = (0, config.core_steps) if step < config.core_steps else (config.core_steps, config.steps)
    step, steps = step - first, last - first
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    through = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * through))


def set_learning_rate(optimizer: AnyOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
