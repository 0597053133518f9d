"""DynamicModeDecomposition at its public import path; the code is in gates/dmd.py."""

from titans_pytorch.gates.dmd import DynamicModeDecomposition

__all__ = ["DynamicModeDecomposition"]
