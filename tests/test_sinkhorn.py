"""Sinkhorn-Knopp in its three forms: as written down, by scaling vectors with its own way back, in plain numbers."""

import pytest
import torch
from hyper_connections.manifold_constrained_hyper_connections import sinkhorn_knopps

from titans_pytorch.ops.sinkhorn import naive_sinkhorn, sinkhorn, sinkhorn_numbers

from .helpers import assert_close, gradients

SHAPES = [(4, 4, 7), (4, 4, 2, 3), (2, 2, 1), (1, 1, 3), (3, 3), (4, 4, 0)]


def example(*shape, size=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_forms_agree(shape, iterations):
    x = example(*shape).requires_grad_()
    got, wanted = sinkhorn(x, iterations), naive_sinkhorn(x, iterations)
    assert_close(got, wanted, 1e-14)
    got, wanted = (gradients([out], {"x": x})["x"] for out in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("streams", [1, 2, 4, 5])
def test_plain_numbers_agree(streams):
    for x in example(6, streams, streams):
        assert_close(torch.tensor(sinkhorn_numbers(x.tolist()), dtype=torch.float64), sinkhorn(x), 1e-14)


@pytest.mark.parametrize("size", [0.01, 1.0, 5.0])
def test_agrees_with_the_package(size):
    """hyper-connections gives float32."""
    x = example(50, 4, 4, size=size)
    assert_close(sinkhorn(x.permute(1, 2, 0)).permute(2, 0, 1), sinkhorn_knopps(x), 1e-6)


def test_result_is_doubly_stochastic():
    x = sinkhorn(example(4, 4, 9, size=1.0))
    assert (x > 0).all()
    torch.testing.assert_close(x.sum(dim=1), torch.ones(4, 9, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(x.sum(dim=0), torch.ones(4, 9, dtype=torch.float64), rtol=0, atol=1e-5)


def test_first_columns_then_rows():
    """[[0 0] [0 3]] with next to nothing for a zero: columns to [[1/2 0] [1/2 1]], rows to [[1 0] [1/3 2/3]]."""
    x = torch.tensor([[-50.0, -50.0], [-50.0, 3.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, 0.0], [1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(x, 1), wanted)
    torch.testing.assert_close(torch.tensor(sinkhorn_numbers(x.tolist(), 1), dtype=torch.float64), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [sinkhorn, naive_sinkhorn])
def test_any_logits_stay_finite(form, dtype):
    x = example(4, 4, 300, size=200.0).to(dtype)
    x[:, :, 0], x[:, :, 1], x[0, :, 2] = 1e30, -1e30, -torch.inf
    x.requires_grad_()
    out = form(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    assert (out.sum(dim=1) - 1).abs().max() < 1e-5
    numbers = torch.tensor([sinkhorn_numbers(m.tolist()) for m in x.detach().double().permute(2, 0, 1)])
    torch.testing.assert_close(numbers.permute(1, 2, 0).to(dtype), out.detach(), rtol=0, atol=1e-4)


def test_tokens_do_not_touch():
    x = example(4, 4, 3)
    alone = sinkhorn(x[..., 1])
    x[..., 0] = torch.nan
    assert_close(sinkhorn(x)[..., 1], alone, 1e-15)
    assert sinkhorn(x)[..., 0].isnan().all()


def test_dtype_of_the_result():
    x = example(4, 4, 5)
    assert sinkhorn(x).dtype == torch.float64
    assert sinkhorn(x.float()).dtype == sinkhorn(x.bfloat16()).dtype == torch.float32
    half = x.bfloat16().requires_grad_()
    sinkhorn(half).square().sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_second_derivative():
    x = example(3, 3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sinkhorn(x, 3), x)


def test_compiled_agrees():
    x = example(4, 4, 5)
    assert_close(torch.compile(sinkhorn, backend="eager", fullgraph=True)(x), sinkhorn(x), 1e-14)
