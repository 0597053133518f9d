"""Two stages of training: first the core of a model with its memories switched off, then its memories.

In the first stage nothing is written and the parameters of the memories are frozen. In the second they are trained,
alone or with the rest. With `core_steps` 0 there is one stage, in which everything is trained.
"""

from torch import nn

from titans_pytorch.analysis.storing import memories_of, stop_storing
from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.errors import TrainingError

__all__ = ["Stages"]


class Stages:
    """The parameters of `model` that are trained at a step."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.model, self.config = model, config
        self.all = [p for p in model.parameters() if p.requires_grad]
        memories = memories_of(model).values() if config.core_steps else ()
        of_memories = {id(p) for memory in memories for p in memory.parameters()}
        self.memory = [p for p in self.all if id(p) in of_memories]
        self.core = [p for p in self.all if id(p) not in of_memories]
        self.now: str | None = None
        self.resume_storing = lambda: None
        if config.core_steps and not self.memory:
            raise TrainingError(f"core_steps must be 0 with a model that has no memory, got {config.core_steps}")

    def name_at(self, step: int) -> str:
        if not self.config.core_steps:
            return "all"
        if step < self.config.core_steps:
            return "core"
        return self.config.after_core

    def enter(self, step: int) -> bool:
        """Prepare the model for the stage of this step; return whether another stage ends here."""
        name = self.name_at(step)
        if name == self.now:
            return False
        trained = {"all": self.all, "core": self.core, "memory": self.memory}[name]
        chosen = {id(p) for p in trained}
        for p in self.all:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        self.resume_storing()
        self.resume_storing = stop_storing(self.model) if name == "core" else (lambda: None)
        self.now = name
        return True

    def leave(self) -> None:
        """Restore the model: everything is trained, and memories write."""
        self.resume_storing()
        self.resume_storing, self.now = (lambda: None), None
        for p in self.all:
            p.requires_grad_(True)
