"""The exact rule of a matrix: its equations token by token, its bound, and what asks for it wrongly."""

import pytest
import torch
import torch.nn.functional as F

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.analysis.overshoot import overshoot_note, watch_gains
from titans_pytorch.memory.presets import exact_memory_kwargs

from .helpers import assert_close, assert_same_gradients, gradients, randomise, refusal
from .random_models import STREAMS, stream

DIM = 8


def built(**changes):
    torch.manual_seed(0)
    return randomise(NeuralMemory.exact(DIM, **changes).double(), scale=0.3)


def equations(memory, seq):
    """The delta rule with a forget gate, one row: seq [n d] -> [n d]."""
    p = {name.removeprefix("projections."): p for name, p in memory.named_parameters()}
    normed = {k: F.rms_norm(seq, (DIM,), p[f"{k}_norm.weight"]) for k in ("store", "retrieve")}

    def convolved(name, of):
        padded = F.pad(normed[of] @ p[f"to_{name}.weight"].T, (0, 0, 3, 0))
        kernel = p[f"{name}_conv.weight"].T.unsqueeze(1)
        return F.silu(F.conv1d(padded.T.unsqueeze(0), kernel, groups=DIM)[0].T)

    q, k = F.normalize(convolved("queries", "retrieve"), dim=-1), F.normalize(convolved("keys", "store"), dim=-1)
    v = convolved("values", "store")

    def rate(name):
        return (normed["store"] @ p[f"rates.{name}.weight"].T + p[f"rates.{name}.bias"]).sigmoid()

    alpha, c, weight, reads = rate("to_decay_factor"), rate("to_adaptive_step"), p["memory_model_parameters.0"][0], []
    for t in range(len(seq)):
        weight = (1 - alpha[t]) * weight + c[t] * torch.outer(k[t], v[t] - k[t] @ weight)
        reads.append(q[t] @ weight)
    gate = F.silu(normed["retrieve"] @ p["retrieve_gate.weight"].T)
    return (
        F.rms_norm(torch.stack(reads), (DIM,))
        * (p["multihead_rmsnorm.gamma"][0] + 1)
        * gate
        @ p["combine_heads.weight"].T
    )


@pytest.mark.parametrize("engine", ["auto", "solve", "dual", "matrix", "sequential"])
def test_agrees_with_the_equations(engine):
    memory = built(engine=engine)
    seq = torch.randn(70, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    leaves = dict(memory.named_parameters()) | {"seq": seq}
    got, wanted = memory(seq.unsqueeze(0))[0][0], equations(memory, seq)
    assert_close(got, wanted, 1e-11)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-9)


@pytest.mark.parametrize("changes", [{}, {"num_kv_per_token": 3}, {"heads": 2, "dim_head": 4}, {"max_step": 0.25}])
@pytest.mark.parametrize("kind", STREAMS)
def test_steps_never_overshoot(kind, changes):
    """Whatever the parameters, however large the steps that they learn: a token writes at most its error."""
    memory = randomise(NeuralMemory.exact(DIM, **changes).double(), seed=len(kind), scale=2.0)
    with torch.no_grad():
        memory.rates.to_adaptive_step.bias.fill_(40.0)
        memory.rates.to_decay_factor.bias.zero_()
        with watch_gains(memory) as gains:
            memory(stream(kind, 300, 0, DIM).double())
    largest = changes.get("max_step", 1.0)
    assert 0.3 * largest < gains[""] <= largest * (1 + 1e-9)
    assert overshoot_note(gains) is None


def growth(memory, kind, tokens, piece=16_384):
    """The largest output and fast weight of a stream read in pieces."""
    state, largest = None, 0.0
    with torch.no_grad():
        for at in range(0, tokens, piece):
            out, state = memory(stream(kind, piece, at, DIM), state=state)
            state = state._replace(updates=None)
            assert out.isfinite().all(), f"by token {at + piece}"
            largest = max(largest, state.states[0]["weights.0"].abs().max().item())
    return largest


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("decay", [-5.0, -100.0])
@pytest.mark.parametrize("tokens", [32_768, pytest.param(2**20, marks=pytest.mark.slow)])
def test_finite_over_a_long_stream(kind, decay, tokens):
    """With the largest step and no forgetting at all too; in float32."""
    torch.manual_seed(0)
    memory = NeuralMemory.exact(DIM)
    with torch.no_grad():
        memory.rates.to_adaptive_step.bias.fill_(40.0 if decay < -50 else -2.0)
        memory.rates.to_decay_factor.bias.fill_(decay)
    assert growth(memory, kind, tokens) < 100


def test_keywords():
    kwargs = exact_memory_kwargs(8, max_step=0.5, num_kv_per_token=2, qkv_conv_kernel=None)
    assert (kwargs["default_step_transform_max_lr"], kwargs["batch_size"], kwargs["chunk_size"]) == (1.0, 1, 1)
    assert NeuralMemory.exact(8, qkv_conv_kernel=None).projections.queries_conv is None
    assert NeuralMemory.exact(8, dim_head=4, heads=2).engine.unsolved == ""
    for name, bad in (("dim_head", {"dim_head": 0}), ("max_step", {"max_step": 1.5}), ("max_step", {"max_step": 0})):
        with pytest.raises(ValueError, match=refusal(name)):
            NeuralMemory.exact(8, **bad)
    with pytest.raises(ValueError, match=refusal("num_kv_per_token")):
        NeuralMemory.exact(8, num_kv_per_token=0)


BARE = {"mem_model_norm_add_residual": False, "model": MemoryMLP(DIM, 1)}
REFUSED = [
    ({"model": MemoryMLP(DIM, 1)}, "needs a memory network of one matrix: MemoryMLP of depth 1, with mem_model_norm"),
    ({"mem_model_norm_add_residual": False}, "needs a memory network of one matrix"),
    (BARE | {"store_memory_loss_fn": F.mse_loss}, "cannot be combined with store_memory_loss_fn"),
    (BARE | {"max_grad_norm": 1.0}, "cannot be combined with max_grad_norm"),
    (BARE | {"spectral_norm_surprises": True}, "cannot be combined with spectral_norm_surprises"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_asked_for_by_name(options, message):
    with pytest.raises(ValueError, match=f'engine="solve" {message}'):
        NeuralMemory(DIM, batch_size=1, engine="solve", **options)
