"""Settings of gates and pages as genes: benchmark_mutation_selection searches, benchmark_mutation_transfer tests."""

import random
from collections.abc import Mapping
from typing import Any

from harness.arms import Arm
from harness.gates import elementwise, phase, symplectic

GENES: dict[str, tuple[Any, ...]] = {
    "phase_mix": (0.0, 0.25, 0.5, 0.75),
    "quorum_mix": (0.0, 0.35, 0.55, 0.75),
    "budget_topk_ratio": (None, 0.15, 0.2, 0.25, 0.3),
    "hierarchical": (False, True),
    "hierarchy_mix": (0.5, 0.75, 1.0),
    "quorum_window": (3, 5, 7),
    "quorum_threshold": (0.2, 0.25, 0.3),
    "quorum_temperature": (0.08, 0.1, 0.15),
}
BY_HAND = {
    "phase_mix": 0.5,
    "quorum_mix": 0.75,
    "budget_topk_ratio": 0.2,
    "hierarchical": True,
    "hierarchy_mix": 1.0,
    "quorum_window": 5,
    "quorum_threshold": 0.25,
    "quorum_temperature": 0.1,
}
Candidate = Mapping[str, Any]


def drawn(source: random.Random) -> Candidate:
    return {gene: source.choice(values) for gene, values in GENES.items()}


def mutated(candidate: Candidate, probability: float, source: random.Random) -> Candidate:
    """Draw each gene again with this probability; it may get the same value."""
    return {
        gene: source.choice(GENES[gene]) if source.random() < probability else value
        for gene, value in candidate.items()
    }


def arm_of(candidate: Candidate, name: str, dim: int, pages: int, hier_pages: int, rate: float, about: str = "") -> Arm:
    """Make the arm of a set of genes. Genes without effect are left out, so that equal memories are equal arms."""
    gate, memory = dict(elementwise()), {"num_pages": pages}
    if candidate["phase_mix"] > 0:
        gate |= phase(dim, candidate["phase_mix"])
    if candidate["quorum_mix"] > 0:
        gate |= {k: candidate[k] for k in ("quorum_mix", "quorum_window", "quorum_threshold", "quorum_temperature")}
        if candidate["budget_topk_ratio"] is not None:
            gate["budget_topk_ratio"] = candidate["budget_topk_ratio"]
    if candidate["hierarchical"]:
        memory = hierarchy(hier_pages, candidate["hierarchy_mix"])
    return Arm(name, {**symplectic(**gate), **memory}, about, switch_rate=rate)


def hierarchy(pages: int, mix: float = 1.0) -> dict[str, Any]:
    """Split pages into two coarse ones with equally many fine ones."""
    pages = max(2, pages + pages % 2)
    return {"num_pages": pages, "hierarchical_paging": True, "coarse_pages": 2, "hierarchy_mix": mix}
