"""Momentum and decay as matrices, against the recurrences they stand for; values and gradients in float64."""

import pytest
import torch

from titans_pytorch.ops.coefficients import (
    Transition,
    blended_products,
    coefficients,
    cumulative_products,
    naive_blended_products,
    naive_cumulative_products,
)
from titans_pytorch.ops.positions import mini_batches

from .helpers import assert_close, assert_same_gradients, gradients

ROWS, WIDTH = 2, 3


def near(value, shape, generator):
    """Gates that stand at `value`, or everywhere in (0, 1), with a few of the others among them."""
    gates = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    if value == "mixed":
        picks = torch.randint(0, 4, shape, generator=generator)
        gates = torch.where(picks == 0, 0.0, torch.where(picks == 1, 1.0, gates))
    elif value is not None:
        gates = torch.where(torch.rand(shape, generator=generator) > 0.2, value, gates)
    return gates


GATES = {"inside": None, "mixed": "mixed", "0": 0.0, "1": 1.0, "1e-40": 1e-40, "1e-12": 1e-12, "1-1e-12": 1 - 1e-12}
each_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def recurrence(keep, momentum, combine, surprise, memory, carried):
    """Word for word: (memories [B m+1 d], last momenta [o B d])."""
    order = 0 if momentum is None else momentum.shape[-1]
    states, memories = list(carried), [memory]
    for i in range(keep.shape[1]):
        outs = [surprise[:, i]]
        for k in range(order):
            states[k] = momentum[:, i, k, None] * states[k] + outs[-1]
            outs.append(states[k])
        if combine is None:
            update = outs[-1]
        else:
            members = outs if combine.shape[-1] == order + 1 else outs[1:]
            update = sum(combine[:, i, k, None] * member for k, member in enumerate(members))
        memories.append(keep[:, i, None] * memories[-1] + update)
    return torch.stack(memories, 1), states


def example(m, order, combined, gate, dtype=torch.float64):
    generator = torch.Generator().manual_seed(m + 10 * order)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = {"keep": near(gate, (ROWS, m), generator), "surprise": leaf(ROWS, m, WIDTH), "memory": leaf(ROWS, WIDTH)}
    if order:
        leaves["momentum"] = near(gate, (ROWS, m, order), generator)
        leaves |= {f"carried{k}": leaf(ROWS, WIDTH) for k in range(order)}
        if combined is not None:
            leaves["combine"] = leaf(ROWS, m, order + combined).softmax(dim=-1)
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}


def by_coefficients(leaves, order):
    """What the recurrence gives, from the coefficients alone."""
    c = coefficients(leaves["keep"], leaves.get("momentum"), leaves.get("combine"))
    surprise, memory, carried = leaves["surprise"], leaves["memory"], [leaves[f"carried{k}"] for k in range(order)]
    built = c.memory_start.unsqueeze(-1) * memory.unsqueeze(1) + c.memory_surprise @ surprise
    for to_memory, state in zip(c.memory_carry, carried, strict=True):
        built = built + to_memory.unsqueeze(-1) * state.unsqueeze(1)
    last = []
    for to_last, of_surprise in zip(c.momentum_carry, c.momentum_surprise, strict=True):
        own = torch.einsum("bm, bmd -> bd", of_surprise, surprise)
        last.append(own + sum(w.unsqueeze(-1) * state for w, state in zip(to_last, carried, strict=False)))
    return built, last


@each_gate
@pytest.mark.parametrize(
    ("order", "combined"), [(0, None), (1, None), (1, 1), (2, None), (2, 0), (2, 1), (3, None), (3, 0), (3, 1)]
)
@pytest.mark.parametrize("m", [1, 2, 7])
def test_agree_with_the_recurrence(m, order, combined, gate):
    leaves = example(m, order, combined, gate)
    carried = [leaves[f"carried{k}"] for k in range(order)]
    args = (leaves.get(k) for k in ("keep", "momentum", "combine", "surprise", "memory"))
    wanted_memory, wanted_last = recurrence(*args, carried)
    built, last = by_coefficients(leaves, order)
    assert_close(built, wanted_memory, 1e-12, "memory")
    for k in range(order):
        assert_close(last[k], wanted_last[k], 1e-12, f"momentum {k}")
    wanted = gradients([wanted_memory, *wanted_last], leaves)
    assert_same_gradients(gradients([built, *last], leaves), wanted, 1e-10)


