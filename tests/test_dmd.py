"""Dynamic mode decomposition against a plain singular value decomposition, at and away from deficient ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from titans_pytorch.gates.dmd import (
    DynamicModeDecomposition,
    captured_energy,
    naive_dmd_error,
    naive_windowed_dmd_error,
    windowed_dmd_error,
)

from .helpers import refusal

ranks = st.none() | st.integers(1, 5)


def snapshots(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def linear_system(matrix, n, seed=0):
    """Snapshots [n d] of x_t = A x_{t-1} in float64."""
    states = [snapshots(len(matrix), seed=seed)]
    for _ in range(n - 1):
        states.append(matrix @ states[-1])
    return torch.stack(states)


def random_matrix(d, radius, seed=0):
    matrix = snapshots(d, d, seed=seed)
    return matrix * radius / torch.linalg.eigvals(matrix).abs().max()


# --- against the naive twin


@given(n=st.integers(0, 12), d=st.integers(1, 9), rank=ranks, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_the_naive_twin(n, d, rank, seed):
    x = snapshots(2, n, d, seed=seed).requires_grad_()
    error = DynamicModeDecomposition(rank)(x)
    want = torch.stack([naive_dmd_error(row, rank) for row in x])
    assert error.shape == (2,)
    torch.testing.assert_close(error, want, rtol=1e-9, atol=1e-10)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    got, slow = (torch.autograd.grad((e * weight).sum(), x)[0] for e in (error, want))
    torch.testing.assert_close(got, slow, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize(("n", "d"), [(9, 4), (5, 8), (4, 3)])
def test_gradients_equal_finite_differences(n, d, rank):
    x = snapshots(2, n, d).requires_grad_()
    assert torch.autograd.gradcheck(DynamicModeDecomposition(rank), x)


@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_along_constant_rank(rank):
    """Snapshots in a plane that turns with the parameters: rank two whatever they are, so that differences exist."""
    inner, outer = snapshots(9, 2).requires_grad_(), snapshots(2, 5, seed=1).requires_grad_()
    error = DynamicModeDecomposition(rank)
    for n in (9, 4):
        assert torch.autograd.gradcheck(lambda a, b, n=n: error((a @ b)[None, :n]), (inner, outer))


@given(
    n=st.integers(0, 20),
    d=st.integers(1, 9),
    window=st.integers(1, 12),
    every=st.integers(1, 7),
    context=st.integers(0, 9),
    rank=ranks,
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_windows_equal_a_loop_over_them(n, d, window, every, context, rank, seed):
    x = snapshots(2, n, d, seed=seed).requires_grad_()
    fast = windowed_dmd_error(x, window, every, rank, context)
    slow = naive_windowed_dmd_error(x, window, every, rank, context)
    assert fast.shape == (2, max(0, (n - context) // every))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    if fast.numel():
        weight = snapshots(*fast.shape, seed=seed)
        got, want = (torch.autograd.grad((e * weight).sum(), x)[0] for e in (fast, slow))
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@given(window=st.integers(1, 12), every=st.integers(1, 5), cut=st.integers(1, 5), d=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_windows_are_causal_and_need_no_more_than_window_minus_every(window, every, cut, d):
    n = 6 * every
    x = snapshots(2, n, d)
    whole = windowed_dmd_error(x, window, every)
    changed = x.clone()
    changed[:, cut * every :] = snapshots(2, n - cut * every, d, seed=1)
    torch.testing.assert_close(windowed_dmd_error(changed, window, every)[:, :cut], whole[:, :cut], rtol=0, atol=1e-10)
    context = min(max(0, window - every), cut * every)
    later = windowed_dmd_error(x[:, cut * every - context :], window, every, context=context)
    torch.testing.assert_close(later, whole[:, cut:], rtol=0, atol=1e-10)


# --- what it means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "n", "wide"), [(2, 8, None), (4, 16, None), (4, 64, 32), (8, 40, 64), (1, 5, 3)])
def test_linear_systems_have_no_error(d, n, wide, dtype):
    for seed in range(3):
        x = linear_system(random_matrix(d, 1.0, seed), n)
        x = (x if wide is None else x @ snapshots(d, wide)).to(dtype)[None].requires_grad_()
        error = DynamicModeDecomposition()(x)
        assert error.dtype == dtype
        assert error.item() < 1e-8
        assert torch.autograd.grad(error.sum(), x)[0].abs().max() < 1e-4
        # from the first window on that has d pairs
        assert windowed_dmd_error(x, 2 * d + 2, 2)[:, d // 2 :].max() < 1e-8
        noise = DynamicModeDecomposition()(snapshots(1, n, wide or d, dtype=dtype))
        assert noise > 0.005


def test_sine_waves_have_no_error():
    t = torch.linspace(0, 4 * math.pi, 128)[:, None]
    x = torch.stack([torch.sin((b + 1) * t + 0.1 * torch.arange(64)) for b in range(4)])
    assert DynamicModeDecomposition()(x).max() < 1e-8
    assert windowed_dmd_error(x, 16, 4).max() < 1e-8


def test_error_of_a_known_case():
    """The basis vectors in turn: all but the last, which lies outside the span of those before, can be predicted."""
    for dtype in (torch.float32, torch.float64):
        error = DynamicModeDecomposition()(torch.eye(6, dtype=dtype)[None])
        torch.testing.assert_close(error, torch.tensor([1 / (5 * 6)], dtype=dtype))
    # one snapshot, then another at 60 degrees: what sticks out is sin(60)^2 over two features
    pair = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    torch.testing.assert_close(DynamicModeDecomposition()(pair), torch.tensor(0.375))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_snapshots_have_no_error(n):
    x = snapshots(3, n, 4).requires_grad_()
    error, eigenvalues = DynamicModeDecomposition()(x, return_eigenvalues=True)
    assert error.tolist() == [0.0] * 3
    assert eigenvalues.shape == (3, 0)
    assert not torch.autograd.grad(error.sum(), x)[0].any()
    assert not windowed_dmd_error(snapshots(3, 6, 4), 1, 2).any()


def test_eigenvalues_are_those_of_the_system():
    matrix = random_matrix(4, 0.95)
    states = linear_system(matrix, 24)
    for x, dtype in ((states, torch.complex128), (states.float(), torch.complex64), (states @ snapshots(4, 9), None)):
        error, eigenvalues = DynamicModeDecomposition()(x[None], return_eigenvalues=True)
        assert error.shape == (1,)
        assert dtype in (None, eigenvalues.dtype)
        found = eigenvalues[0].to(torch.complex128)
        assert len(found) == x.shape[-1]
        kept = found[found.abs().argsort(descending=True)[:4]]
        for want in torch.linalg.eigvals(matrix):
            assert (kept - want).abs().min() < 1e-3
        assert (found.abs() < 1e-6).sum() == x.shape[-1] - 4


@pytest.mark.parametrize(("n", "d", "rank"), [(9, 4, None), (5, 8, None), (9, 4, 2), (5, 8, 3), (9, 4, 7)])
def test_eigenvalues_equal_the_definition(n, d, rank):
    x = snapshots(2, n, d)
    error, eigenvalues = DynamicModeDecomposition(rank)(x, return_eigenvalues=True)
    assert torch.equal(error, DynamicModeDecomposition(rank)(x))
    r = min(n - 1, d, rank or d)
    assert eigenvalues.shape == (2, r)
    for row, found in zip(x, eigenvalues, strict=True):
        u, s, vh = torch.linalg.svd(row[:-1].mT, full_matrices=False)
        want = torch.linalg.eigvals(u[:, :r].mT @ row[1:].mT @ vh[:r].mT @ torch.diag(1 / s[:r]))
        distance = (want[:, None] - found[None]).abs()
        assert distance.min(dim=0).values.max() < 1e-9
        assert distance.min(dim=1).values.max() < 1e-9


# --- laws


def deficient(kind, d):
    x = snapshots(2, 9, d)
    if kind == "zero":
        return x * 0
    if kind == "constant":
        return x[:, :1].expand_as(x).contiguous()
    if kind == "rank two":
        return snapshots(2, 9, 2) @ snapshots(2, d, seed=1)
    if kind == "repeated":
        return x[:, [0, 0, 1, 1, 2, 2, 0, 1, 2]]
    if kind == "equal singular values":
        return torch.eye(d, dtype=torch.float64).repeat(2, 1)[None, : 2 * d].repeat(2, 1, 1)
    x[:, : 3 if kind == "padded in front" else 0] = 0
    x[:, 6 if kind == "padded behind" else 9 :] = 0
    return x


KINDS = ["zero", "constant", "rank two", "repeated", "equal singular values", "padded in front", "padded behind"]


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_on_deficient_input(kind, rank):
    for dtype in (torch.float32, torch.float64):
        for d in (4, 16):
            x = deficient(kind, d).to(dtype).requires_grad_()
            calls = [
                DynamicModeDecomposition(rank)(x),
                windowed_dmd_error(x, 5, 1, rank),
                windowed_dmd_error(x, 9, 3, rank),
            ]
            for error in calls:
                grad = torch.autograd.grad(error.sum(), x)[0]
                assert error.isfinite().all()
                assert grad.isfinite().all()
                assert grad.abs().max() < 1e3
            if kind != "equal singular values":
                want = torch.stack([naive_dmd_error(row, rank) for row in x])
                torch.testing.assert_close(calls[0], want, rtol=1e-4, atol=1e-5)


def test_equal_singular_values_at_the_rank_are_decoupled():
    """Which of equal directions a cut keeps is arbitrary; the slope between them is infinite and counts as zero."""
    gram = torch.eye(4, dtype=torch.float64).requires_grad_()
    cross = snapshots(4, 4).requires_grad_()
    energy = captured_energy(gram, cross, torch.tensor(1e-12, dtype=torch.float64), rank=2)
    grads = torch.autograd.grad(energy, (gram, cross))
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("window", [4, 12])
def test_a_row_that_is_not_finite_stays_alone(window, value):
    x = snapshots(3, 12, 5)
    broken = x.clone()
    broken[1, 5, 2] = value
    broken.requires_grad_()
    error, eigenvalues = DynamicModeDecomposition()(broken, return_eigenvalues=True)
    assert error.isnan().tolist() == [False, True, False]
    assert eigenvalues.isnan().all(dim=-1).tolist() == [False, True, False]
    torch.testing.assert_close(error[[0, 2]], DynamicModeDecomposition()(x)[[0, 2]], rtol=0, atol=1e-10)
    windows, good = windowed_dmd_error(broken, window, 2), windowed_dmd_error(x, window, 2)
    reached = torch.tensor([end > 5 >= end - window for end in range(2, 13, 2)])
    assert torch.equal(windows[1].isnan(), reached)
    torch.testing.assert_close(windows[1, ~reached], good[1, ~reached], rtol=0, atol=1e-10)
    torch.testing.assert_close(windows[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    grad = torch.autograd.grad(windows.nansum() + error.nansum(), broken)[0]
    assert grad[[0, 2]].isfinite().all()


def test_leading_dims_and_dtypes():
    error, x = DynamicModeDecomposition(2), snapshots(2, 3, 9, 4)
    value, eigenvalues = error(x, return_eigenvalues=True)
    assert eigenvalues.shape == (2, 3, 2)
    want = torch.stack([naive_dmd_error(row, 2) for row in x.flatten(0, 1)]).view(2, 3)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(error(x[0, 0]), want[0, 0])
    assert error(x[:0]).shape == (0, 3)
    single = error(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=1e-6)
    half = error(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), want, rtol=0.05, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(error(x.float()), single)
    with torch.inference_mode():
        assert torch.equal(error(x), value)
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(error(leaf).sum(), leaf)[0]
    again = torch.autograd.grad(checkpoint(error, leaf, use_reentrant=False).sum(), leaf)[0]
    assert torch.equal(plain, again)


def test_compiles_without_a_graph_break():
    x = snapshots(2, 11, 6).requires_grad_()
    compiled = torch.compile(windowed_dmd_error, backend="aot_eager", fullgraph=True)
    for function in (windowed_dmd_error, compiled):
        error = function(x, 4, 2)
        grad = torch.autograd.grad(error.sum(), x)[0]
        if function is windowed_dmd_error:
            want = error, grad
    torch.testing.assert_close((error, grad), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_bad_rank_is_named(rank):
    with pytest.raises(ValueError, match="^rank must be an int of at least 1, got .*"):
        DynamicModeDecomposition(rank)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^x must be floating point snapshots, got torch.int64"):
        DynamicModeDecomposition()(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^x must be snapshots.*, got shape \(4,\)"):
        DynamicModeDecomposition()(torch.zeros(4))
    x = torch.zeros(1, 4, 2)
    for name, call in {
        "window": lambda: windowed_dmd_error(x, 0, 1),
        "every": lambda: windowed_dmd_error(x, 4, 0),
        "context": lambda: windowed_dmd_error(x, 4, 1, context=-1),
        "x": lambda: windowed_dmd_error(x[0], 4, 1),
    }.items():
        with pytest.raises(ValueError, match=refusal(name)):
            call()
