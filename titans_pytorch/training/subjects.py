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
    """Rows to train on, and measurements on held-out rows.

    row_len: tokens predicted in a row. unit, counted: the name of such a token, in the singular and the plural.
    fingerprint: identifies the rows, so that a run is not resumed on other data.
    """

    row_len: int
    unit: str
    counted: str
    fingerprint: str

    def batch(self, position: int, size: int) -> Tensor | Rows:
        """Return rows `position` to `position + size` of an endless sequence."""

    def tokens(self, position: int, rows: int) -> int:
        """Return the number of tokens predicted in `rows` rows of the batch at `position`."""

    def measure(self, model: nn.Module, device: torch.device, autocast: Context) -> dict[str, float]:
        """Return named metrics of a `model` on held-out rows, the same rows at every validation. device: device of the
        model; autocast: returns the autocast context of each forward pass.
        """

    def introduce(self) -> str:
        """Return a line that describes the data."""

    def on_step(self, model: nn.Module, step: int, device: torch.device, autocast: Context) -> None:
        """Called after each `step`. Leaves the random number generators as they were. model, device, autocast: as in
        `measure`.
        """

    def conclude(self, model: nn.Module, out: Path, device: torch.device, autocast: Context) -> dict[str, Any]:
        """Print the final measurements, and return them for the record of the run. out: its folder; model, device,
        autocast: as in `measure`.
        """

    def draw(self, out: Path, found: dict[str, Any]) -> list[str]:
        """Draw the pictures of a run in its folder `out`. Returns their names, none without matplotlib.
        found: the result of `conclude`, empty if training was stopped.
        """
