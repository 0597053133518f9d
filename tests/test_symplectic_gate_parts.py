"""The parts of SymplecticGating: gate, top-k, trailing means, quorum and budget, norms and angles."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_pytorch.gates.naive import naive_adaptive_k, naive_top_k
from titans_pytorch.gates.quorum import trailing_budget, trailing_mean
from titans_pytorch.gates.scores import phase_step, polar, safe_norm, unit_norm
from titans_pytorch.gates.selection import top_k_mask
from titans_pytorch.gates.symplectic import SymplecticGating

from .symplectic_gates import build, tokens


def test_hard_gate_takes_the_gradient_of_the_sigmoid():
    """With a twist that is linear in the gate's value, hard and soft gates differ in value and share the slope."""
    hard, soft = (SymplecticGating(3, gated=True, diag=True, gate_mode=mode).double() for mode in ("hard", "soft"))
    x = torch.tensor([[[0.5, -0.3, 2.0]]], dtype=torch.float64)
    grads = []
    for gate in (hard, soft):
        with torch.no_grad():
            gate.mag_weight.zero_()
            gate.mag_bias.fill_(1.0)
        value, _ = gate._gate(x)
        grads.append(torch.autograd.grad(value.sum(), gate.gate_weight)[0])
        want = x.sigmoid() if gate is soft else (x > 0).double()
        assert torch.equal(value, want)
    assert torch.equal(*grads)
    assert (grads[0] != 0).all()
    high = SymplecticGating(3, gated=True, diag=True, gate_threshold=1.0).double()
    assert torch.equal(high._gate(x)[0] != 0, x > 1)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=8), st.data())
def test_top_k_keeps_exactly_k_with_ties(values, data):
    k = data.draw(st.integers(1, len(values)))
    x = torch.tensor([values], dtype=torch.float32)
    want = torch.tensor([naive_top_k(values, k)])
    assert torch.equal(top_k_mask(x, k), want)
    assert torch.equal(top_k_mask(x, torch.tensor([[k]])), want)
    assert want.sum() == k


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.floats(0.01, 1.0), st.integers(1, 8))
def test_sparse_mask(values, ratio, least):
    d = len(values)
    pre = torch.tensor([[values]], dtype=torch.float64)
    adaptive = SymplecticGating(d, gated=True, adaptive_topk_ratio=ratio, adaptive_topk_min_k=min(least, d))
    mask, k = adaptive.compute_sparse_mask(pre, return_k=True)
    assert k.shape == (1, 1, 1)
    assert k.item() == mask.sum() == naive_adaptive_k(values, ratio, min(least, d))
    assert torch.equal(adaptive.compute_sparse_mask(pre), mask)
    mask, k = SymplecticGating(d, gated=True, top_k=1).compute_sparse_mask(pre, return_k=True)
    assert k.item() == mask.sum() == 1
    mask, k = SymplecticGating(d).compute_sparse_mask(pre, return_k=True)
    assert k.item() == mask.sum() == d


def test_sparse_features_are_zero_in_gate_and_gradient():
    gate, x = build({"dim": 6, "gated": True, "top_k": 2, "gate_mode": "soft"}), tokens(1, 4, 6)
    gated, k = gate._gate(x)
    assert (k == 2).all()
    mask = gate.compute_sparse_mask(gate.to_gate(x))
    assert not gated[~mask].any()
    magnitude = torch.autograd.grad(gated.sum(), gate.to_mag.bias)[0]
    assert not magnitude[~mask.any(dim=1)[0]].any()


@given(n=st.integers(0, 20), window=st.integers(1, 25))
def test_trailing_mean(n, window):
    x = tokens(2, n, 1).squeeze(-1)
    want = [x[:, max(0, t - window + 1) : t + 1].mean(dim=-1) for t in range(n)]
    torch.testing.assert_close(trailing_mean(x, window), torch.stack(want, dim=-1) if n else x)
    if n > window:
        # bit for bit the same wherever the sequence starts, and untouched by what left the window
        assert torch.equal(trailing_mean(x[:, 1:], window)[:, window - 1 :], trailing_mean(x, window)[:, window:])
        x[:, 0] = math.nan
        assert trailing_mean(x, window)[:, window:].isfinite().all()


def test_quorum_policy_returns_the_kept_quorum_and_the_size_of_the_budget():
    score = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.6])[None, :, None]
    gate = SymplecticGating(4, quorum_mix=0.5, quorum_window=1, budget_topk_ratio=0.4)
    adjusted, quorum, k = gate.apply_quorum_policy(score, return_budget_k=True)
    assert isinstance(k, int)
    assert k == 3
    assert quorum.squeeze().nonzero().squeeze().tolist() == [1, 3, 5]
    torch.testing.assert_close(quorum[0, 1], torch.sigmoid((score[0, 1] - 0.5) / 0.1))
    torch.testing.assert_close(adjusted, score * (0.5 + 0.5 * quorum))
    causal = SymplecticGating(4, quorum_mix=0.5, quorum_window=1, budget_topk_ratio=0.4, budget_window=4)
    adjusted, quorum, k = causal.apply_quorum_policy(score, return_budget_k=True)
    assert k == 2
    assert quorum.squeeze().nonzero().squeeze().tolist() == [0, 1, 2, 3, 5]
    free = SymplecticGating(4, quorum_mix=0.5).apply_quorum_policy(score, return_budget_k=True)
    assert free[2] == 7
    same, ones = SymplecticGating(4).apply_quorum_policy(score)
    assert torch.equal(same, score)
    assert torch.equal(ones, torch.ones_like(score))


def test_levels_equal_but_for_rounding_are_ties():
    level = torch.full((1, 12), 0.3, dtype=torch.float64)
    noisy = level + torch.randn(1, 12, dtype=torch.float64) * 1e-16
    kept = trailing_budget(level, 0.5, 4)
    assert kept.tolist() == [[True] * 2 + [False] * 10]
    assert torch.equal(trailing_budget(noisy, 0.5, 4), kept)


def test_safe_functions_at_zero():
    zero = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    for function in (safe_norm, unit_norm, lambda x: polar(x)[0], lambda x: polar(x)[1]):
        out = function(zero)
        assert not out.any()
        assert not torch.autograd.grad(out.sum(), zero)[0].any()
    x = tokens(1, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(safe_norm, x)
    assert torch.autograd.gradcheck(unit_norm, x)
    assert torch.autograd.gradcheck(polar, x)
    # the short way round: from 3 to -3 radians is 2 pi - 6
    torch.testing.assert_close(phase_step(torch.tensor([[[3.0], [-3.0]]])).item(), (2 * math.pi - 6) / math.pi)
