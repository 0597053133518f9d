"""Residual streams: what is added to the hyper-connections package, and its form for a few tokens."""

import pytest
import torch
from hyper_connections import ManifoldConstrainedHyperConnections
from hyper_connections.manifold_constrained_hyper_connections import sinkhorn_knopps
from torch import nn

from titans_pytorch.decoding.connection import STREAMS, AsModule, FewTokens, connection_step, sinkhorn_columns
from titans_pytorch.layers.residual_streams import HyperConnection, residual_streams

from .helpers import assert_close, assert_same_gradients, gradients, randomise

DIM = 6


def connection(**kwargs) -> HyperConnection:
    return randomise(HyperConnection(STREAMS, dim=DIM, layer_index=2, **kwargs).double(), scale=0.5)


def package_of(ours: HyperConnection) -> ManifoldConstrainedHyperConnections:
    package = ManifoldConstrainedHyperConnections(STREAMS, dim=DIM, layer_index=2).double()
    package.load_state_dict(ours.state_dict())
    return package


def example(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1)], ids=str)
def test_float64_is_kept(shape, monkeypatch):
    """The package alone computes in float32; here it is made to compute in float64."""
    ours = connection()
    package = package_of(ours)
    b, n = shape
    x, out = example(STREAMS * b, n, DIM).requires_grad_(), example(b, n, DIM)

    def both(module):
        branch, add = module(x)
        after = add(out * branch)
        return [branch, after], gradients([branch, after], {"x": x, **dict(module.named_parameters())})

    single, _ = both(package)
    to_float = torch.Tensor.float
    (got, got_gradients) = both(ours)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))
    wanted, wanted_gradients = both(package)
    for mine, theirs, rough in zip(got, wanted, single, strict=True):
        assert_close(mine, theirs, 1e-14)
        assert (mine - rough).abs().max() > 1e-9
    assert_same_gradients(got_gradients, wanted_gradients, 1e-12)


def test_float64_can_be_differentiated_again():
    module = connection()
    x, out = example(STREAMS, 2, DIM).requires_grad_(), example(1, 2, DIM).requires_grad_()

    def run(x, out):
        branch, add = module(x)
        return add(out * branch)

    assert torch.autograd.gradgradcheck(run, (x, out))


def test_start_and_sum_of_streams():
    """At first every stream is the input; the sum of streams comes back."""
    make, expand, reduce = residual_streams(STREAMS, DIM)
    x = example(2, 3, DIM, dtype=torch.float32)
    assert torch.equal(expand(x), x.repeat_interleave(STREAMS, dim=0))
    assert_close(reduce(expand(x)), STREAMS * x, 1e-6)
    assert isinstance(make(layer_index=0), HyperConnection)


def test_one_stream_is_a_plain_residual():
    make, expand, reduce = residual_streams(1, DIM)
    module, x = make(layer_index=1), example(2, 3, DIM)
    branch, add = module(expand(x))
    assert torch.equal(branch, x)
    assert torch.equal(reduce(add(x * 2)), x * 3)
    assert not list(nn.ModuleList([module, expand, reduce]).parameters())
    assert isinstance(connection_step(module), AsModule)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_few_tokens_are_like_many(batch, adds):
    module = connection(add_branch_out_to_residual=adds)
    x, out = example(STREAMS * batch, 1, DIM), example(batch, 1, DIM)
    x[0] = 0.0
    with torch.no_grad():
        branch, add = module(x)
        few = connection_step(module)
        assert isinstance(few, FewTokens)
        got, read = few.read(x)
        assert_close(got, branch, 1e-13)
        if adds:
            assert_close(few.write(read, out), add(out), 1e-13)


@pytest.mark.parametrize("size", [0.01, 1.0, 5.0, 40.0])
def test_sinkhorn_in_plain_numbers(size, monkeypatch):
    logits = example(20, STREAMS, STREAMS) * size
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wanted = sinkhorn_knopps(logits)
    got = torch.tensor([sinkhorn_columns(x.tolist()) for x in logits], dtype=torch.float64).transpose(1, 2)
    if size < 40.0:
        assert_close(got, wanted, 1e-13)
    assert got.isfinite().all()
    assert_close(got.sum(dim=2), torch.ones(20, STREAMS, dtype=torch.float64), 1e-12)


def test_rows_do_not_touch():
    module = connection()
    x, out = example(3 * STREAMS, 2, DIM), example(3, 2, DIM)

    def middle(x):
        branch, add = module(x)
        return branch[1], add(out)[STREAMS : 2 * STREAMS]

    wanted, broken = middle(x), x.clone()
    broken[:STREAMS], broken[2 * STREAMS :] = torch.nan, 0.0
    for got, one in zip(middle(broken), wanted, strict=True):
        assert_close(got, one, 1e-14)


def test_zero_streams_have_finite_gradients():
    module = HyperConnection(STREAMS, dim=DIM, layer_index=0)
    x = torch.zeros(STREAMS, 2, DIM, requires_grad=True)
    branch, add = module(x)
    add(branch).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_agrees(dtype):
    module = connection().to(dtype)

    def run(x, out):
        branch, add = module(x)
        return add(out * branch)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for n in (3, 7):
        x, out = example(STREAMS, n, DIM, dtype=dtype), example(1, n, DIM, dtype=dtype)
        assert_close(compiled(x, out), run(x, out), 1e-6 if dtype == torch.float32 else 1e-13)


def test_precisions():
    """Coefficients in float32 or more; streams keep their dtype, under autocast too."""
    x, out = example(2 * STREAMS, 9, DIM), example(2, 9, DIM)
    module = connection()
    wanted = module(x)[1](out)
    module.float()
    full = module(x.float())[1](out.float())
    assert full.dtype == torch.float32
    assert_close(full, wanted, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch, add = module(x.float())
        assert branch.dtype == torch.float32
        assert torch.equal(add(out.float()), full)
        assert add(out.bfloat16()).dtype == torch.float32
    module.bfloat16()
    branch, add = module(x.bfloat16())
    assert branch.dtype == add(out.bfloat16()).dtype == torch.bfloat16
    assert_close(add(out.bfloat16()), wanted, 0.05)
