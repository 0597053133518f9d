"""SymplecticGating against its naive twin, its examples, what it returns, wrong arguments."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch.gates.naive import naive_forward
from titans_pytorch.gates.symplectic import SymplecticGating

from .helpers import refusal
from .symplectic_gates import EVERYTHING, MAPS, build, everything, gradients, options, tokens

# against the naive twin


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


# examples


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


# bad arguments


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
    with pytest.raises(ValueError, match=refusal(name)):
        SymplecticGating(**{"dim": 8} | kwargs)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 7), (1, 2, 3, 8)])
def test_bad_tokens_are_named(shape):
    gate = SymplecticGating(8)
    for call in (gate, gate.extract_manifold_state):
        with pytest.raises(ValueError, match=r"^x must be tokens \[b n 8\], got shape .*"):
            call(torch.zeros(shape))
        with pytest.raises(ValueError, match="^x must be .*, got torch.int64"):
            call(torch.zeros(2, 3, 8, dtype=torch.long))
