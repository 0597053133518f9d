"""One process, or several that train one model together through Accelerate (`torchrun`, `accelerate launch`).

Every process computes its share of each global batch; gradients are averaged. The main process alone writes files,
measures and samples.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import missing
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.start import processes_of

__all__ = ["Alone", "Together", "first_process", "processes_here"]


class Alone:
    """The only process."""

    rank, count, main = 0, 1, True
    device: torch.device | None = None  # the launcher's choice, if it made one

    def share(self, size: int) -> tuple[int, int]:
        """Return (first row, rows): the part of a global batch of `size` rows that this process computes."""
        return 0, size

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call while training."""
        return model

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Return a context in which gradients accumulate without being averaged over processes."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes."""
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def wait(self) -> None:
        """Wait until every process has called this."""


class Together(Alone):
    """One of several processes."""

    def __init__(self, device: torch.device):
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise missing("training in several processes", "accelerate", "train") from error
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device

    def share(self, size: int) -> tuple[int, int]:
        if size % self.count:
            raise TrainingError(f"batch_size must be a multiple of the {self.count} processes, got {size}")
        return self.rank * (size // self.count), size // self.count

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.prepare_model(model)

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        return self.accelerator.no_sync(model)

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")

    def any(self, flag: bool) -> bool:
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def first_process() -> bool:
    """Return whether this is the only process or the first of several (RANK in the environment)."""
    return os.environ.get("RANK", "0") == "0"


def processes_here(device: torch.device) -> Alone:
    """Return the process group that the launcher set up (WORLD_SIZE in the environment)."""
    return Together(device) if processes_of(os.environ) > 1 else Alone()
