"""torch, imported at its first use, so that --help of a runner needs no torch.

from harness.later import torch

Files that use it begin with `from __future__ import annotations`, and define no subclass of torch.nn.Module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class Later:
        """A module that is imported when one of its names is first read."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._name), name)

    torch = Later("torch")

__all__ = ["torch"]
