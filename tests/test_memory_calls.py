"""The memory's public calls together: store then retrieve, an anchor of one's own for a call, updates handed on."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from titans_pytorch import MemoryAttention, NeuralMemory, NeuralMemState, mem_state_detach

from .helpers import (
    ForeignModel,
    GhostModel,
    assert_close,
    assert_same_gradients,
    assert_same_tensors,
    gradients,
    randomise,
)

DIM = 6

MODELS = {
    "mlp": lambda: None,
    "attention": lambda: MemoryAttention(DIM),
    "foreign": lambda: ForeignModel(DIM),
    "ghost": lambda: GhostModel(DIM),
}
each_model = pytest.mark.parametrize("model", MODELS)


def build(model="mlp", seed=0, **options):
    torch.manual_seed(seed)
    options = {"chunk_size": 3, "batch_size": 6, "default_step_transform_max_lr": 0.3} | options
    return randomise(NeuralMemory(DIM, model=MODELS[model](), **options).double(), seed, 0.2)


def tokens(n=11, b=2, views=(), seed=0):
    return torch.randn(*views, b, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(n=11):
    return torch.rand(2, n, generator=torch.Generator().manual_seed(2)) > 0.3


@each_model
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": (4, 3)}, {"chunk_size": (2, 3)}, {"heads": 2, "dim_head": DIM}], ids=str
)
def test_store_then_retrieve_is_a_call(model, options):
    memory, x = build(model, gated_transition=True, **options), tokens().requires_grad_()
    leaves = dict(memory.named_parameters()) | {"x": x}
    wanted, end, (wanted_loss, wanted_step) = memory(x, store_mask=mask(), return_surprises=True)
    updates, state, (loss, step) = memory.store_memories(x, mask=mask())
    got = memory.retrieve_memories(x, updates)
    for a, b in ((got, wanted), (loss, wanted_loss), (step, wanted_step)):
        assert_close(a, b, 1e-11)
    assert updates is state.updates
    assert state.seq_index == end.seq_index == 9
    assert_same_tensors(state.states[0], end.states[0], 1e-12)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-9)
    assert len(memory.store_memories(x, return_surprises=False)) == 2
    plain = memory.retrieve_memories(x, dict(updates))
    assert_close(plain, got, 1e-12)
    table = TensorDict({k: v.detach() for k, v in updates.items()}, batch_size=[2 * memory.internal_heads])
    assert_close(memory.retrieve_memories(x, table), got, 1e-12)


@each_model
def test_retrieve_from_one_memory(model):
    """The same weights for every token: those of a call whose anchor never moves and which stores nothing."""
    memory, x = build(model, chunk_size=64, batch_size=None), tokens()
    _, state = build(model, seed=1)(x)
    weights = state.states[0]
    got = memory.retrieve_memories(x, weights)
    wanted, _ = memory(x, state=NeuralMemState(0, weights))
    assert_close(got, wanted, 1e-12)
    assert_close(memory.retrieve_memories(x, dict(weights)), wanted, 1e-12)
    if memory.tokenwise:
        assert_close(memory.retrieve_memories(x[:, 4:5], weights), wanted[:, 4:5], 1e-12)


@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_store_in_two_parts(model):
    memory, x = build(model, momentum_order=2), tokens(12)
    updates, end = memory.store_memories(x, return_surprises=False)
    _, middle = memory.store_memories(x[:, :6], return_surprises=False)
    later, last, (loss, _) = memory.store_memories(x[:, 6:], middle.weights, middle.states, seq_index=6)
    assert last.seq_index == 12
    assert later.first_chunk == 2
    for name, whole in updates.items():
        assert_close(later[name], whole[:, 2:], 1e-12, name)
    assert_same_tensors(last.states[0], end.states[0], 1e-12)
    assert_same_tensors(last.states[1], end.states[1], 1e-12)
    assert loss.shape == (2, 1, 6)
    if memory.tokenwise:  # updates that begin later say so: these tokens stand behind them
        wanted = memory.retrieve_memories(x, updates)
        assert_close(memory.retrieve_memories(x[:, 6:], later), wanted[:, 6:], 1e-12)


def test_convolutions_begin_afresh_where_nothing_says_what_came_before():
    memory, x = build(qkv_conv_kernel=3), tokens(12)
    whole = memory.store_memories(x, return_surprises=False)[0]
    assert_close(memory.retrieve_memories(x, whole), memory(x)[0], 1e-12)
    _, middle = memory.store_memories(x[:, :6], return_surprises=False)
    later, _ = memory.store_memories(x[:, 6:], middle.weights, middle.states, seq_index=6, return_surprises=False)
    assert (later["norm.gamma"][:, 1] - whole["norm.gamma"][:, 3]).abs().max() > 1e-6
    carried = memory(x[:, 6:], state=middle)[1].updates
    assert_close(carried["norm.gamma"], whole["norm.gamma"][:, 2:], 1e-12)
    with pytest.raises(ValueError, match=r"^weights must be updates from chunk 0 on.*, got the memory from chunk 2 on"):
        memory.retrieve_memories(x[:, 6:], later)


@pytest.mark.parametrize("ttt", [3, 6, 9])
@pytest.mark.parametrize("own", [None, 6])
def test_an_anchor_for_one_call(own, ttt):
    """ttt_batch_size is batch_size for that call, counted from the first token ever."""
    memory, x = build(batch_size=own), tokens(19)
    twin = build(batch_size=ttt)
    twin.load_state_dict(memory.state_dict())
    wanted, wanted_end = twin(x)
    got, end = memory(x, ttt_batch_size=ttt)
    assert_close(got, wanted, 1e-12)
    assert_same_tensors(end.weights, wanted_end.weights, 1e-12)
    first, state = memory(x[:, :7], ttt_batch_size=ttt)
    second, _ = memory(x[:, 7:], state=state, ttt_batch_size=ttt)
    assert_close(torch.cat((first, second), dim=1), wanted, 1e-11)
    if own != ttt:
        assert (memory(x)[0] - wanted).abs().max() > 1e-6
    _, back = memory(x[:, 7:], state=state)
    assert_same_tensors(back.updates, memory(x[:, 7:], state=state)[1].updates, 0.0)


def test_the_anchor_is_the_memory_at_its_boundary():
    memory, x = build(), tokens(13)
    _, state = memory(x)
    at = {name: value[:, 4] for name, value in state.updates.items()}  # after 4 chunks, 12 tokens
    assert_same_tensors(state.weights, at, 1e-13)
    _, state = build(batch_size=None)(x)
    assert_same_tensors(state.weights, build(batch_size=None).init_weights(2), 0.0)


def residual(**options):
    earlier = build(seed=1, **options)
    return earlier, build(accept_weight_residual=True, **options)


FORMS = {
    "lazy": lambda updates: updates,
    "dict": dict,
    "table": lambda updates: TensorDict({k: v.detach() for k, v in updates.items()}, batch_size=[2]),
    "detached": lambda updates: mem_state_detach(NeuralMemState(0, updates=updates)).updates,
}


@pytest.mark.parametrize("form", FORMS)
@each_model
def test_weight_residuals_in_every_form(form, model):
    earlier, memory = residual(model=model)
    x = tokens()
    _, before = earlier(x)
    wanted, _ = memory(x, prev_weights=before.updates)
    got, _ = memory(x, prev_weights=FORMS[form](before.updates))
    assert_close(got, wanted, 1e-11)
    assert (memory(x)[0] - wanted).abs().max() > 1e-4
    stored = memory.store_memories(x, prev_weights=FORMS[form](before.updates), return_surprises=False)[0]
    assert_close(memory.retrieve_memories(x, stored), wanted, 1e-11)


@each_model
@pytest.mark.parametrize("cuts", [(4, 11), (3, 4, 8, 11), tuple(range(1, 12))], ids=str)
def test_whole_run_updates_line_up_with_later_calls(model, cuts):
    """The earlier layer reads all tokens at once, or with each call: the same, in values and gradients."""
    earlier, memory = residual(model=model)
    x = tokens().requires_grad_()
    leaves = dict(memory.named_parameters()) | {f"earlier.{k}": p for k, p in earlier.named_parameters()} | {"x": x}
    _, before = earlier(x)
    wanted, _ = memory(x, prev_weights=before.updates)
    wanted_grads = gradients([wanted], leaves)

    for whole in (True, False):
        _, run = earlier(x)
        state, own, outs, start = None, None, [], 0
        for stop in cuts:
            if not whole:
                _, run = earlier(x[:, start:stop], state=own)
                own = run
            out, state = memory(x[:, start:stop], state=state, prev_weights=run.updates)
            outs.append(out)
            start = stop
        got = torch.cat(outs, dim=1)
        assert_close(got, wanted, 1e-11)
        assert_same_gradients(gradients([got], leaves), wanted_grads, 1e-9)


def test_plain_updates_begin_at_the_calls_first_chunk():
    earlier, memory = residual()
    x = tokens(12)
    _, run = earlier(x)
    wanted, _ = memory(x, prev_weights=run.updates)
    _, state = memory(x[:, :6], prev_weights=run.updates)
    sliced = {name: value[:, 2:] for name, value in run.updates.items()}
    got, _ = memory(x[:, 6:], state=state, prev_weights=sliced)
    assert_close(got, wanted[:, 6:], 1e-11)
    # those that are no plain mapping know where they begin, also detached or read from a file
    for updates in (mem_state_detach(run).updates, pickle.loads(pickle.dumps(run.updates))):
        got, _ = memory(x[:, 6:], state=state, prev_weights=updates)
        assert_close(got, wanted[:, 6:], 1e-11)


def test_one_token_at_a_time():
    """[b d] is one token: [b 1 d] comes back."""
    memory, x = build(), tokens(7)
    whole, _ = memory(x)
    state = None
    for t in range(7):
        out, state = memory(x[:, t], state=state)
        assert out.shape == (2, 1, DIM)
        assert_close(out, whole[:, t : t + 1], 1e-11)
    views = build(qkv_receives_diff_views=True)
    x = tokens(7, views=(3,))
    assert_close(views(x[:, :, 0])[0], views(x[:, :, :1])[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 2, "dim_head": 2},
        {"batch_size": 4},
        {"spectral_norm_surprises": True},
        {"use_symplectic_gating": True, "num_pages": 2},
    ],
)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_shapes_alone(engine, options):
    """On the meta device, which has no numbers and no autocast."""
    shapes = {}
    for device in ("meta", "cpu"):
        memory = NeuralMemory(DIM, 2, engine=engine, **options).to(device)
        retrieved, state = memory(torch.randn(2, 9, DIM, device=device))
        retrieved.sum().backward()
        later = memory(torch.randn(2, 3, DIM, device=device), state=state)[0]
        given = {name: p.grad.shape for name, p in memory.named_parameters() if p.grad is not None}
        shapes[device] = (retrieved.shape, later.shape, given)
        assert {later.device.type, state.weights["norm.gamma"].device.type} == {device}
    assert shapes["meta"] == shapes["cpu"]


def test_what_is_stored_may_be_another_sequence():
    memory, x, other = build(), tokens(), tokens(seed=1)
    got, state = memory(x, store_seq=other)
    updates, _ = memory.store_memories(other, return_surprises=False)
    assert_close(got, memory.retrieve_memories(x, updates), 1e-11)
    assert_close(state.cache_store_segment, other[:, 9:])
    views = build(qkv_receives_diff_views=True)
    q, k, v = tokens(views=(3,))
    whole, _ = views(torch.stack((q, k, v)))
    assert_close(views(q[None], store_seq=torch.stack((k, v)))[0], whole)
    assert_close(views(torch.stack((q, v, k)), store_seq=torch.stack((k, v)))[0], whole)


def test_masked_tokens_are_not_learned_from():
    """Their step is zero; they still take part in pooling, momentum and decay."""
    memory, x = build(chunk_size=1, batch_size=None), tokens(6)
    seen = torch.tensor([[True, True, False, True, True, True]] * 2)
    _, state, (_, step) = memory(x, store_mask=seen, return_surprises=True)
    _, _, (_, free) = memory(x, return_surprises=True)
    assert_close(step[:, 0], free[:, 0] * seen)
    m, rates = 2, memory.rates(memory.projections.store_norm(x), 1, False)
    for name, entries in state.updates.items():
        keep, eta = (r[:, m].view(2, *(1,) * (entries.ndim - 2)) for r in (rates.retention, rates.momentum[..., 0]))
        echo = memory(x[:, :m])[1].states[1][name][0]
        assert_close(entries[:, m + 1], keep * entries[:, m] + eta * echo, 1e-12, name)
    nothing = memory(x, store_mask=torch.zeros(2, 6, dtype=torch.bool))[1]
    for value in nothing.states[1].values():
        assert (value == 0).all()
    all_seen = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(memory(x, store_mask=all_seen)[0], memory(x)[0])


def test_surprises_per_pair():
    """[b h n*u] over the complete chunks; with lookahead a pair less per chunk; the loss is that of the anchor."""
    memory, x = build(heads=2, dim_head=4, num_kv_per_token=2, batch_size=None), tokens()
    _, _, (loss, step) = memory(x, return_surprises=True)
    assert loss.shape == step.shape == (2, 2, 18)
    _, _, (later, _) = memory(x[:, 9:], state=memory(x[:, :9])[1], return_surprises=True)
    assert later.shape == (2, 2, 0)
    _, _, (loss, step) = build(store_with_lookahead_value=True)(x, return_surprises=True)
    assert loss.shape == step.shape == (2, 1, 6)


def test_start_values():
    memory = build(heads=2, dim_head=4, momentum_order=3)
    weights, momentum = memory.init_weights(3), memory.init_momentum(3)
    for i, name in enumerate(memory.memory_model_parameters.names):
        start = memory.memory_model_parameters[i]
        for row in range(6):
            assert torch.equal(weights[name][row], start[row % 2])
        assert momentum[name].shape == (3, 6, *start.shape[1:])
        assert (momentum[name] == 0).all()
    assert memory.internal_heads == 2
    shared = build(heads=2, dim_head=4, per_head_learned_parameters=False)
    assert all(torch.equal(v[0], v[5]) for v in shared.init_weights(3).values())
    assert build(momentum=False).init_momentum(3) == {}
    storages = {p.untyped_storage().data_ptr() for p in memory.memory_model_parameters}
    assert len(storages) == len(memory.memory_model_parameters.names)
    assert all(p.is_contiguous() for p in memory.memory_model_parameters)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).sin())


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM, DIM))

    def forward(self, x):
        return (x @ self.weight.T).sin() @ self.weight.T


def test_tied_parameters_are_one():
    tied = NeuralMemory(DIM, 3, batch_size=3, model=Tied()).double()
    once = NeuralMemory(DIM, 3, batch_size=3, model=Once()).double()
    once.load_state_dict(tied.state_dict())
    assert tied.memory_model_parameters.names == ("norm.gamma", "model.first.weight")
    x = tokens()
    assert_close(tied(x)[0], once(x)[0], 1e-12)


class LearnedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, prediction, target):
        return ((prediction - target).square() * self.weight).mean(dim=-1)


def test_a_loss_with_parameters_is_learned():
    memory, plain, x = (
        NeuralMemory(DIM, 3, store_memory_loss_fn=LearnedLoss()).double(),
        build(batch_size=None),
        tokens(),
    )
    memory.load_state_dict(plain.state_dict() | {"store_memory_loss_fn.weight": torch.ones(DIM)})
    plain.rates.step_transform.max_step = 1.0
    assert_close(memory(x)[0], plain(x)[0], 1e-11)
    memory(x)[0].square().sum().backward()
    assert (memory.store_memory_loss_fn.weight.grad != 0).all()


def test_models_are_copied():
    """The network given is a pattern: the memory learns its own copy."""
    model = ForeignModel(DIM)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    memory = NeuralMemory(DIM, 3, model=model)
    twin = NeuralMemory(DIM, 3, model=model)
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(twin.memory_model_parameters[1][0], model.down)
    assert not any("model." in name for name in memory.state_dict())
