"""Gates and kinetics in the memory: what they are given, and what becomes of decay and step."""

import pytest
import torch
from torch import nn

from titans_pytorch import NeuralMemory
from titans_pytorch.gates.decay import between_0_and_1, circular_mean
from titans_pytorch.gates.dmd import naive_dmd_error
from titans_pytorch.gates.kinetics import kinetics

from .gates import DIM, float64, rates, told, told_memory
from .helpers import assert_close, randomise

# the decay


def test_complexity_takes_its_share_of_the_decay():
    memory = told_memory(pages=1)
    seq = told([0.25, 0.0, 1.0, 0.5])
    before, gated = rates(memory, seq)
    scale = memory.symplectic_complexity_scale.item()
    factor = 1 - scale * float64([0.25, 0.0, 1.0, 0.5])
    assert 0 < scale < 1
    assert_close(1 - gated.rates.retention, (1 - before.retention) * factor, 1e-12)
    assert torch.equal(gated.rates.learning_rate, before.learning_rate)
    assert NeuralMemory(DIM, use_symplectic_gating=True).symplectic_complexity_scale.item() == 0.5


@pytest.mark.parametrize(("scale", "effect"), [(-3.0, 0.0), (2.0, 1.0)])
def test_the_scale_acts_within_0_and_1(scale, effect):
    memory = told_memory(pages=1)
    with torch.no_grad():
        memory.symplectic_complexity_scale.fill_(scale)
    before, gated = rates(memory, told([0.25, 1.0]))
    assert_close(1 - gated.rates.retention, (1 - before.retention) * (1 - effect * float64([0.25, 1.0])), 1e-12)


def test_a_gate_may_say_more_than_1_or_less_than_0():
    class Loud(nn.Module):
        def forward(self, tokens):
            return tokens[..., :1]

    memory = told_memory(pages=1)
    memory.symplectic_gate = Loud()
    before, gated = rates(memory, told([0.5, 9.0, -9.0]))
    scale = memory.symplectic_complexity_scale.item()
    assert_close(1 - gated.rates.retention, (1 - before.retention) * (1 - float64([scale / 2, 1.0, 0.0])), 1e-12)


def test_a_scale_outside_finds_its_way_back():
    """Its gradient is a sum over the calls, wherever it stands: no part of it is masked."""
    x = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    clamped = between_0_and_1(x)
    assert clamped.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    (clamped * slope).sum().backward()
    assert x.grad.equal(slope)


def test_the_score_of_a_chunk_is_its_largest_and_counts_the_token_before():
    """SymplecticGating on the whole sequence, chunk by chunk."""
    memory = randomise(NeuralMemory(DIM, 3, use_symplectic_gating=True).double(), 2, 0.2)
    seq = torch.randn(2, 12, DIM, dtype=torch.float64)
    _, gated = rates(memory, seq)
    wanted = memory.symplectic_gate(memory.projections.store_norm(seq)).squeeze(-1).unflatten(1, (-1, 3))
    assert_close(gated.score.tokens, wanted, 1e-12)
    assert_close(gated.score.chunk, wanted.amax(dim=-1), 1e-12)


@pytest.mark.parametrize("window", [None, 4, 5])
def test_dmd_looks_back_over_a_window_that_ends_with_the_chunk(window):
    memory = randomise(NeuralMemory(DIM, 4, use_dmd_gating=True, dmd_window=window).double(), 2, 0.2)
    seq = torch.randn(2, 24, DIM, dtype=torch.float64)
    before, gated = rates(memory, seq)
    tokens = memory.projections.store_norm(seq)
    wanted = torch.stack(
        [
            torch.stack([naive_dmd_error(row[max(0, end - (window or 16)) : end]) for end in range(4, 25, 4)])
            for row in tokens
        ]
    ).tanh()
    assert_close(gated.score.chunk, wanted, 1e-9)
    factor = 1 - memory.dmd_complexity_scale * wanted
    assert_close(1 - gated.rates.retention, (1 - before.retention) * factor, 1e-9)


