"""Linear recurrences: every form against the recurrence word for word, values and gradients."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from titans_pytorch import AssocScan
from titans_pytorch.ops import scan as scans
from titans_pytorch.ops.scan import naive_scan, scan

from .helpers import assert_close, assert_same_gradients, gradients, message


def loop(gates, inputs, prev):
    return scans._LoopScan.apply(scans._align(gates, inputs), inputs, prev, False)


def doubling(gates, inputs, prev):
    return scans._doubling_scan(scans._align(gates, inputs), inputs, prev)


def accelerated(gates, inputs, prev):
    """Falls back where the kernel does not run, as on a CPU."""
    return scan(gates, inputs, prev, use_accelerated=True)


def module(gates, inputs, prev):
    return AssocScan()(gates, inputs, prev)


def accelerated_module(gates, inputs, prev):
    return AssocScan(use_accelerated=True)(gates, inputs, prev=prev)


FORMS = [loop, doubling, scan, accelerated, module, accelerated_module]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)

# gates [b n], with a singleton for each further dim, per feature of the first, and as large as the inputs
GATES = {"per step": (), "ones": (1, 1), "some": (3, 1), "all": (3, 4)}


def example(n, gate_dims, with_prev, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = {"gates": leaf(2, n, *gate_dims).sigmoid(), "inputs": leaf(2, n, 3, 4)}
    if with_prev:
        leaves["prev"] = leaf(2, 3, 4)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


@each_form
@pytest.mark.parametrize("with_prev", [False, True])
@pytest.mark.parametrize("gate_dims", GATES.values(), ids=GATES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 21])
def test_agrees_with_the_recurrence(form, n, gate_dims, with_prev):
    leaves = example(n, gate_dims, with_prev)
    args = (leaves["gates"], leaves["inputs"], leaves.get("prev"))
    wanted, got = naive_scan(*args), form(*args)
    assert_close(got, wanted, 1e-13, "values")
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-12)


@each_form
def test_by_hand(form):
    gates, inputs = torch.tensor([[0.5, 2.0, 0.0]]), torch.tensor([[1.0, 10.0, 3.0]])
    assert form(gates, inputs, None).tolist() == [[1.0, 12.0, 3.0]]
    assert form(gates, inputs, torch.tensor([4.0])).tolist() == [[3.0, 16.0, 3.0]]


@pytest.mark.parametrize("form", [naive_scan, scan, accelerated, module], ids=lambda form: form.__name__)
@pytest.mark.parametrize("with_prev", [False, True])
def test_no_steps(form, with_prev):
    prev = torch.zeros(2, 3) if with_prev else None
    assert form(torch.zeros(2, 0), torch.zeros(2, 0, 3), prev).shape == (2, 0, 3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from(FORMS))
def test_carrying_prev_is_the_same_as_one_run(n, cut, form):
    cut = min(cut, n)
    leaves = example(n, (3, 1), True, seed=n)
    gates, inputs, prev = leaves.values()
    whole = form(gates, inputs, prev)
    first = form(gates[:, :cut], inputs[:, :cut], prev) if cut else inputs[:, :0]
    between = first[:, -1] if cut else prev
    second = form(gates[:, cut:], inputs[:, cut:], between) if cut < n else inputs[:, :0]
    assert_close(torch.cat((first, second), dim=1), whole, 1e-12)


@each_form
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_shut_and_open_gates(form, gate):
    """A gate of 0 forgets all that came before, one of 1 sums it; the gate's own slope is what stood before it."""
    inputs = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 5, 1).requires_grad_()
    gates = torch.full((1, 5), gate, dtype=torch.float64, requires_grad=True)
    out = form(gates, inputs, None)
    wanted = [1, 3, 6, 10, 15] if gate else [1, 2, 3, 4, 5]
    assert out.flatten().tolist() == wanted
    (slope,) = torch.autograd.grad(out[0, 4], gates)
    assert slope.tolist() == ([[0, 1, 3, 6, 10]] if gate else [[0, 0, 0, 0, 4]])


def test_inputs_are_left_alone():
    leaves = {name: leaf.detach() for name, leaf in example(5, (3, 1), True).items()}
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    for form in FORMS:
        form(*leaves.values())
        for name, leaf in leaves.items():
            assert torch.equal(leaf, before[name]), f"{form.__name__} changed {name}"


@pytest.mark.parametrize(
    ("gates", "inputs", "prev", "named"),
    [
        ((2, 4), (2, 5, 3), None, "gates must be ..., got (2, 4)"),
        ((2, 5, 2), (2, 5, 3), None, "gates must be ..., got (2, 5, 2)"),
        ((2, 5, 3), (2, 5), None, "gates must be ..., got (2, 5, 3)"),
        ((2,), (2, 5), None, "gates must be ..., got (2,)"),
        ((2, 5), (2, 5, 3), (2, 1, 3), "prev must be ..., got (2, 1, 3)"),
        ((2, 5), (2, 5, 3), (3,), "prev must be ..., got (3,)"),
    ],
)
def test_what_does_not_fit_is_named(gates, inputs, prev, named):
    with pytest.raises(ValueError, match=message(named)):
        AssocScan()(torch.zeros(gates), torch.zeros(inputs), None if prev is None else torch.zeros(prev))


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("with_prev", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_slopes_of_slopes(n, with_prev, with_start):
    """Though no input is kept."""

    def form(gates, inputs, prev=None):
        return scans._LoopScan.apply(scans._align(gates, inputs), inputs, prev, with_start)

    leaves = tuple(example(n, (1, 1), with_prev).values())
    assert torch.autograd.gradcheck(form, leaves)
    assert torch.autograd.gradgradcheck(form, leaves)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("with_prev", [False, True])
def test_from_the_start_on(n, with_prev):
    """`with_start`: prev, or zeros, in front; several steps lie in one block of memory."""
    leaves = example(n, (1, 1), with_prev)
    got = scan(**leaves, with_start=True)
    prev = leaves.get("prev", torch.zeros(2, 3, 4, dtype=torch.float64))
    wanted = torch.cat((prev.unsqueeze(1), naive_scan(**leaves)), dim=1)
    assert_close(got, wanted, 1e-13)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-12)
    assert n == 1 or got[:, 1:3].transpose(0, 1).is_contiguous()
