"""benchmark_gate_variants.py: what its statistics say of gates that are known."""

import torch
from benchmark_gate_variants import FollowGated, gate_statistics, variants
from harness.arms import Arm, build
from harness.task import Setting
from tasks.constant_gate import constant_gate_memory

from titans_pytorch import NeuralMemory, gate_trace


def memory(**gate):
    torch.manual_seed(0)
    options = {"use_symplectic_gating": True, "symplectic_gate_kwargs": gate} if gate else {}
    return NeuralMemory(8, 4, **options)


def test_statistics_are_of_the_parts_a_gate_has():
    seq = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    assert gate_statistics(memory(), seq) == {}
    still = gate_statistics(memory(quorum_mix=0.5, quorum_threshold=0.0), torch.ones(2, 12, 8))
    assert still == {"complexity_mean": 0.0, "complexity_max": 0.0, "quorum_mean": 0.5}
    sparse = gate_statistics(memory(gated=True, diag=True, top_k=3), seq)
    assert sparse["sparse_k_mean"] == 3.0
    assert 0 < sparse["complexity_mean"] < sparse["complexity_max"] <= 1
    budget = gate_statistics(memory(quorum_mix=0.5, budget_topk_ratio=0.25, budget_window=4), seq)
    assert 0.2 < budget["quorum_active_frac"] < 0.6


def test_statistics_come_with_a_run_and_leave_it_as_it_was():
    task = FollowGated("spiral", dim=8, length=16, chunk_size=4, batch_size=2)
    arms = [Arm(name, keywords) for name, keywords in variants(8, 2).items()]
    outcomes = {arm.name: task.run(arm, 0, Setting(steps=0, test_batches=1)) for arm in arms}
    assert all(o["notes"]["complexity_max"] > 0 for o in outcomes.values())
    assert outcomes["hard_topk8"]["notes"]["sparse_k_mean"] == 8.0
    assert "codebook_mean" in outcomes["combinatorial_codebook"]["notes"]
    assert outcomes["phase_mix"]["pages"]["opportunities"] == 2 * 4
    assert build(task, arms[-1], 0).num_pages == 4


def test_a_constant_gate_scales_every_decay_alike():
    seq = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    trace = gate_trace(constant_gate_memory(dim=8, chunk_size=4), seq)
    assert torch.allclose(trace.decay_after, trace.decay_before * (1 - 0.5 * 0.25))
    assert gate_statistics(constant_gate_memory(dim=8, chunk_size=4), seq) == {}
