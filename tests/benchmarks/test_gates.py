"""gate_costs.py and gate_thresholds.py: what they measure, in little."""

import gate_costs as costs
import gate_thresholds as thresholds
import pytest

from titans_pytorch import NeuralMemory


def test_costs_are_told_beside_a_plain_memory_with_as_many_heads():
    arms = {name: costs.ARMS[name] for name in (costs.PLAIN, "gate, 4 pages, a switch in a chunk")}
    plain, paged = costs.measure(arms, repeats=1, spectral=False, tokens=8)
    assert plain["to_plain"] == 1
    assert plain["switches"] == 0
    assert paged["switches"] > 0
    assert paged["to_plain"] == paged["seconds"] / plain["seconds"] > 0


@pytest.mark.parametrize("arm", costs.ARMS)
def test_every_arm_is_a_memory_with_as_many_heads(arm):
    assert NeuralMemory(8, 4, dim_head=2, **{"heads": costs.HEADS, **small(costs.ARMS[arm])}).internal_heads == 16


def small(options):
    """For 8 features."""
    kwargs = options.get("symplectic_gate_kwargs")
    return options | ({"symplectic_gate_kwargs": kwargs | {"top_k": 4}} if kwargs and "top_k" in kwargs else {})


def test_thresholds():
    found = thresholds.measure([0], (0.0, 2.0))
    switches = {(r["gate"], r["sequence"], r["threshold"]): r["switches"] for r in found}
    for gate in thresholds.GATES:
        for sequence in thresholds.SEQUENCES:
            assert switches[gate, sequence, 0.0] == thresholds.WINDOWS, "each may switch, and does"
            assert switches[gate, sequence, 2.0] == 0
            assert abs(switches[gate, sequence, thresholds.CALIBRATED] - 3) < 0.25
    assert "for 3" in thresholds.report(found).splitlines()[0]
