"""Laws of SymplecticGating: causal, exact with `context` tokens, finite, rows alone, whatever mode it runs in."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .symplectic_gates import EVERYTHING, build, everything, gradients, options, tokens


@given(kwargs=options(budget=("none", "window")), cut=st.integers(1, 11), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_causal(kwargs, cut, seed):
    gate, x = build(kwargs, seed), tokens(2, 12, kwargs["dim"], seed)
    changed = x.clone()
    changed[:, cut:] = 3 * tokens(2, 12 - cut, kwargs["dim"], seed + 1)
    before, after = everything(gate, x), everything(gate, changed)
    for name in before:
        torch.testing.assert_close(before[name][:, :cut], after[name][:, :cut], rtol=0, atol=1e-12)
    assert not torch.equal(x, changed)


def test_a_budget_over_the_whole_sequence_is_not_causal_and_has_no_context():
    gate = build({"dim": 6, "quorum_mix": 1.0, "budget_topk_ratio": 0.3})
    x = tokens(1, 12, 6)
    changed = x.clone()
    changed[:, 8:] = changed[:, 7:8]
    assert not torch.allclose(gate(x)[:, :8], gate(changed)[:, :8])
    assert gate.context is None


@given(kwargs=options(budget=("none", "window")), start=st.integers(0, 19), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_context_is_enough(kwargs, start, seed):
    gate, x = build(kwargs, seed), tokens(2, 20, kwargs["dim"], seed)
    first = max(0, start - gate.context)
    torch.testing.assert_close(gate(x[:, first:])[:, start - first :], gate(x)[:, start:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "context"),
    [
        ({}, 1),
        ({"phase_mix": 0.5, "codebook_mix": 0.5, "gated": True, "top_k": 2}, 1),
        ({"quorum_window": 9}, 1),
        ({"quorum_mix": 0.5}, 3),
        ({"quorum_mix": 0.5, "quorum_window": 5}, 5),
        ({"quorum_mix": 0.5, "quorum_window": 5, "budget_topk_ratio": 0.5, "budget_window": 7}, 11),
    ],
)
def test_context_is_no_more_than_needed(kwargs, context):
    """With one token fewer some score differs, over many sequences and starts."""
    gate = build({"dim": 6} | kwargs)
    assert gate.context == context
    x = tokens(64, 30, 6)
    short = [
        not torch.allclose(gate(x[:, s - context + 1 :])[:, context - 1 :], gate(x)[:, s:], rtol=0, atol=1e-9)
        for s in range(context, 30)
    ]
    assert any(short)


@given(kwargs=options(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_finite_on_zero_constant_and_padded_input(kwargs, seed):
    gate = build(kwargs, seed)
    for dtype in (torch.float32, torch.float64):
        gate = gate.to(dtype)
        dim = kwargs["dim"]
        padded = tokens(1, 9, dim, seed, dtype)
        padded[:, 6:] = 0
        padded[:, :2] = 0
        for x in (torch.zeros(1, 6, dim, dtype=dtype), torch.ones(1, 6, dim, dtype=dtype), padded):
            leaf = x.clone().requires_grad_()
            out = everything(gate, leaf)
            loss = sum(v.sum() for v in out.values() if v.is_floating_point())
            grads = gradients(loss, [leaf, *gate.parameters()])
            assert all(v.isfinite().all() for v in out.values())
            assert all(g.isfinite().all() for g in grads)
            assert max(g.abs().max() for g in grads) < 1e6


@given(kwargs=options(), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_row_that_is_not_a_number_stays_alone(kwargs, seed):
    gate, x = build(kwargs, seed), tokens(3, 8, kwargs["dim"], seed)
    broken = x.clone()
    broken[1, 3] = math.nan
    good, bad = gate(x), gate(broken)
    torch.testing.assert_close(bad[[0, 2]], good[[0, 2]], rtol=0, atol=1e-12)
    assert bad[1, 3].isnan().all()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_sequences(n):
    gate, x = build({"dim": 6} | EVERYTHING), tokens(2, n, 6).requires_grad_()
    out = everything(gate, x)
    assert out["complexity"].shape == (2, n, 1)
    assert out["complexity"][:, :1].abs().sum() == 0
    out["complexity"].sum().backward()
    assert x.grad.isfinite().all()


def test_pickle_deepcopy_state_dict_and_dtypes():
    gate, x = build({"dim": 6} | EVERYTHING), tokens(2, 9, 6)
    want = gate(x)
    assert torch.equal(pickle.loads(pickle.dumps(gate))(x), want)
    assert torch.equal(copy.deepcopy(gate)(x), want)
    other = build({"dim": 6} | EVERYTHING, seed=1)
    assert not torch.equal(other(x), want)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(x), want)
    plain = build({"dim": 16})
    x = tokens(2, 9, 16)
    half = copy.deepcopy(plain).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), plain(x), rtol=0, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        scores = plain.float()(x.float())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), plain.double()(x), rtol=0, atol=0.03)


def test_compiles_without_a_graph_break():
    gate, x = build({"dim": 6} | EVERYTHING), tokens(2, 9, 6).requires_grad_()
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    plain, fused = ((score, *gradients(score.sum(), [x, *gate.parameters()])) for score in (gate(x), compiled(x)))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)
