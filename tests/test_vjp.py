"""Values and ways back of the primitives, against plain formulas under autograd, to second order."""

import math

import pytest
import torch

from titans_pytorch.ops import vjp

from .helpers import assert_close, assert_same_gradients, gradients


def plain_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_sigmoid(x):
    return 1 / (1 + (-x).exp())


def plain_layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def plain_unit_norm(x):
    return x / x.norm(dim=-1, keepdim=True)


def plain_attention(q, k, v):
    rows = []
    for i in range(q.shape[-2]):
        seen = slice(0, i + 1)
        weights = (3.0 * (q[..., i : i + 1, :] @ k[..., seen, :].mT)).softmax(-1)
        rows.append(weights @ v[..., seen, :])
    return torch.cat(rows, dim=-2)


def attention(q, k, v):
    return vjp.causal_attention(q, k, v, 3.0)


def plain_silu(x):
    return x * plain_sigmoid(x)


def plain_elu(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def plain_monomials(x):
    d = x.shape[-1]
    pairs = [x[..., i] * x[..., j] / (2**0.5 if i == j else 1) for i in range(d) for j in range(i, d)]
    return torch.cat((torch.ones_like(x[..., :1]), x, torch.stack(pairs, dim=-1)), dim=-1)


PRIMITIVES = {
    "silu": (vjp.silu, plain_silu, 1),
    "elu": (vjp.elu_plus_one, plain_elu, 1),
    "monomials 1": (lambda x: vjp.monomials(x, 1), lambda x: torch.cat((torch.ones_like(x[..., :1]), x), dim=-1), 1),
    "monomials 2": (lambda x: vjp.monomials(x, 2), plain_monomials, 1),
    "gelu": (vjp.gelu, plain_gelu, 1),
    "sigmoid": (vjp.sigmoid, plain_sigmoid, 1),
    "layer_norm": (vjp.layer_norm, plain_layer_norm, 1),
    "unit_norm": (vjp.unit_norm, plain_unit_norm, 1),
    "causal_attention": (attention, plain_attention, 3),
}


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_value_way_back_and_its_slope(name, shape):
    taped, plain, count = PRIMITIVES[name]
    generator = torch.Generator().manual_seed(0)
    leaves = {
        f"x{i}": torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for i in range(count)
    }
    wanted = plain(*leaves.values())
    y, back = taped(*leaves.values())
    assert_close(y, wanted, 1e-11, "value")
    dy = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).requires_grad_()
    wanted_dx = torch.autograd.grad(wanted, tuple(leaves.values()), dy, create_graph=True)
    dx = back(dy) if count > 1 else (back(dy),)
    for got, want in zip(dx, wanted_dx, strict=True):
        assert_close(got, want, 1e-10, "way back")
    leaves |= {"dy": dy}
    assert_same_gradients(gradients([y, *dx], leaves), gradients([wanted, *wanted_dx], leaves), 1e-9)


@pytest.mark.parametrize("x", [0.0, 1e-3, -4.0, 30.0, -30.0])
def test_gelu_to_third_order(x):
    x = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    got, wanted = vjp.gelu(x)[1](torch.ones_like(x)), torch.autograd.grad(plain_gelu(x), x, create_graph=True)[0]
    for _ in range(2):
        assert_close(got, wanted, 1e-10)
        (got,), (wanted,) = (torch.autograd.grad(out, x, create_graph=True) for out in (got, wanted))
    assert (got - wanted).abs() < 1e-10


@pytest.mark.parametrize("name", ["layer_norm", "unit_norm"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_smooth_at_nothing(name, fill, dtype):
    """Where the plain formula divides by zero, value, way back and its slope are finite."""
    taped = PRIMITIVES[name][0]
    x = torch.full((2, 3), fill, dtype=dtype, requires_grad=True)
    y, back = taped(x)
    dx = back(torch.randn(2, 3, dtype=dtype))
    (slope,) = torch.autograd.grad(dx.sum() + y.sum(), x)
    for out in (y, dx, slope):
        assert out.isfinite().all()


def test_products_of_monomials_begin_the_exponential():
    q, k = torch.randn(2, 5, 4, dtype=torch.float64)
    dot = (q * k).sum(-1)
    for degree, wanted in ((1, 1 + dot), (2, 1 + dot + dot.square() / 2)):
        assert_close((vjp.monomials(q, degree)[0] * vjp.monomials(k, degree)[0]).sum(-1), wanted, 1e-12)


def test_attention_is_causal():
    q, k, v = torch.randn(3, 5, 4, dtype=torch.float64)
    y = attention(q, k, v)[0]
    k[3:], v[3:] = 7.0, 1e9
    assert torch.equal(attention(q, k, v)[0][:3], y[:3])