def test_both_gates_share_score_and_scale():
    memory = NeuralMemory(
        DIM, 4, use_symplectic_gating=True, use_dmd_gating=True, combine_symplectic_and_dmd=True
    ).double()
    with torch.no_grad():
        memory.symplectic_complexity_scale.fill_(0.2)
        memory.dmd_complexity_scale.fill_(0.8)
    seq = torch.randn(1, 24, DIM, dtype=torch.float64)
    before, gated = rates(memory, seq)
    tokens = memory.projections.store_norm(seq)
    twist = memory.symplectic_gate(tokens).squeeze(-1).unflatten(1, (-1, 4)).amax(dim=-1)
    error = torch.stack([naive_dmd_error(tokens[0, max(0, end - 16) : end]) for end in range(4, 25, 4)]).tanh()
    assert_close(1 - gated.rates.retention, (1 - before.retention) * (1 - 0.5 * (twist + error) / 2), 1e-9)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"use_symplectic_gating": True}, 0.5),
        ({"use_dmd_gating": True}, 0.4),
        ({"use_symplectic_gating": True, "symplectic_page_threshold": 0.1}, 0.1),
        ({"symplectic_page_threshold": 0.5}, 0.5),
    ],
)
def test_thresholds_by_default(options, threshold):
    assert NeuralMemory(DIM, **options).symplectic_page_threshold == threshold


# what the gate is given


def test_the_gate_sees_complete_chunks_behind_the_token_before():
    memory = told_memory(chunk=3, pages=1)
    seq = torch.randn(2, 14, DIM, dtype=torch.float64)
    state, at = None, 0
    for length in (2, 5, 1, 6):
        _, state = memory(seq[:, at : at + length], state=state)
        at += length
    seen = memory.symplectic_gate.seen
    assert [x.shape[1] for x in seen] == [6, 7]  # no call for tokens that wait; then one token before
    assert torch.equal(seen[0], seq[:, :6])
    assert torch.equal(seen[1], seq[:, 5:12])
    assert torch.equal(state.gate_tokens, seq[:, 11:12])


@pytest.mark.parametrize("phase", [False, True])
def test_the_gate_is_called_once_for_each_batch_window_of_a_call(phase):
    """Windows lie in the sequence, not in the call; one that looks at all it is given does not see beyond its own."""
    options = {"pages": 2, "manifold_state_keyed_paging": True} if phase else {"pages": 1}
    memory = told_memory(chunk=2, batch_size=4, phase=phase, **options)
    gate, seq = memory.symplectic_gate, torch.randn(2, 15, DIM, dtype=torch.float64)

    def parts(*edges):
        got, gate.seen = gate.seen, []
        return len(got) == len(edges) and all(torch.equal(x, seq[:, a:b]) for x, (a, b) in zip(got, edges, strict=True))

    _, state = memory(seq[:, :3])
    assert parts((0, 2))
    _, gated = rates(memory, seq[:, 2:14], state, first=1)
    assert parts((1, 4), (3, 8), (7, 12), (11, 14))
    assert torch.equal(gated.score.tokens, seq[:, 2:14, 0].clamp(0, 1).unflatten(1, (-1, 2)))
    if phase:
        assert_close(gated.score.angle, circular_mean(seq[:, 2:14, 1].unflatten(1, (-1, 2))), 1e-12)
    _, state = memory(seq[:, 3:], state=state)
    assert parts((1, 4), (3, 8), (7, 12), (11, 14))
    memory(seq, ttt_batch_size=8)
    assert parts((0, 8), (7, 14))
    gate.context = 5
    memory(seq)
    assert parts((0, 4), (0, 8), (3, 12), (7, 14))
    gate.causal = True  # more tokens change none of its scores
    memory(seq)
    assert parts((0, 14))


def test_one_call_or_one_for_each_window_is_the_same_to_a_causal_gate():
    for kwargs in ({}, {"phase_mix": 0.5, "quorum_mix": 0.5, "budget_topk_ratio": 0.5, "budget_window": 4}):
        memory = NeuralMemory(DIM, 2, batch_size=4, use_symplectic_gating=True, symplectic_gate_kwargs=kwargs)
        memory, seq = randomise(memory.double(), 1, 0.2), torch.randn(2, 15, DIM, dtype=torch.float64)
        assert memory.symplectic_gate.causal
        once, calls = memory(seq)[0], []
        gate = memory.symplectic_gate
        gate.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].shape[1]))
        gate.__class__ = type("Cautious", (type(gate),), {"causal": False})
        assert_close(memory(seq)[0], once, 1e-12)
        assert calls == [4, *(4 + min(start, gate.context) for start in (4, 8)), 2 + min(12, gate.context)]


