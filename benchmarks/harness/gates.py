"""Gates that several runners use, as keywords of NeuralMemory and of its SymplecticGating."""

from typing import Any

# quorum of a gate that needs several complex tokens in a row
QUORUM = {"quorum_mix": 0.55, "quorum_window": 5, "quorum_threshold": 0.25, "quorum_temperature": 0.1}


def symplectic(**gate: Any) -> dict[str, Any]:
    """Return keywords of NeuralMemory for a symplectic gate with these options."""
    return {"use_symplectic_gating": True, **({"symplectic_gate_kwargs": gate} if gate else {})}


def elementwise(mode: str = "soft") -> dict[str, Any]:
    """Return options of a gate whose maps are elementwise."""
    return {"gated": True, "diag": True, "gate_mode": mode}


def phase(dim: int, mix: float) -> dict[str, Any]:
    return {"phase_mix": mix, "phase_pairs": max(1, dim // 8)}


def phase_quorum(dim: int) -> dict[str, Any]:
    """Return the gate that transfer runners compare with: half of the score from phases, a quorum, soft
    elementwise maps.
    """
    return {**elementwise(), **phase(dim, 0.5), **QUORUM}
