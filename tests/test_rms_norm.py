"""RMSNorm's own way back against the plain formula, to second order."""

import pytest
import torch

from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.ops.rms_norm import naive_rms_norm, rms_norm

from .helpers import assert_close, assert_same_gradients, gradients

EPS = 1e-3


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 1, 7), (0, 4), (6,)], ids=str)
def test_value_and_gradients_to_second_order(shape, weighted):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind(0)
    leaves = {"x": x.requires_grad_(), "dy": dy.requires_grad_()}
    if weighted:
        leaves["weight"] = torch.randn(shape[-1:], generator=generator, dtype=torch.float64).requires_grad_()
    inputs = (leaves["x"], leaves.get("weight"))
    got, wanted = rms_norm(*inputs, EPS), naive_rms_norm(*inputs, EPS)
    assert_close(got, wanted, 1e-13)
    with torch.no_grad():
        assert torch.equal(rms_norm(*inputs, EPS), got)
    given = [t for t in inputs if t is not None]
    first = torch.autograd.grad(got, given, dy, create_graph=True)
    wanted_first = torch.autograd.grad(wanted, given, dy, create_graph=True)
    plain = torch.autograd.grad(rms_norm(*inputs, EPS), given, dy)  # the passes written out
    for a, b, c in zip(plain, first, wanted_first, strict=True):
        assert_close(a, c, 1e-12)
        assert_close(b, c, 1e-12)
    if x.numel():
        assert_same_gradients(gradients([*first], leaves), gradients([*wanted_first], leaves), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_as_torch(dtype):
    ours, theirs = RMSNorm(8).to(dtype), torch.nn.RMSNorm(8).to(dtype)
    ours.weight.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    for x in (torch.randn(3, 5, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype)):
        assert_close(ours(x), theirs(x), 1e-6)