def test_a_gate_is_given_as_many_tokens_as_it_says():
    memory = told_memory(chunk=2, pages=1)
    memory.symplectic_gate.context = 5
    seq = torch.randn(1, 12, DIM, dtype=torch.float64)
    state = None
    for part in seq.split(2, dim=1):
        _, state = memory(part, state=state)
    assert [x.shape[1] for x in memory.symplectic_gate.seen] == [2, 4, 6, 7, 7, 7]
    memory.symplectic_gate.context = 0  # one that needs none may take its place at any time
    memory(seq[:, :2], state=state)
    assert memory.symplectic_gate.seen[-1].shape[1] == 2


def test_keyed_paging_asks_for_the_manifold_state_only_with_pages():
    class Plain(nn.Module):
        def forward(self, tokens):
            return tokens[..., :1].sigmoid()

    memory = NeuralMemory(DIM, use_symplectic_gating=True, manifold_state_keyed_paging=True)
    memory.symplectic_gate = Plain()
    memory(torch.randn(1, 4, DIM))
    memory = NeuralMemory(DIM, use_symplectic_gating=True, manifold_state_keyed_paging=True, num_pages=2)
    memory.symplectic_gate = Plain()
    with pytest.raises(TypeError, match="return_manifold_state"):
        memory(torch.randn(1, 4, DIM))


def test_a_budget_looks_back_over_a_window():
    def window(chunk, **kwargs):
        kwargs = {"quorum_mix": 0.5, "budget_topk_ratio": 0.2, **kwargs}
        return NeuralMemory(DIM, chunk, use_symplectic_gating=True, symplectic_gate_kwargs=kwargs).symplectic_gate

    assert window(4).budget_window == 64
    assert window(80).budget_window == 80
    assert window(4, budget_window=10).budget_window == 10


# kinetics


def test_kinetics_are_what_they_are_said_to_be():
    keep, step = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, 4, 3, dtype=torch.float64) * 0.3
    got_keep, got_step = kinetics(keep, step, 0.7, 1e-6, 0.3)
    for i in range(5):
        for j in range(4):
            lr, decay = step[i, j].mean(), 1 - keep[i, j]
            r = lr / (lr + decay + 1e-6)
            torch.testing.assert_close(1 - got_keep[i, j], decay * (1 - 0.7 * r))
            torch.testing.assert_close(got_step[i, j], step[i, j] + 0.7 * (0.3 - step[i, j]) * r)


def test_kinetics_stay_within_bounds():
    """Steps of a user's own may be negative, or above the largest."""
    keep, step = torch.full((2, 1), 0.5), torch.tensor([[[-2.0, 4.0]], [[-0.4, -0.2]]])
    keep, step = kinetics(keep, step, 1.0, 1e-6, 0.1)
    assert keep[1].item() == 0  # the decay would be 1.25
    assert 0 <= keep[0].item() <= 1
    assert (step >= 0).all()


@pytest.mark.parametrize("gate", [{}, {"use_symplectic_gating": True}])
def test_kinetics_at_mix_0_change_nothing(gate):
    def build(**kinetics):
        torch.manual_seed(0)
        return NeuralMemory(DIM, 2, adaptive_step_transform=torch.tanh, **gate, **kinetics)

    seq = torch.randn(2, 9, DIM)
    plain, _ = build()(seq)
    assert torch.equal(build(kinetics_coupling=True, kinetics_mix=0.0)(seq)[0], plain)
    assert torch.equal(build(kinetics_coupling=False, kinetics_mix=0.5)(seq)[0], plain)
    assert not torch.equal(build(kinetics_coupling=True, kinetics_mix=0.5)(seq)[0], plain)


def test_kinetics_come_after_the_gate_and_before_mask_and_pages():
    options = {"kinetics_coupling": True, "kinetics_mix": 0.6, "default_step_transform_max_lr": 0.2}
    memory = told_memory(pages=2, symplectic_page_threshold=0.9, **options)
    seq = told([0.25, 0.5, 1.0, 0.5])
    before, gated = rates(memory, seq)
    scale = memory.symplectic_complexity_scale.item()
    decay = (1 - before.retention) * (1 - scale * float64([0.25, 0.5, 1.0, 0.5]))
    keep, step = kinetics(1 - decay, before.learning_rate, 0.6, 1e-6, 0.2)
    active = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert_close(gated.rates.retention, keep, 1e-12)
    assert torch.equal(gated.rates.active, active)
    assert_close(gated.rates.learning_rate, step * active.unsqueeze(-1), 1e-12)

    mask = torch.tensor([[True, False] * 4])
    _, _, (_, masked) = memory(seq, store_mask=mask, return_surprises=True)
    assert_close(masked, (step * active.unsqueeze(-1)).flatten(1).unsqueeze(0) * mask, 1e-12)
