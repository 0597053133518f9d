"""Law 8 of the memory: a wrong argument raises ValueError that names it, says what it got and what it takes."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory, NeuralMemState

from ..helpers import ForeignModel, message

DIM, CHUNK = 6, 4


class Buffered(nn.Linear):
    def __init__(self):
        super().__init__(DIM, DIM)
        self.register_buffer("steps", torch.zeros(1))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Batched(nn.Linear):
    """Takes [b n d] and nothing else."""

    def forward(self, x):
        b, n, d = x.shape
        return super().forward(x)


class Asserting(nn.Linear):
    def forward(self, x):
        assert x.shape[-1] == 1
        return x


def refused(named: str, takes: str = ""):
    """named: "name must be ..., got value"; takes: what must stand at the dots."""
    return pytest.raises(ValueError, match="^" + message(named).replace(".*", f".*{re.escape(takes)}.*", 1))


CONSTRUCTORS = [
    ({"dim": 0}, "dim must be ..., got 0"),
    ({"dim": 6.0}, "dim must be ..., got 6.0"),
    ({"dim": True}, "dim must be ..., got True"),
    ({"chunk_size": 0}, "chunk_size must be ..., got 0"),
    ({"chunk_size": -3}, "chunk_size must be ..., got -3"),
    ({"chunk_size": 2.5}, "chunk_size must be ..., got 2.5"),
    ({"chunk_size": None}, "chunk_size must be ..., got None"),
    ({"chunk_size": (4,)}, "chunk_size must be ..., got (4,)"),
    ({"chunk_size": (4, 2, 1)}, "chunk_size must be ..., got (4, 2, 1)"),
    ({"chunk_size": (4, 0)}, "chunk_size must be ..., got 0"),
    ({"chunk_size": (0, 4)}, "chunk_size must be ..., got 0"),
    ({"batch_size": 6}, "batch_size must be ..., got 6"),
    ({"batch_size": 0}, "batch_size must be ..., got 0"),
    ({"batch_size": "8"}, "batch_size must be ..., got '8'"),
    ({"chunk_size": (4, 3), "batch_size": 4}, "batch_size must be ..., got 4"),
    ({"dim_head": 0}, "dim_head must be ..., got 0"),
    ({"dim_head": 3.0}, "dim_head must be ..., got 3.0"),
    ({"heads": 0}, "heads must be ..., got 0"),
    ({"heads": 1.0}, "heads must be ..., got 1.0"),
    ({"model": 3}, "model must be ..., got 3"),
    ({"model": nn.Linear}, "model must be ..., got <class"),
    ({"model": lambda x: x}, "model must be ..., got <function"),
    ({"model": Buffered()}, "model must be ..., got Buffered with buffers steps"),
    ({"model": nn.BatchNorm1d(DIM)}, "model must be ..., got BatchNorm1d with buffers running_mean"),
    ({"model": nn.Identity()}, "model must be ..., got Identity without parameters"),
    ({"model": nn.Linear(DIM, 5)}, "model must be ..., got Linear, which maps (2, 3, 6) to (2, 3, 5)"),
    ({"model": nn.Linear(5, 5)}, "model must be ..., got Linear, which fails on (2, 3, 6) with RuntimeError: "),
    ({"model": MemoryMLP(DIM, 2), "dim_head": 4}, "model must be ..., got MemoryMLP, which fails on (2, 3, 4)"),
    ({"model": Pair(DIM, DIM)}, "model must be ..., got Pair, which maps (2, 3, 6) to tuple"),
    ({"model": Batched(DIM, DIM)}, "model must be ..., got Batched, which fails on (3, 6) with ValueError"),
    ({"model": Asserting(DIM, DIM)}, "model must be ..., got Asserting, which fails on (2, 3, 6) with AssertionError"),
    ({"store_memory_loss_fn": 0.5}, "store_memory_loss_fn must be ..., got 0.5"),
    ({"adaptive_step_transform": "sigmoid"}, "adaptive_step_transform must be ..., got 'sigmoid'"),
    ({"default_step_transform_max_lr": 0}, "default_step_transform_max_lr must be ..., got 0"),
    ({"default_step_transform_max_lr": float("nan")}, "default_step_transform_max_lr must be ..., got nan"),
    ({"max_mem_layer_modulation": -1.0}, "max_mem_layer_modulation must be ..., got -1.0"),
    ({"momentum_order": 0}, "momentum_order must be ..., got 0"),
    ({"momentum_order": 1.5}, "momentum_order must be ..., got 1.5"),
    ({"num_kv_per_token": 0}, "num_kv_per_token must be ..., got 0"),
    ({"max_grad_norm": -1}, "max_grad_norm must be ..., got -1"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be ..., got 0.0"),
    ({"max_grad_norm": "1"}, "max_grad_norm must be ..., got '1'"),
    ({"activation": "gelu"}, "activation must be ..., got 'gelu'"),
    ({"init_adaptive_step_bias": "0"}, "init_adaptive_step_bias must be ..., got '0'"),
    ({"init_momentum_bias": [1.0]}, "init_momentum_bias must be ..., got [1.0]"),
    ({"init_decay_bias": torch.zeros(1)}, "init_decay_bias must be ..., got tensor([0.])"),
    (
        {"chunk_size": 1, "store_with_lookahead_value": True},
        "store_with_lookahead_value needs chunks of at least two pairs",
    ),
    (
        {"chunk_size": (4, 1), "store_with_lookahead_value": True},
        "store_with_lookahead_value needs chunks of at least two pairs",
    ),
    ({"default_model_kwargs": 2}, "default_model_kwargs must be ..., got 2"),
    (
        {"default_model_kwargs": {"expansion_factor": 2.0}},
        "default_model_kwargs must be ..., got {'expansion_factor': 2.0}",
    ),
    ({"default_model_kwargs": {"depth": 2, "k": 3}}, "default_model_kwargs must be ..., got {'depth': 2, 'k': 3}"),
    ({"default_model_kwargs": {"depth": 0}}, "depth must be ..., got 0"),
    ({"qkv_conv_kernel": 0}, "qkv_conv_kernel must be ..., got 0"),
    ({"qkv_conv_kernel": True}, "qkv_conv_kernel must be ..., got True"),
    ({"qkv_conv_kernel": 2.5}, "qkv_conv_kernel must be ..., got 2.5"),
    ({"qk_l2norm": True, "qk_rmsnorm": True}, "qk_l2norm cannot be combined with qk_rmsnorm"),
    ({"output_gate": "tanh"}, "output_gate must be ..., got 'tanh'"),
    ({"output_gate": True}, "output_gate must be ..., got True"),
    ({"surprise_threshold": "0.5"}, "surprise_threshold must be ..., got '0.5'"),
    ({"surprise_threshold": True}, "surprise_threshold must be ..., got True"),
    ({"surprise_source": "loss"}, "surprise_source must be ..., got 'loss'"),
    ({"surprise_source": None}, "surprise_source must be ..., got None"),
    ({"engine": "fast"}, "engine must be ..., got 'fast'"),
    ({"engine": None}, "engine must be ..., got None"),
    (
        {"engine": "dual", "spectral_norm_surprises": True},
        'engine="dual" cannot be combined with spectral_norm_surprises',
    ),
    (
        {"engine": "matrix", "model": ForeignModel(DIM)},
        'engine="matrix" needs a memory model with a method with_weights',
    ),
    ({"engine": "dual", "model": ForeignModel(DIM)}, 'engine="dual" needs a memory model with a method with_weights'),
]


@pytest.mark.parametrize(("options", "named"), CONSTRUCTORS, ids=lambda x: x if isinstance(x, str) else "")
def test_constructor(options, named):
    with refused(named):
        NeuralMemory(**{"dim": DIM, "chunk_size": CHUNK} | options)


def test_unknown_keywords_are_no_options():
    with pytest.raises(TypeError, match="unknown argument chunk_sizes of NeuralMemory; the nearest is chunk_size"):
        NeuralMemory(DIM, chunk_sizes=4)


def setting(**options):
    """A memory, tokens [2 10 6], and the state after them."""
    memory = NeuralMemory(DIM, CHUNK, **{"batch_size": 8} | options)
    views = (3,) if options.get("qkv_receives_diff_views") else ()
    x = torch.randn(*views, 2, 10, DIM)
    _, state = memory(x, store_mask=torch.ones(2, 10, dtype=torch.bool))
    return SimpleNamespace(memory=memory, x=x, state=state, mask=torch.ones(2, 10, dtype=torch.bool))


SEQUENCES = [
    (lambda x: x.tolist(), "seq must be ..., got list"),
    (lambda x: None, "seq must be ..., got NoneType"),
    (lambda x: x.long(), "seq must be ..., got torch.int64"),
    (lambda x: x[0, 0], "seq must be ..., got (6,)"),
    (lambda x: x[None], "seq must be ..., got (1, 2, 10, 6)"),
    (lambda x: x[..., :5], "seq must be ..., got (2, 10, 5)"),
    (lambda x: x.mT, "seq must be ..., got (2, 6, 10)"),
    (lambda x: x[:0], "seq must be ..., got (0, 10, 6)"),
    (lambda x: x.double(), "seq must be ..., got torch.float64"),
    (lambda x: x.bfloat16(), "seq must be ..., got torch.bfloat16"),
]


@pytest.mark.parametrize(("change", "named"), SEQUENCES)
def test_sequence(change, named):
    s = setting()
    with refused(named):
        s.memory(change(s.x))
    with refused(named):
        s.memory.retrieve_memories(change(s.x), s.state.states[0])
    with refused(named):
        s.memory.store_memories(change(s.x))
    if change(s.x) is not None:
        with refused("store_" + named):
            s.memory(s.x, store_seq=change(s.x))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x[0], "seq must be ..., got (2, 10, 6)"),
        (lambda x: x[:2], "seq must be ..., got (2, 2, 10, 6)"),
        (lambda x: x[:1], "seq must be ..., got (1, 2, 10, 6)"),
        (lambda x: x[:, :0], "seq must be ..., got (3, 0, 10, 6)"),
    ],
)
def test_sequence_of_views(change, named):
    s = setting(qkv_receives_diff_views=True)
    with refused(named):
        s.memory(change(s.x))


@pytest.mark.parametrize(
    ("views", "shape", "named"),
    [
        (False, (2, 9, 6), "store_seq must be ..., got (2, 9, 6)"),
        (False, (1, 10, 6), "store_seq must be ..., got (1, 10, 6)"),
        (True, (2, 10, 6), "store_seq must be ..., got (2, 10, 6)"),
        (True, (3, 2, 10, 6), "store_seq must be ..., got (3, 2, 10, 6)"),
        (True, (2, 2, 9, 6), "store_seq must be ..., got (2, 2, 9, 6)"),
    ],
)
def test_store_seq(views, shape, named):
    s = setting(qkv_receives_diff_views=views)
    with refused(named):
        s.memory(s.x, store_seq=torch.zeros(shape))


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ([True], "list"),
        (torch.ones(2, 10), "torch.float32 (2, 10)"),
        (torch.ones(2, 9, dtype=torch.bool), "torch.bool (2, 9)"),
        (torch.ones(10, dtype=torch.bool), "torch.bool (10,)"),
        (torch.ones(1, 10, dtype=torch.bool), "torch.bool (1, 10)"),
        (torch.ones(2, 12, dtype=torch.bool), "torch.bool (2, 12)"),
    ],
)
def test_masks(mask, got):
    s = setting()
    with refused(f"store_mask must be ..., got {got}", "a bool tensor of shape (2, 10)"):
        s.memory(s.x, store_mask=mask, state=s.state)
    with refused(f"mask must be ..., got {got}", "a bool tensor of shape (2, 10)"):
        s.memory.store_memories(s.x, mask=mask)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (6, "ttt_batch_size must be ..., got 6"),
        (0, "ttt_batch_size must be ..., got 0"),
        (8.0, "ttt_batch_size must be ..., got 8.0"),
    ],
)
def test_ttt_batch_size(size, named):
    s = setting()
    with refused(named):
        s.memory(s.x, ttt_batch_size=size)


OTHER_MEMORIES = {
    "more heads": ({"heads": 2, "dim_head": 6}, "state.weights['norm.gamma'] must be ..., got (4, 6)"),
    "other width": ({"model": MemoryMLP(DIM, 2, 1.5)}, "state.weights['model.weights.0'] must be ..., got (2, 6, 9)"),
    "other model": (
        {"model": MemoryMLP(DIM, 1)},
        "state.weights must be ..., got the parameters norm.gamma, model.weights.0",
    ),
    "unwrapped": (
        {"mem_model_norm_add_residual": False},
        "state.weights must be ..., got the parameters weights.0, weights.1",
    ),
    "higher order": ({"momentum_order": 2}, "state.states[1]['norm.gamma'] must be ..., got (2, 2, 6)"),
    "no momentum": ({"momentum": False}, "state.states[1] must be ..., got the parameters none"),
    "views": ({"qkv_receives_diff_views": True}, "state.cache_store_segment must be ..., got (2, 2, 2, 6)"),
    "convolution": ({"qkv_conv_kernel": 3}, "state.query_conv must be ..., got (2, 2, 6)"),
}


@pytest.mark.parametrize(("options", "named"), OTHER_MEMORIES.values(), ids=OTHER_MEMORIES)
def test_state_of_another_configuration(options, named):
    """Of which it is not known what made it (else: test_other_settings.py): shapes tell."""
    with refused(named):
        setting().memory(torch.randn(2, 3, DIM), state=by_hand(setting(**options).state))


def by_hand(state):
    return state._replace(configuration=None)


def test_state_of_another_chunk_size():
    x = torch.randn(2, 10, DIM)
    _, state = NeuralMemory(DIM, 3)(x)
    with refused("state.seq_index must be ..., got 9", "a multiple of the store chunk size, 4"):
        NeuralMemory(DIM, 4)(x, state=by_hand(state))
    _, state = NeuralMemory(DIM, 8)(x[:, :7])
    with refused("state.cache_store_segment must be ..., got (2, 7, 6)", "k < 4"):
        NeuralMemory(DIM, 4)(x, state=by_hand(state))


def test_state_of_another_batch_size_dtype_or_kind():
    s = setting()
    with refused("state must be ..., got one of 2 rows", "one of 3 rows, as seq has"):
        s.memory(torch.randn(3, 5, DIM), state=s.state)
    with refused("state.weights['norm.gamma'] must be ..., got (2, 6)", "(3, 6)"):
        s.memory(torch.randn(3, 5, DIM), state=s.state._replace(cache_store_segment=None, cache_store_mask=None))
    with refused("state.weights['norm.gamma'] must be ..., got torch.float32", "torch.float64"):
        s.memory.double()(s.x.double(), state=s.state)
    s = setting()
    for state, got in [(tuple(s.state), "tuple"), (s.state.states[0], "LazyTensors"), (3, "int")]:
        with refused(f"state must be ..., got {got}"):
            s.memory(s.x, state=state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_index": 7}, "state.seq_index must be ..., got 7"),
        ({"seq_index": -4}, "state.seq_index must be ..., got -4"),
        ({"seq_index": 8.0}, "state.seq_index must be ..., got 8.0"),
        ({"weights": [1]}, "state.weights must be ..., got list"),
        ({"weights": {}}, "state.weights must be ..., got the parameters none"),
        ({"states": ({},)}, "state.states must be ..., got tuple"),
        ({"states": {}}, "state.states must be ..., got dict"),
        ({"states": ({}, {})}, "state.states[0] must be ..., got the parameters none"),
        ({"cache_store_segment": torch.zeros(2, 2, 5)}, "state.cache_store_segment must be ..., got (2, 2, 5)"),
        ({"cache_store_mask": torch.ones(2, 3, dtype=torch.bool)}, "state.cache_store_mask must be ..., got (2, 3)"),
        ({"last_token": torch.zeros(2, 2, 6)}, "state.last_token must be ..., got (2, 2, 6)"),
        ({"read_weights": {"a": torch.zeros(1)}}, "state.read_weights must be ..., got the parameters a"),
    ],
)
def test_states_made_by_hand(change, named):
    s = setting()
    with refused(named):
        s.memory(s.x, state=s.state._replace(**change))


def test_a_state_lacks_what_its_position_needs():
    """Of a memory with another retrieve chunk, or of one whose reads do not look at each other."""
    x = torch.randn(2, 6, DIM)
    _, state = NeuralMemory(DIM, (4, 4))(x)
    with refused("state.read_weights must be ..., got None"):
        NeuralMemory(DIM, (8, 4))(x, state=by_hand(state))
    memory = NeuralMemory(DIM, CHUNK, model=ForeignModel(DIM))
    _, state = memory(x)
    with refused("state.query_group must be ..., got 0 earlier queries", "3 at position 6"):
        memory(x, state=state._replace(query_group=None))


def test_prev_weights():
    memory = NeuralMemory(DIM, CHUNK, accept_weight_residual=True)
    x = torch.randn(2, 10, DIM)
    earlier = NeuralMemory(DIM, CHUNK)
    _, state = earlier(x)
    updates, plain = state.updates, dict(state.updates)
    with refused("prev_weights needs a memory built with accept_weight_residual = True"):
        earlier(x, prev_weights=updates)
    with refused("prev_weights needs a memory built with accept_weight_residual = True"):
        earlier.store_memories(x, prev_weights=plain)
    for wrong, got in [(3, "int"), ([1], "list"), (state, "NeuralMemState")]:
        with refused(f"prev_weights must be ..., got {got}", "a mapping"):
            memory(x, prev_weights=wrong)
    with refused("prev_weights must be ..., got the parameters a", "norm.gamma, model.weights.0, model.weights.1"):
        memory(x, prev_weights={"a": x})
    with refused("prev_weights['norm.gamma'] must be ..., got (2, 6)", "(2, 'entries', 6)"):
        memory(x, prev_weights=state.states[0])
    with refused("prev_weights['norm.gamma'] must be ..., got torch.float64"):
        memory(x, prev_weights={k: v.double() for k, v in plain.items()})
    with refused("prev_weights['norm.gamma'] must be ..., got list", "a tensor"):
        memory(x, prev_weights={k: v.tolist() for k, v in plain.items()})
    with refused("prev_weights must be ..., got the memory before chunks 0 to 0", "chunks 0 to 1"):
        memory(x, prev_weights={k: v[:, :1] for k, v in plain.items()})
    other = NeuralMemory(DIM, CHUNK, default_model_kwargs={"depth": 1})(x)[1].updates
    with refused("prev_weights must be ..., got the parameters norm.gamma (2, 6), model.weights.0 (2, 6, 6)"):
        memory(x, prev_weights=other)
    with refused("prev_weights must be ..., got the parameters norm.gamma (3, 6)", "norm.gamma (2, 6)"):
        memory(x, prev_weights=earlier(torch.randn(3, 10, DIM))[1].updates)
    # the next call's chunks are 2 to 4; the updates of the first stop before chunk 2
    _, carried = memory(x, prev_weights=updates)
    with refused("prev_weights must be ..., got the memory before chunks 0 to 2", "chunks 2 to 4"):
        memory(x, state=carried, prev_weights=updates)


def test_store_memories():
    s = setting()
    for index in (3, -4, 4.0, None):
        with refused(f"seq_index must be ..., got {index!r}", "a multiple of the store chunk size, 4"):
            s.memory.store_memories(s.x, seq_index=index)
    with refused("weights must be ..., got the parameters a"):
        s.memory.store_memories(s.x, {"a": s.x})
    with refused("weights must be ..., got Tensor", "a mapping"):
        s.memory.store_memories(s.x, s.x)
    with refused("weights['norm.gamma'] must be ..., got (2, 3, 6)"):
        s.memory.store_memories(s.x, s.state.updates)
    with refused("past_state must be ..., got LazyTensors", "(memory, momentum)"):
        s.memory.store_memories(s.x, past_state=s.state.states[0])
    with refused("past_state[1]['norm.gamma'] must be ..., got (2, 6)", "(1, 2, 6)"):
        s.memory.store_memories(s.x, past_state=(s.state.states[0],) * 2)


def test_retrieve_memories():
    s = setting()
    updates = s.state.updates
    with refused("weights must be ..., got NoneType", "a mapping"):
        s.memory.retrieve_memories(s.x, None)
    with refused("weights must be ..., got the parameters norm.gamma"):
        s.memory.retrieve_memories(s.x, {"norm.gamma": updates["norm.gamma"]})
    with refused("weights['norm.gamma'] must be ..., got (2, 6)", "(3, 6)"):
        s.memory.retrieve_memories(torch.randn(3, 4, DIM), s.state.states[0])
    with refused(
        "weights must be ..., got the memory before chunks 0 to 2", "before chunks 0 to 3, which these tokens read"
    ):
        s.memory.retrieve_memories(torch.randn(2, 12, DIM), updates)
    assert s.memory.retrieve_memories(torch.randn(2, 10, DIM), updates).shape == (2, 10, DIM)
    memory = NeuralMemory(DIM, CHUNK, model=ForeignModel(DIM))
    later = memory(s.x, state=memory(s.x[:, :4])[1])[1].updates
    with refused("weights must be ..., got the memory from chunk 1 on", "from chunk 0 on"):
        memory.retrieve_memories(s.x[:, :3], later)


@pytest.mark.parametrize("batch", [0, -1, 2.0, None])
def test_start_values(batch):
    memory = NeuralMemory(DIM, CHUNK)
    with refused(f"batch must be ..., got {batch!r}"):
        memory.init_weights(batch)
    with refused(f"batch must be ..., got {batch!r}"):
        memory.init_momentum(batch)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda p, t: (p - t).square().mean(), "shape ()"),
        (lambda p, t: (p - t).square(), "shape (2, 2, 4, 6)"),
        (lambda p, t: 0.5, "float"),
    ],
)
def test_losses_that_are_not_per_token(loss, got, engine):
    memory = NeuralMemory(DIM, CHUNK, store_memory_loss_fn=loss, engine=engine)
    with refused(f"store_memory_loss_fn must be ..., got {got}", "(2, 2, 4)"):
        memory(torch.randn(2, 8, DIM))


@pytest.mark.parametrize("model", [None, ForeignModel(DIM)])
@pytest.mark.parametrize("chunk", [1, 4, (3, 2), (2, 6)])
def test_no_tokens(chunk, model):
    """A call of no tokens gives none and carries on as if it had not been."""
    memory = NeuralMemory(DIM, chunk, batch_size=12, model=model).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    whole, end = memory(x)
    out, state, (loss, step) = memory(x[:, :0], return_surprises=True)
    assert out.shape == (2, 0, DIM)
    assert loss.shape == step.shape == (2, 1, 0)
    assert state.seq_index == state.position == 0
    first, state = memory(x[:, :5], state=state)
    out, state = memory(x[:, :0], state=state, store_mask=torch.ones(2, 0, dtype=torch.bool))
    assert out.shape == (2, 0, DIM)
    second, state = memory(x[:, 5:], state=state)
    assert torch.allclose(torch.cat((first, second), dim=1), whole, atol=1e-10)
    assert state.seq_index == end.seq_index
    assert memory.retrieve_memories(x[:, :0], end.updates).shape == (2, 0, DIM)
    updates, _ = memory.store_memories(x[:, :0], return_surprises=False)
    assert all(torch.equal(value[:, 0], memory.init_weights(2)[name]) for name, value in updates.items())


def test_a_hand_made_state_of_weights_alone():
    """Weights without states: the memory starts at the weights."""
    memory = NeuralMemory(DIM, CHUNK, batch_size=8)
    x = torch.randn(2, 10, DIM)
    weights = {k: torch.randn_like(v) * 0.3 for k, v in memory.init_weights(2).items()}
    got, _ = memory(x, state=NeuralMemState(0, weights))
    wanted, _ = memory(x, state=NeuralMemState(0, weights, states=(weights, memory.init_momentum(2))))
    assert torch.equal(got, wanted)
    assert (got - memory(x)[0]).abs().max() > 0.01
