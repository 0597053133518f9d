"""SymplecticGating at its public import path; the code is in gates/symplectic.py."""

from titans_pytorch.gates.symplectic import SymplecticGating

__all__ = ["SymplecticGating"]