@each_gate
@pytest.mark.parametrize("m", [1, 2, 9])
def test_products(m, gate):
    gates = near(gate, (2, 3, m), torch.Generator().manual_seed(m)).requires_grad_()
    got, wanted = cumulative_products(gates), naive_cumulative_products(gates)
    assert_close(got, wanted, 1e-12)
    assert_same_gradients(gradients([got], {"gates": gates}), gradients([wanted], {"gates": gates}), 1e-10)


def test_products_by_hand():
    got = cumulative_products(torch.tensor([2.0, 0.0, 5.0], dtype=torch.float64))
    wanted = torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 5, 1]], dtype=torch.float64)
    assert_close(got, wanted, 1e-13)


@each_gate
def test_finite_in_float32(gate):
    """Long windows of shut gates underflow to nothing, never to inf or nan; slopes included."""
    leaves = example(64, 2, 1, gate, torch.float32)
    built, last = by_coefficients(leaves, 2)
    for out in (built, *last):
        assert out.isfinite().all()
    for name, grad in gradients([built, *last], leaves).items():
        assert grad.isfinite().all(), name
    exact = {name: leaf.detach().double() for name, leaf in leaves.items()}
    assert_close(built, by_coefficients(exact, 2)[0], 1e-5)


@pytest.mark.parametrize("first", [0, 1, 2, 5])
@pytest.mark.parametrize("mini_batch", [1, 2, 3, 9])
@each_gate
def test_products_with_a_transition(gate, mini_batch, first):
    m = 7
    gates = near(gate, (ROWS, m), torch.Generator().manual_seed(m)).requires_grad_()
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    transition = Transition(share, *mini_batches(first, m, mini_batch, torch.device("cpu")))
    got, wanted = blended_products(gates, transition), naive_blended_products(gates, transition)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-12)
    leaves = {"gates": gates, "share": share}
    assert_same_gradients(gradients([*got], leaves), gradients([*wanted], leaves), 1e-10)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize(("order", "combined"), [(0, None), (1, None), (2, 1)])
def test_texts_begin(order, combined, share):
    """Each from the initial memory, as if it stood alone."""
    m, start = 9, torch.tensor([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0, 1, 0]]).bool()
    leaves = example(m, order, combined, None)
    initial = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    active = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0, 0, 1]]).bool()
    transition = None
    if share is not None:
        transition = Transition(torch.tensor(share, dtype=torch.float64), *mini_batches(0, m, 1, torch.device("cpu")))
    c = coefficients(leaves["keep"], leaves.get("momentum"), leaves.get("combine"), active, transition, start)
    memory, carried = leaves["memory"], [leaves[f"carried{k}"] for k in range(order)]
    built = c.memory_start.unsqueeze(-1) * memory.unsqueeze(1) + c.memory_surprise @ leaves["surprise"]
    built = built + c.memory_initial.unsqueeze(-1) * initial.unsqueeze(1)
    if share is not None:
        built = built + c.memory_anchor.unsqueeze(-1) * memory.unsqueeze(1)
    for to_memory, state in zip(c.memory_carry, carried, strict=True):
        built = built + to_memory.unsqueeze(-1) * state.unsqueeze(1)
    for row in range(ROWS):
        entry, states = memory[row : row + 1], [state[row : row + 1] for state in carried]
        for i in range(m):
            if start[row, i]:
                entry, states = initial[row : row + 1], [torch.zeros_like(state) for state in states]
            if active[row, i]:
                rates = (leaves.get(k) for k in ("keep", "momentum", "combine", "surprise"))
                one = [x if x is None else x[row : row + 1, i : i + 1] for x in rates]
                entries, states = recurrence(*one, entry, states)
                entry = entries[:, 1] if share is None else torch.lerp(entry, entries[:, 1], share)
            assert_close(built[row, i + 1], entry[0], 1e-12, f"row {row}, entry {i + 1}")
