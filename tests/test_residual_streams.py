"""Residual streams against the hyper-connections package, whose parameters they share, and their steps' ways back."""

import pytest
import torch
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import nn

from titans_pytorch.layers.residual_streams import FEW, HyperConnection, residual_streams
from titans_pytorch.ops import streams

from .helpers import assert_close, assert_same_gradients, gradients, randomise

DIM = 6


def package_streams(num_streams, dim):
    return mc_get_init_and_expand_reduce_stream_functions(
        num_streams, dim=dim, add_stream_embed=True, disable=num_streams == 1
    )


class Branches(nn.Module):
    """Three branches on the streams; the second one's output multiplies the third one's input."""

    def __init__(self, make, num_streams):
        super().__init__()
        connection, self.expand, self.reduce = make(num_streams, DIM)
        self.first, self.third = connection(layer_index=1), connection(layer_index=6)
        self.second = connection(layer_index=2, add_branch_out_to_residual=False)
        self.maps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        x = self.expand(x)
        branch, add = self.first(x)
        x = add(self.maps[0](branch).tanh())
        gate = self.maps[1](self.second(x)[0]).tanh()
        branch, add = self.third(x)
        x = add(self.maps[2](branch * gate).tanh())
        return self.reduce(x)


def pair(num_streams, dtype=torch.float64):
    """Ours and the package's, with the same random parameters."""
    package, ours = Branches(package_streams, num_streams), Branches(residual_streams, num_streams)
    randomise(package.to(dtype), scale=0.5)
    ours.to(dtype).load_state_dict(package.state_dict())
    return ours, package


def example(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_streams", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 1), (1, 17)], ids=str)
def test_agrees_with_the_package(num_streams, shape, monkeypatch):
    # the package computes in float32, whatever it is given; here it stays in float64
    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))
    ours, package = pair(num_streams)
    x = example(*shape, DIM).requires_grad_()
    got, wanted = ours(x), package(x)
    assert_close(got, wanted, 1e-12)
    got, wanted = (
        gradients([out], {"x": x, **dict(m.named_parameters())}) for out, m in ((got, ours), (wanted, package))
    )
    assert_same_gradients(got, wanted, 1e-9)
    with torch.no_grad():
        assert_close(ours(x), package(x), 1e-12)


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_start_values_are_the_packages(num_streams):
    ours, package = Branches(residual_streams, num_streams), Branches(package_streams, num_streams)
    for name in ("first", "second", "third", "expand", "reduce"):
        got, wanted = (getattr(m, name).state_dict() for m in (ours, package))
        assert list(got) == list(wanted)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("batch", [1, FEW, FEW + 1])
def test_few_tokens_are_like_many(batch):
    """Without gradients a few tokens take another way."""
    connection = randomise(HyperConnection(4, DIM, layer_index=2).double(), scale=0.5)
    x, out = example(batch, 1, 4, DIM), example(batch, 1, DIM)
    branch, add = connection(x)
    wanted = branch, add(out)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            branch, add = connection(x)
            for got, one in zip((branch, add(out)), wanted, strict=True):
                assert_close(got, one, 1e-13)
            x[0] = 0.0
            assert connection(x)[0].isfinite().all()
        x = example(batch, 1, 4, DIM)


def test_rows_do_not_touch():
    connection = randomise(HyperConnection(4, DIM, layer_index=0).double(), scale=0.5)
    x, out = example(3, 2, 4, DIM), example(3, 2, DIM)

    def both(x):
        branch, add = connection(x)
        return branch[1], add(out)[1]

    wanted, broken = both(x), x.clone()
    broken[0], broken[2] = torch.nan, 0.0
    for got, one in zip(both(broken), wanted, strict=True):
        assert_close(got, one, 1e-14)


def test_zero_streams_have_finite_gradients():
    connection = HyperConnection(4, DIM, layer_index=0)
    x = torch.zeros(1, 2, 4, DIM, requires_grad=True)
    branch, add = connection(x)
    add(branch).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in connection.parameters())


STEPS = {
    "project": (streams.project, streams.naive_project, [(5, 4, 3), (6, 3)]),
    "read": (streams.read, streams.naive_read, [(5, 4, 3), (5, 4)]),
    "write": (streams.write, streams.naive_write, [(5, 4, 3), (5, 4, 4), (5, 4), (5, 3)]),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_agree_with_their_definition(name):
    step, naive, shapes = STEPS[name]
    inputs = {str(i): example(*shape).add(0.1 * i).requires_grad_() for i, shape in enumerate(shapes)}
    got, wanted = step(*inputs.values()), naive(*inputs.values())
    if name != "write":  # x comes along, and its gradient joins the step's own
        got, wanted = (got[0], got[1] * 1.0), (wanted, inputs["0"] * 1.0)
        assert torch.equal(got[1], inputs["0"])
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert_close(got[0], wanted[0], 1e-13)
    assert_same_gradients(gradients(list(got), inputs), gradients(list(wanted), inputs), 1e-12)
    assert torch.autograd.gradgradcheck(step, tuple(inputs.values()))


def test_gradients_can_be_taken_twice():
    """Buffers of the way back are not the caller's."""
    connection = randomise(HyperConnection(4, DIM, layer_index=0).double(), scale=0.5)
    x, out, up = example(2, 3, 4, DIM).requires_grad_(), example(2, 3, DIM), example(2, 3, 4, DIM).cos()
    branch, add = connection(x)
    after, kept = add(out + branch), up.clone()
    first = torch.autograd.grad(after, x, up, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(after, x, up)[0], first)
    assert torch.equal(up, kept)


def test_compiled_agrees():
    connection = randomise(HyperConnection(4, DIM, layer_index=2).double(), scale=0.5)

    def run(x, out):
        branch, add = connection(x)
        return add(out * branch)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for n in (3, 7):
        x, out = example(1, n, 4, DIM), example(1, n, DIM)
        assert_close(compiled(x, out), run(x, out), 1e-13)
        with torch.no_grad():
            assert_close(compiled(x, out), run(x, out), 1e-13)


def test_precisions():
    """Coefficients in float32 or more; streams keep their dtype, under autocast too."""
    x, out = example(2, 9, 4, DIM), example(2, 9, DIM)
    connection = randomise(HyperConnection(4, DIM, layer_index=0), scale=0.5)
    wanted = connection.double()(x)[1](out)
    connection.float()
    full = connection(x.float())[1](out.float())
    assert full.dtype == torch.float32
    assert_close(full, wanted, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch, add = connection(x.float())
        assert branch.dtype == torch.float32
        assert torch.equal(add(out.float()), full)
        assert add(out.bfloat16()).dtype == torch.float32
    connection.bfloat16()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            branch, add = connection(x.bfloat16())
            assert branch.dtype == add(out.bfloat16()).dtype == torch.bfloat16
            assert_close(add(out.bfloat16()), wanted, 0.05)
            few = connection(x[:1, :1].bfloat16())[1](out[:1, :1].bfloat16())
            assert few.dtype == torch.bfloat16
            assert_close(few, wanted[:1, :1], 0.05)
