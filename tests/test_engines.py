"""Which engine runs, what it builds, and the operations that only the fast ones have."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pytorch import MemoryAsContextTransformer, MemoryMLP, NeuralMemory
from titans_pytorch.engines import plan as costs
from titans_pytorch.engines.weight_paths import BuiltPath, DualPath
from titans_pytorch.engines.written import Written
from titans_pytorch.ops.causal_product import causal_product, naive_causal_product

from .helpers import ForeignModel, GhostModel, assert_close, assert_same_tensors, randomise


def run_of(memory, seq):
    """The windows that a call wrote."""
    runs = []
    read = Written.read

    def spy(self, *args):
        runs.append(self)
        return read(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Written, "read", spy)
        memory(seq)
    return runs[0]


def kinds(memory, seq, name="model.weights.0"):
    return [type(window.paths[name]) for window in run_of(memory, seq).windows]


def test_engine_is_chosen():
    seq = torch.randn(2, 64, 8)
    assert kinds(NeuralMemory(8, 1, batch_size=16), seq) == [DualPath] * 4
    assert kinds(NeuralMemory(8, 64), seq) == [BuiltPath]
    assert kinds(NeuralMemory(8, 64, engine="dual"), seq) == [DualPath]
    assert set(kinds(NeuralMemory(8, 1, engine="matrix"), seq)) == {BuiltPath}
    assert set(kinds(NeuralMemory(8, 1, spectral_norm_surprises=True), seq)) == {BuiltPath}
    for model, wanted in (
        (ForeignModel(8), "SequentialEngine"),
        (GhostModel(8), "ChunkwiseEngine"),
        (None, "ChunkwiseEngine"),
    ):
        assert type(NeuralMemory(8, model=model).engine).__name__ == wanted
    assert type(NeuralMemory(8, engine="reference").engine).__name__ == "SequentialEngine"


def test_plan_counts_operations():
    wide, narrow = [(384, 1536), (1536, 384)], [(64, 256), (256, 64)]
    assert costs.plan(narrow, rows=16, chunks=32, pairs=4, form="auto").dual
    assert costs.plan(narrow, rows=16, chunks=64, pairs=1, form="auto").dual
    assert not costs.plan(narrow, rows=16, chunks=4, pairs=256, form="auto").dual
    assert costs.plan(wide, rows=2, chunks=16, pairs=64, form="auto") == costs.Plan(16, dual=True)
    assert not costs.plan(wide, rows=1, chunks=16, pairs=512, form="auto").dual
    assert costs.plan(narrow, rows=1, chunks=1, pairs=4, form="auto") == costs.Plan(1, dual=False)
    # half of a 128-token window of attention, the start, and three carried products for half of the windows
    assert costs.dual_cost(2, 3, 128, 0.5) == pytest.approx(costs.DUAL * (6 + 96 * 5 + 9))
    assert costs.matrix_cost(2, 3, 8, 4) == 6 * (2 + (8 + costs.BUILT) / 4)


@pytest.mark.parametrize(
    ("groups", "r", "m", "p"), [(5, 3, 4, 2), (40, 4, 39, 3), (1, 7, 3, 1), (3, 1, 1, 5), (70, 1, 70, 1)]
)
@pytest.mark.parametrize("first", [None, 0, 1])
def test_causal_product(groups, r, m, p, first):
    torch.manual_seed(0)
    x, keys, values = torch.randn(2, groups * r, 5), torch.randn(2, m, p, 5), torch.randn(2, m, p, 3)
    weights = torch.randn(2, groups, m)
    if first is not None:
        seen = torch.arange(m) < first + torch.arange(groups)[:, None]
        weights = weights * seen
    inputs = [t.double().requires_grad_() for t in (x, keys, values, weights)]
    got, wanted = causal_product(*inputs, first), naive_causal_product(*inputs)
    assert_close(got, wanted, 1e-12)
    up = torch.randn_like(wanted).requires_grad_()
    grads = torch.autograd.grad(got, inputs, up, create_graph=True)
    naive = torch.autograd.grad(wanted, inputs, up, create_graph=True)
    for name, a, b in zip(("x", "keys", "values", "weights"), grads, naive, strict=True):
        if name == "weights" and first is not None:  # of what is never seen nobody asks
            a, b = a * seen, b * seen
        assert_close(a, b, 1e-12, name)
    once = torch.autograd.grad(got, inputs[:3], up.detach())
    assert_same_tensors(dict(enumerate(once)), dict(enumerate(naive[:3])), 1e-12)
    second = torch.autograd.grad(grads[0].square().sum(), inputs[1], retain_graph=True)
    assert_close(second[0], torch.autograd.grad(naive[0].square().sum(), inputs[1])[0], 1e-12, "second order")


def test_weight_residual_does_not_build(monkeypatch):
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(
        num_tokens=16,
        dim=16,
        depth=2,
        segment_len=8,
        heads=2,
        dim_head=8,
        neural_memory_segment_len=4,
        neural_memory_batch_size=16,
        neural_mem_weight_residual=True,
        neural_memory_model=MemoryMLP(16, depth=2),
    )
    ids = torch.randint(0, 16, (2, 40))
    wanted = model(ids, return_loss=True)

    def built(self):
        raise AssertionError("updates were built")

    monkeypatch.setattr(Written, "entries", lambda self, *args: built(self))
    loss = model(ids, return_loss=True)
    loss.backward()
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("engine", ["dual", "matrix", "auto"])
@pytest.mark.parametrize("bias", [-40.0, 40.0, 800.0])
def test_saturated_gates(engine, bias):
    """Gates of 0 and 1 to the last bit, momentum and decay alike: values and gradients as the reference's."""
    seq = torch.randn(2, 24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("reference", engine):
        torch.manual_seed(0)
        memory = NeuralMemory(
            6, 2, init_decay_bias=bias, init_momentum_bias=-bias, default_step_transform_max_lr=0.1, engine=name
        ).double()
        out, state = memory(seq)
        (out.sum() + sum(v.sum() for v in state.states[0].values())).backward()
        results.append((out, {k: p.grad for k, p in memory.named_parameters()}))
    (wanted, grads), (got, own) = results
    assert wanted.isfinite().all()
    assert_close(got, wanted, 1e-9)
    for name in grads:
        error = (own[name] - grads[name]).abs().max()
        assert error <= 1e-9 * max(1.0, grads[name].abs().max().item()), name


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_token_costs_the_same_however_many_came_before():
    torch.manual_seed(0)
    memory = randomise(NeuralMemory(8, 4, batch_size=16, heads=2, dim_head=4, qk_rmsnorm=True))
    state, counts = None, []
    with torch.no_grad():
        for position in range(16 * 8):
            with CountOps() as ops:
                _, state = memory(torch.randn(1, 8), state=state)
            if position >= 16:
                counts.append(ops.count)
    period = counts[:16]
    assert counts == period * 7
    assert max(period) < 600
    assert sorted(period)[8] < 120  # most tokens complete no chunk
