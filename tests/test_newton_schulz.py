"""Orthogonalised updates against the iteration written down, and against what it does to singular values."""

import pytest
import torch

from titans_pytorch.ops.newton_schulz import COEFFICIENTS, naive_newton_schulz, newton_schulz

from .helpers import assert_close, gradients, relative_error

SHAPES = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (3, 1, 1), (2, 3, 6, 4), (2, 1, 4, 6)]


def example(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_agrees_with_the_iteration(shape, steps):
    """The iteration multiplies rounding in small singular values by up to 3.4445 in each step."""
    x = example(*shape).requires_grad_()
    got, wanted = newton_schulz(x, steps), naive_newton_schulz(x, steps)
    assert_close(got, wanted, 1e-11)
    got, wanted = (gradients([out], {"x": x})["x"] for out in (got, wanted))
    assert (got - wanted).abs().max() < 1e-9  # zero for a single number: only its sign counts


@pytest.mark.parametrize("form", [newton_schulz, naive_newton_schulz], ids=lambda form: form.__name__)
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)], ids=str)
def test_acts_on_the_singular_values_alone(form, shape):
    """U S V becomes U p(S / |S|) V, p(s) = a s + b s^3 + c s^5 applied five times."""
    x = example(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert_close(form(x), u @ torch.diag(s) @ v, 1e-11)
    assert ((s > 0.6) & (s < 1.3)).all()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-7, 1e3])
def test_any_size(shape, size):
    """A zero matrix stays zero, one below the floor shrinks, every other has the same result; slopes are finite."""
    x = (example(2, *shape) * size).requires_grad_()
    out = newton_schulz(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    if size == 0.0:
        assert (out == 0).all()
    elif size == 1e3:
        assert_close(out, newton_schulz(example(2, *shape)), 1e-11)
    assert_close(out, naive_newton_schulz(x), 1e-11)


@pytest.mark.parametrize("shape", [(7, 4, 9), (7, 9, 4), (2, 3, 5, 5)], ids=str)
def test_matrices_are_taken_a_few_at_a_time(shape, monkeypatch):
    x = example(*shape).requires_grad_()
    (wanted,) = torch.autograd.grad(newton_schulz(x).sin().sum(), x)
    for tile_bytes in (1, 3 * 8 * 16):  # single matrices; three of 4 x 4, the last tile smaller
        monkeypatch.setattr("titans_pytorch.ops.newton_schulz.TILE_BYTES", tile_bytes)
        out = newton_schulz(x)
        assert_close(out, naive_newton_schulz(x), 1e-11)
        assert_close(torch.autograd.grad(out.sin().sum(), x)[0], wanted, 1e-11)


def test_second_derivative():
    x = (example(2, 3, 5) * 0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: newton_schulz(x, 2), x)


def test_rows_do_not_touch():
    x = example(3, 4, 5)
    alone = newton_schulz(x[1])
    x[0] = float("nan")
    assert_close(newton_schulz(x)[1], alone, 1e-12)


def test_one_matrix_of_a_batch_may_be_zero():
    x = example(2, 3, 4, 5)
    x[1, 2] = 0.0
    x.requires_grad_()
    out = newton_schulz(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all()
    assert (out[1, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_stay_near(dtype):
    """In bfloat16 the iteration itself would explode: the result errs by the rounding of its input."""
    x = example(4, 6, 6, dtype=dtype)
    out = newton_schulz(x)
    assert out.dtype == dtype
    wanted = naive_newton_schulz(x.double())
    assert relative_error(out, wanted) < (1e-3 if dtype == torch.float32 else 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(newton_schulz(x), out)
