"""The solve form: its pure functions beside their twins, its bounds, what it refuses, and what it falls back from."""

import pytest
import torch

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.engines.chunkwise import ChunkwiseEngine
from titans_pytorch.ops.exact_errors import exact_errors, naive_exact_errors

from .helpers import assert_close, assert_same_gradients, gradients, randomise
from .test_engines import run_of

D = 8


def problem(m, p, e=3):
    generator = torch.Generator().manual_seed(m + p)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {"keys": leaf(2, m, p, 4), "errors": leaf(2, m, p, e), "steps": leaf(2, m, p), "weights": leaf(2, m, m)}


@pytest.mark.parametrize(("m", "p"), [(1, 1), (1, 3), (7, 1), (5, 3)])
def test_one_solve_is_the_loop(m, p):
    leaves = problem(m, p)
    got, wanted = (
        f(**leaves | {"weights": leaves["weights"].tril(-1) * 0.3}) for f in (exact_errors, naive_exact_errors)
    )
    assert_close(got, wanted, 1e-11)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-10)
    assert torch.autograd.gradgradcheck(lambda *x: exact_errors(*x[:3], x[3].tril(-1)), [*problem(3, 2).values()])


def exact(engine="auto", dtype=torch.float64, **changes):
    """One matrix, unit keys, one token a mini-batch, steps up to the whole error."""
    torch.manual_seed(0)
    options = {"qk_l2norm": True, "mem_model_norm_add_residual": False, "default_step_transform_max_lr": D / 2}
    options |= {"batch_size": 1, "model": MemoryMLP(D, 1), "init_decay_bias": -4.0} | changes
    return randomise(NeuralMemory(D, engine=engine, **options).to(dtype), scale=0.1)


def stream(n, seed=1, dtype=torch.float64):
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learned(memory, seq):
    seq = seq.clone().requires_grad_()
    out, state = memory(seq)
    return out, gradients([out, *state.states[0].values()], dict(memory.named_parameters()) | {"seq": seq})


@pytest.mark.parametrize(("momentum", "decay"), [(False, -100.0), (True, -4.0)])
def test_one_key_4096_times(momentum, decay):
    """Where keys repeat all entries of the system are alike. Values and gradients keep their precision."""
    changes = {"momentum": momentum, "init_decay_bias": decay, "init_momentum_bias": -3.0 if momentum else None}
    seq = stream(1)[:1].expand(-1, 4096, -1)
    wanted, wanted_grads = learned(exact(**changes), seq)
    out, grads = learned(exact(dtype=torch.float32, **changes), seq.float())
    assert_close(out, wanted, 1e-4, "values")
    assert_same_gradients({k: v.double() for k, v in grads.items()}, wanted_grads, 1e-3)
    got, looped = (learned(exact(engine, **changes), seq[:, :300]) for engine in ("auto", "dual"))
    assert_close(got[0], looped[0], 1e-12, "values beside the loop")
    assert_same_gradients(got[1], looped[1], 1e-11)


def windows_of(memory, seq):
    return [(window.chunks, window.solved) for window in run_of(memory, seq).windows]


def test_windows():
    """Of 64 tokens, however short the mini-batches; a token alone, and long mini-batches, are written as ever."""
    assert windows_of(exact(), stream(150)) == [(64, True), (64, True), (22, True)]
    assert windows_of(exact(batch_size=3), stream(70)) == [(63, True), (7, True)]
    assert windows_of(exact(chunk_size=8, batch_size=16), stream(150)) == [(8, True), (8, True), (2, True)]
    assert windows_of(exact(), stream(1)) == [(1, False)]
    assert windows_of(exact(batch_size=64), stream(128)) == [(64, False)] * 2
    assert windows_of(exact("solve", batch_size=64), stream(128)) == [(64, True)] * 2
    assert windows_of(exact("dual"), stream(3)) == [(1, False)] * 3
    assert windows_of(exact("solve", surprise_threshold=0.1), stream(3)) == [(1, False)] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"engine": "dual"}, 'engine="dual"'),
        ({"surprise_threshold": 0.1}, "surprise_threshold"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"spectral_norm_surprises": True}, "spectral_norm_surprises"),
        ({"store_memory_loss_fn": lambda a, b: (a - b).abs().sum(-1)}, "store_memory_loss_fn"),
        ({"mem_model_norm_add_residual": True}, "the memory network is not one matrix"),
        ({"model": MemoryMLP(D, 2)}, "the memory network is not one matrix"),
        ({"batch_size": 64}, "mini-batches are long enough"),
    ],
)
def test_the_plan_says_why(monkeypatch, changes, reason):
    plans, plan = [], ChunkwiseEngine.plan
    monkeypatch.setattr(ChunkwiseEngine, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    exact(**changes)(stream(70))
    assert plans[0].unsolved.startswith(reason)
    assert plans[0].solve == (not reason)


def test_the_network_is_what_says_so():
    """A network of one matrix behind features of its own is solved; a subclass that computes anything else is not."""

    class Squares(MemoryMLP):
        """x and its squares, times one matrix."""

        matrix = "weights.0"

        def __init__(self):
            super().__init__(D, 1)
            self.weights[0] = torch.nn.Parameter(torch.randn(2 * D, D) * 0.1)

        def features(self, x):
            return torch.cat((x, x.square()), dim=-1)

        def with_vjp(self, x, weights):
            y, back = weights.matmul(self.features(x), "weights.0")
            own, squared = (slice(0, D), slice(D, 2 * D))
            return y, lambda dy: (lambda dx: dx[..., own] + 2 * x * dx[..., squared])(back(dy))

    class Sine(MemoryMLP):
        def with_vjp(self, x, weights):
            y, back = super().with_vjp(x, weights)
            return y.sin(), lambda dy: back(dy * y.cos())

    for model, solved in ((Squares(), True), (Sine(D, 1), False)):
        memory, slow = exact(model=model), exact("sequential", model=model)
        seq = stream(20)
        assert windows_of(memory, seq)[0][1] == solved
        assert_close(memory(seq)[0], slow(seq)[0], 1e-11)


def test_a_later_token_that_is_not_finite_leaves_earlier_entries_alone():
    memory, seq = exact(momentum=False), stream(30)
    wanted = memory(seq)[1].updates["weights.0"]
    bad = seq.clone()
    bad[:, 20:] = float("nan")
    assert_close(memory(bad)[1].updates["weights.0"][:, :21], wanted[:, :21], 1e-12)


def test_second_derivatives():
    """Forward over reverse, and autograd twice, through the solve."""
    memory = exact(momentum_order=2, gated_transition=True)
    x = stream(4)[:1]

    def loss(x):
        return memory(x)[0].square().sum()

    wanted = torch.func.hessian(loss)(x)
    assert windows_of(memory, x) == [(4, True)]
    assert_close(torch.autograd.functional.hessian(loss, x), wanted)
    slow = exact("sequential", momentum_order=2, gated_transition=True)
    assert_close(torch.autograd.functional.hessian(lambda x: slow(x)[0].square().sum(), x), wanted)
