"""SymplecticGating against its naive twin, its laws (causal, exact with `context` tokens, finite) and its examples."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch.gating.naive import naive_adaptive_k, naive_forward, naive_top_k
from titans_pytorch.gating.quorum import trailing_budget, trailing_mean
from titans_pytorch.gating.scores import phase_step, polar, safe_norm, unit_norm
from titans_pytorch.gating.selection import top_k_mask
from titans_pytorch.symplectic_gate import SymplecticGating

MAPS = {
    "moment_map": "return_moment_map",
    "phase_map": "return_phase_map",
    "codebook_map": "return_codebook_map",
    "quorum_map": "return_quorum_map",
    "sparse_k": "return_sparse_k",
    "manifold": "return_manifold_state",
}
EVERYTHING = {
    "gated": True,
    "gate_mode": "soft",
    "adaptive_topk_ratio": 0.8,
    "phase_mix": 0.3,
    "codebook_mix": 0.3,
    "codebook_size": 5,
    "codebook_topk": 3,
    "quorum_mix": 0.6,
    "budget_topk_ratio": 0.5,
    "budget_window": 4,
}


@st.composite
def options(draw, budget=("none", "sequence", "window")):
    """Constructor arguments with every option on or off, dim included."""
    dim = draw(st.integers(2, 7))
    kwargs = {"dim": dim, "dim_free": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs.update(gated=True, diag=draw(st.booleans()), gate_mode=draw(st.sampled_from(["hard", "soft"])))
        kwargs.update(gate_threshold=draw(st.sampled_from([0.0, -0.2, 0.1])))
        sparse = draw(st.sampled_from(["none", "fixed", "adaptive"]))
        if sparse == "fixed":
            kwargs.update(top_k=draw(st.integers(1, dim)))
        if sparse == "adaptive":
            kwargs.update(adaptive_topk_ratio=draw(st.floats(0.05, 1.0)), adaptive_topk_min_k=draw(st.integers(1, dim)))
    if draw(st.booleans()):
        kwargs.update(phase_mix=draw(st.floats(0.1, 1.0)), phase_pairs=draw(st.none() | st.integers(1, 4)))
    if draw(st.booleans()):
        size = draw(st.integers(1, 6))
        kwargs.update(codebook_mix=draw(st.floats(0.1, 1.0)), codebook_size=size)
        kwargs.update(codebook_topk=draw(st.none() | st.integers(1, size)))
    if draw(st.booleans()):
        kwargs.update(quorum_mix=draw(st.floats(0.1, 1.0)), quorum_window=draw(st.integers(1, 6)))
        kwargs.update(quorum_threshold=draw(st.floats(0.0, 1.0)), quorum_temperature=draw(st.floats(0.05, 1.0)))
        kind = draw(st.sampled_from(budget))
        if kind != "none":
            kwargs.update(budget_topk_ratio=draw(st.floats(0.05, 1.0)))
        if kind == "window":
            kwargs.update(budget_window=draw(st.integers(1, 6)))
    return kwargs


def build(kwargs, seed=0):
    """A gate in float64 with random parameters."""
    torch.manual_seed(seed)
    gate = SymplecticGating(**kwargs).double()
    with torch.no_grad():
        for p in gate.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return gate


def tokens(b, n, dim, seed=0, dtype=torch.float64):
    return torch.randn(b, n, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def everything(gate, x):
    names = [name for name in MAPS if name not in ("manifold",)]
    complexity, *maps, manifold = gate(x, **dict.fromkeys(MAPS.values(), True))
    out = dict(zip(["complexity", *names], [complexity, *maps], strict=True)) | (manifold or {})
    return {name: value for name, value in out.items() if value is not None}


def gradients(loss, leaves):
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


# --- against the naive twin


@given(kwargs=options(), n=st.integers(1, 9), b=st.integers(1, 2), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_values_and_gradients_equal_the_naive_twin(kwargs, n, b, seed):
    gate, x = build(kwargs, seed), tokens(b, n, kwargs["dim"], seed)
    if n > 3:
        x[:, 2] = x[:, 1]
    x.requires_grad_()
    fast, slow = everything(gate, x), naive_forward(gate, x)
    assert fast.keys() == slow.keys()
    for name, value in fast.items():
        torch.testing.assert_close(value, slow[name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    weights = {name: torch.randn_like(v) for name, v in fast.items() if v.is_floating_point()}
    leaves = [x, *gate.parameters()]
    fast_grads, slow_grads = (
        gradients(sum((out[k] * w).sum() for k, w in weights.items()), leaves) for out in (fast, slow)
    )
    for got, want in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@given(kwargs=options(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_parameter_gets_a_gradient_and_scores_lie_in_the_unit_interval(kwargs, seed):
    gate = build(kwargs, seed)
    complexity = gate(tokens(2, 7, kwargs["dim"], seed))
    assert complexity.shape == (2, 7, 1)
    assert complexity.min() >= 0
    assert complexity.max() <= 1
    complexity.sum().backward()
    assert [name for name, p in gate.named_parameters() if p.grad is None] == []


# --- laws


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


def test_parameters_by_name():
    names = lambda **kwargs: {name for name, _ in SymplecticGating(6, **kwargs).named_parameters()}  # noqa: E731
    twist = {"to_twist_q.weight", "to_twist_k.weight"}
    assert names() == twist
    assert names(gated=True) == twist | {"to_gate.weight", "to_gate.bias", "to_mag.weight", "to_mag.bias"}
    assert names(gated=True, diag=True) == twist | {"gate_weight", "gate_bias", "mag_weight", "mag_bias"}
    assert names(phase_mix=0.5, codebook_mix=0.5) == twist | {"to_phase.weight", "to_codebook.weight"}
    diag = SymplecticGating(6, gated=True, diag=True)
    assert (diag.gate_weight == 1).all()
    assert (diag.mag_weight == 1).all()
    assert not diag.gate_bias.any()
    assert not diag.mag_bias.any()
    wide = SymplecticGating(64, phase_mix=0.5, codebook_mix=0.5)
    assert wide.to_phase.weight.shape == (64, 64)
    assert wide.to_codebook.weight.shape == (16, 64)
    for weight in (wide.to_phase.weight, wide.to_codebook.weight):
        assert 0.015 < weight.std() < 0.025


# --- examples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kwargs", [{}, {"dim_free": True}, EVERYTHING], ids=["plain", "dim_free", "everything"])
def test_a_constant_sequence_scores_exactly_zero(kwargs, dtype):
    for dim in (4, 8, 33):
        for n in (1, 2, 3, 17):
            gate = build({"dim": dim} | kwargs).to(dtype)
            assert not gate(tokens(2, 1, dim, dtype=dtype).expand(2, n, dim).contiguous()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_on_one_ray_do_not_twist_nor_turn(dtype):
    """Their moments are rounding noise, the slope of whose norm would be noise of size one."""
    gate = build({"dim": 24, "phase_mix": 0.5}).to(dtype)
    scale = torch.tensor([1.0, 0.3, 7.0, 0.1, 2.0, 5.0], dtype=dtype)[:, None]
    x = (tokens(2, 1, 24, dtype=dtype) * scale).requires_grad_()
    score = gate(x)
    assert score.max() < 1e-5
    grads = torch.autograd.grad(score.sum(), [x, *gate.parameters()])
    assert not any(g.any() for g in grads)
    opposite = (tokens(1, 1, 24, dtype=dtype) * scale * torch.tensor([1, -1] * 3)[:, None]).requires_grad_()
    score = gate(opposite)
    torch.testing.assert_close(score[:, 1:], torch.full((1, 5, 1), 0.5, dtype=dtype))
    assert not torch.autograd.grad(score.sum(), opposite)[0].any()


def shift_gate(dim=8, **kwargs):
    """to_twist_q the identity, to_twist_k a cyclic shift by one."""
    gate = SymplecticGating(dim, **kwargs)
    with torch.no_grad():
        gate.to_twist_q.weight.copy_(torch.eye(dim))
        gate.to_twist_k.weight.copy_(torch.eye(dim).roll(1, dims=0))
    return gate


def test_equal_maps_score_zero_on_anything():
    gate = shift_gate()
    with torch.no_grad():
        gate.to_twist_k.weight.copy_(torch.eye(8))
    assert not gate(torch.randn(3, 50, 8)).any()


@pytest.mark.parametrize("direction", [1, -1])
def test_basis_vectors_turn_the_sequence(direction):
    gate, walk = shift_gate(), torch.eye(8)[None]
    walk = walk if direction == 1 else walk.flip(1)
    complexity, moment = gate(walk, return_moment_map=True)
    constant = gate(walk[:, :1].expand(1, 8, 8))
    assert moment.shape == walk.shape
    assert moment.abs().max() > 0.1
    assert complexity.mean() > constant.mean() + 0.05
    # moment_t is a single unit vector, so that each score but the first is tanh(1)
    torch.testing.assert_close(complexity[0, 1:], torch.full((7, 1), math.tanh(1.0)))
    scaled = shift_gate(dim_free=True)(walk)
    torch.testing.assert_close(scaled[0, 1:], torch.full((7, 1), math.tanh(math.sqrt(8.0))))


def test_dim_free_makes_white_noise_cross_one_half_at_any_width():
    for dim in (32, 256):
        noise = torch.randn(2, 64, dim, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        plain, free = SymplecticGating(dim), SymplecticGating(dim, dim_free=True)
        assert plain(noise).max() < 0.5
        assert free(noise)[:, 1:].median() > 0.5


def test_a_rotating_pair_scores_above_a_fixed_one():
    gate = SymplecticGating(2, phase_mix=1.0, phase_pairs=1)
    with torch.no_grad():
        gate.to_phase.weight.copy_(torch.eye(2))
    angle = torch.arange(12) * 0.7
    rotating = torch.stack((angle.cos(), angle.sin()), dim=-1)[None]
    score, phase, manifold = gate(rotating, return_phase_map=True, return_manifold_state=True)
    torch.testing.assert_close(score[0, 1:], torch.full((11, 1), 0.7 / math.pi))
    assert torch.equal(phase, score)
    assert not gate(rotating[:, :1].expand(1, 12, 2)).any()
    torch.testing.assert_close(manifold["phase_angle"][0, :, 0], torch.atan2(angle.sin(), angle.cos()))
    torch.testing.assert_close(manifold["phase_radius"], torch.ones(1, 12, 1))
    assert SymplecticGating(2).extract_manifold_state(rotating) is None
    assert SymplecticGating(2)(rotating, return_manifold_state=True)[1] is None


def test_order_of_what_is_returned():
    gate, x = build({"dim": 6} | EVERYTHING), tokens(2, 9, 6)
    assert isinstance(gate(x), torch.Tensor)
    complexity, *maps = gate(x, **dict.fromkeys(MAPS.values(), True))
    for alone, value in zip(MAPS.values(), maps, strict=True):
        first, second = gate(x, **{alone: True})
        assert torch.equal(first, complexity)
        if isinstance(value, dict):
            assert all(torch.equal(value[k], second[k]) for k in ("phase_radius", "phase_angle"))
        else:
            assert torch.equal(value, second)
    again = gate.extract_manifold_state(x)
    assert all(torch.equal(again[name], maps[-1][name]) for name in again)
    assert [m.shape[-1] for m in maps[:-1]] == [6, 1, 1, 1, 1]
    assert maps[-1]["phase_angle"].shape == (2, 9, 3)


# --- parts


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


# --- bad arguments


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("dim", {"dim": 0}),
        ("dim", {"dim": 2.0}),
        ("gate_mode", {"gate_mode": "medium"}),
        ("gate_threshold", {"gate_threshold": math.nan}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 9}),
        ("top_k", {"top_k": True}),
        ("top_k", {"top_k": 2, "adaptive_topk_ratio": 0.5}),
        ("adaptive_topk_ratio", {"adaptive_topk_ratio": 0.0}),
        ("adaptive_topk_ratio", {"adaptive_topk_ratio": 1.1}),
        ("adaptive_topk_min_k", {"adaptive_topk_min_k": 0}),
        ("adaptive_topk_min_k", {"adaptive_topk_min_k": 9}),
        ("phase_mix", {"phase_mix": -0.1}),
        ("phase_mix", {"phase_mix": 1.5}),
        ("phase_mix", {"dim": 1, "phase_mix": 0.5}),
        ("phase_pairs", {"phase_pairs": 0}),
        ("quorum_mix", {"quorum_mix": 2}),
        ("quorum_window", {"quorum_window": 0}),
        ("quorum_threshold", {"quorum_threshold": -1.0}),
        ("quorum_temperature", {"quorum_temperature": 0.0}),
        ("quorum_temperature", {"quorum_temperature": math.inf}),
        ("budget_topk_ratio", {"budget_topk_ratio": 0.5}),
        ("budget_topk_ratio", {"quorum_mix": 0.5, "budget_topk_ratio": 0.0}),
        ("budget_topk_ratio", {"quorum_mix": 0.5, "budget_topk_ratio": 1.1}),
        ("budget_window", {"quorum_mix": 0.5, "budget_window": 4}),
        ("budget_window", {"quorum_mix": 0.5, "budget_topk_ratio": 0.5, "budget_window": 0}),
        ("codebook_mix", {"codebook_mix": "half"}),
        ("codebook_size", {"codebook_size": 0}),
        ("codebook_temperature", {"codebook_temperature": -0.1}),
        ("codebook_topk", {"codebook_topk": 17}),
        ("codebook_topk", {"codebook_topk": 0}),
    ],
)
def test_bad_arguments_are_named(name, kwargs):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, takes "):
        SymplecticGating(**{"dim": 8} | kwargs)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 7), (1, 2, 3, 8)])
def test_bad_tokens_are_named(shape):
    gate = SymplecticGating(8)
    for call in (gate, gate.extract_manifold_state):
        with pytest.raises(ValueError, match=r"^x: got shape .*, takes tokens \[b n 8\]"):
            call(torch.zeros(shape))
