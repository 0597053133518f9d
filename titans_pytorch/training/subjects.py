"""Subject: the protocol of training data and its measurements. `text.py` is one; tasks are others."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_pytorch.training.rows import Rows

__all__ = ["Context", "Subject"]

Context = Callable[[], AbstractContextManager]


class Subject(Protocol):
    """Rows to learn from, and what is measured on others.

    row_len: tokens predicted in a row. unit, counted: what one such token is, and several.
    fingerprint: differs where the rows do, so that a run is not resumed on others.
    """

    row_len: int
    unit: str
    counted: str
    fingerprint: str

    def batch(self, position: int, size: int) -> Tensor | Rows:
        """Rows `position` to `position + size` of an endless sequence."""

    def tokens(self, position: int, rows: int) -> int:
        """Tokens predicted in the rows of the batch at `position`."""

    def measure(self, model: nn.Module, device: torch.device, autocast: Context) -> dict[str, float]:
        """Named metrics of a `model` on held-out rows, now and then while training: always the same rows. device: where
        it computes; autocast: makes the context it computes in.
        """

    def introduce(self) -> str:
        """A line for the reader."""

    def on_step(self, model: nn.Module, step: int, device: torch.device, autocast: Context) -> None:
        """After each `step`. Leaves the random number generators as they were. model, device, autocast: as in
        `measure`.
        """

    def conclude(self, model: nn.Module, out: Path, device: torch.device, autocast: Context) -> dict[str, Any]:
        """The final measurements, printed, and returned for the record of the run. out: its folder; model, device,
        autocast: as in `measure`.
        """

    def levels(self, found: dict[str, Any]) -> dict[str, float]:
        """Lines to draw beside the loss curve, in bits, from what `conclude` found."""
