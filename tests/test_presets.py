"""The paper's memory: its equations token by token, the engine that runs it, and how long it stays finite."""

import pytest
import torch
import torch.nn.functional as F

from titans_pytorch import NeuralMemory, auxiliary_loss, paper_memory_kwargs
from titans_pytorch.engines.chunkwise import ChunkwiseEngine
from titans_pytorch.engines.weight_paths import DualPath

from .helpers import assert_close, assert_same_gradients, gradients, randomise, refusal
from .test_engines import run_of

DIM, SEGMENT = 8, 4


def built(**changes):
    torch.manual_seed(0)
    return randomise(NeuralMemory.paper(DIM, SEGMENT, **changes).double(), scale=0.1)


def equations(memory, seq):
    """Eq. 11 to 16 and section 4.4, one row: seq [n d] -> [n d]."""
    p = {name.removeprefix("projections."): p for name, p in memory.named_parameters()}

    def convolved(name):
        x = F.rms_norm(seq, (DIM,), p["retrieve_norm.weight" if name == "queries" else "store_norm.weight"])
        x = x @ p[f"to_{name}.weight"].T
        padded = F.pad(x, (0, 0, 3, 0))
        kernel = p[f"{name}_conv.weight"].T.unsqueeze(1)  # [w 1 4]
        return F.silu(F.conv1d(padded.T.unsqueeze(0), kernel, groups=DIM)[0].T)

    q, k, v = F.normalize(convolved("queries"), dim=-1), F.normalize(convolved("keys"), dim=-1), convolved("values")
    x = F.rms_norm(seq, (DIM,), p["store_norm.weight"])

    def rate(name):
        return (x @ p[f"rates.{name}.weight"].T + p[f"rates.{name}.bias"]).sigmoid()[:, 0]

    alpha, eta, theta = rate("to_decay_factor"), rate("to_momentum"), rate("to_adaptive_step") * 4 / SEGMENT
    weights = anchor = [p[f"memory_model_parameters.{i}"][0] for i in (0, 1)]
    momentum, reads, losses = [torch.zeros_like(w) for w in weights], [], []
    for t in range(len(seq)):
        if t % SEGMENT == 0:
            anchor = weights
        first, second = (w if w.requires_grad else w.requires_grad_() for w in anchor)
        loss = (F.gelu(k[t] @ first) @ second - v[t]).square().sum()
        slopes = torch.autograd.grad(loss, (first, second), create_graph=True)
        momentum = [eta[t] * s - theta[t] * g for s, g in zip(momentum, slopes, strict=True)]
        weights = [(1 - alpha[t]) * w + s for w, s in zip(weights, momentum, strict=True)]
        reads.append(F.gelu(q[t] @ weights[0]) @ weights[1]), losses.append(loss)
    gate = F.silu(F.rms_norm(seq, (DIM,), p["retrieve_norm.weight"]) @ p["retrieve_gate.weight"].T)
    out = F.rms_norm(torch.stack(reads), (DIM,)) * (p["multihead_rmsnorm.gamma"][0] + 1) * gate
    return out @ p["combine_heads.weight"].T, torch.stack(losses)


@pytest.mark.parametrize("engine", ["auto", "dual", "matrix", "reference"])
def test_agrees_with_the_equations(engine):
    memory = built(engine=engine)
    seq = torch.randn(11, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    leaves = dict(memory.named_parameters()) | {"seq": seq}
    wanted, losses = equations(memory, seq)
    got, _, (loss, _) = memory(seq.unsqueeze(0), return_surprises=True)
    assert_close(got[0], wanted, 1e-9, "retrieved")
    assert_close(loss[0, 0] * DIM, losses, 1e-9, "loss")  # ours is the mean over features
    assert_same_gradients(gradients([got[0]], leaves), gradients([wanted], leaves))


def test_the_fast_engine_runs_it():
    """No weight is built, no token looped over."""
    memory = NeuralMemory.paper(64, heads=2, dim_head=32)
    assert (memory.store_chunk_size, memory.batch_size, memory.heads, memory.dim_head) == (1, 64, 2, 32)
    assert isinstance(memory.engine, ChunkwiseEngine)
    windows = run_of(memory, torch.randn(2, 256, 64)).windows
    assert [window.chunks for window in windows] == [64] * 4
    assert {type(path) for window in windows for path in window.paths.values()} == {DualPath}


def test_every_parameter_gets_a_gradient():
    memory = NeuralMemory.paper(DIM, SEGMENT, surprise_source="prediction")
    out, _, surprises = memory(torch.randn(2, 20, DIM), return_surprises=True)
    (out.sum() + auxiliary_loss(surprises)).backward()
    assert [name for name, p in memory.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("segment", "tokens"), [(16, 16_384), (64, 65_536)])
@pytest.mark.parametrize("kind", ["random", "constant", "periodic"])
def test_finite_over_a_long_stream(segment, tokens, kind):
    """Also where all tokens are the same."""
    torch.manual_seed(0)
    memory, state = NeuralMemory.paper(16, segment), None
    piece = torch.randn(1, 8192, 16)
    with torch.no_grad():
        for _ in range(tokens // 8192):
            if kind == "random":
                piece = torch.randn(1, 8192, 16)
            else:
                period = 1 if kind == "constant" else 8
                piece = piece[:, :period].repeat(1, 8192 // period, 1)
            out, state, (loss, _) = memory(piece, state=state, return_surprises=True)
    assert state.seq_index == tokens
    assert out.isfinite().all()
    assert loss.isfinite().all()
    assert loss.max() < 1


def test_keywords_can_be_changed():
    changed = paper_memory_kwargs(8, 16, max_step=0.5, depth=1, qkv_conv_kernel=None, momentum=False)
    assert changed["default_step_transform_max_lr"] == 4.0
    assert changed["default_model_kwargs"] == {"depth": 1, "expansion_factor": 4.0}
    memory = NeuralMemory.paper(8, 16, max_step=0.5, depth=1, qkv_conv_kernel=None, momentum=False)
    assert memory.projections.queries_conv is None
    assert not memory.engine.rule.slots
    for name, bad in (("dim_head", (0, 16)), ("segment", (8, 0)), ("max_step", (8, 16))):
        with pytest.raises(ValueError, match=refusal(name)):
            paper_memory_kwargs(*bad, **({"max_step": -1.0} if name == "max_step" else {}))
