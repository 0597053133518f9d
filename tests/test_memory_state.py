"""What a memory carries from call to call: its fields, its tables, its copies, its graph; lazily built tensors."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from tensordict import TensorDict

from titans_pytorch import NeuralMemory, NeuralMemState, mem_state_detach
from titans_pytorch.memory.state import LazyTensors

from .helpers import ForeignModel, assert_close, assert_same_gradients, assert_same_tensors, gradients, randomise

DIM = 6

CONFIGURATIONS = {
    "plain": {},
    "anchors": {"chunk_size": 2, "batch_size": 4, "gated_transition": True},
    "heads": {"heads": 2, "dim_head": 4},
    "shared start": {"heads": 2, "dim_head": 4, "per_head_learned_parameters": False},
    "order 2": {"momentum_order": 2, "batch_size": 8},
    "no momentum": {"momentum": False},
    "views": {"qkv_receives_diff_views": True},
    "pair": {"chunk_size": (6, 4)},
    "reads that look back": {"model": lambda: ForeignModel(DIM), "heads": 2, "dim_head": DIM},
    "convolution": {"qkv_conv_kernel": 3, "output_gate": "silu", "qk_l2norm": True},
    "prediction": {"surprise_threshold": 1.0, "surprise_source": "prediction", "chunk_size": 2},
    "threshold": {"surprise_threshold": 1.0, "chunk_size": 1, "batch_size": 4},
    "reference": {"engine": "reference", "batch_size": 8},
    "spectral": {"spectral_norm_surprises": True, "engine": "matrix"},
}
each_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def build(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    options = {"chunk_size": 4, "default_step_transform_max_lr": 0.3} | CONFIGURATIONS[name] | changes
    if "model" in options:
        options["model"] = options["model"]()
    return randomise(NeuralMemory(DIM, **options), scale=0.2).to(dtype)


def tokens(name, b=3, n=9, seed=0):
    views = (3,) if CONFIGURATIONS[name].get("qkv_receives_diff_views") else ()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*views, b, n, DIM, generator=generator, dtype=torch.float64)


def mask(b=3, n=9):
    return torch.rand(b, n, generator=torch.Generator().manual_seed(5)) > 0.3


def leaves_of(value, path="state"):
    """Every tensor of a state, by its place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if hasattr(value, "items"):
        return {k: v for name, part in value.items() for k, v in leaves_of(part, f"{path}.{name}").items()}
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in leaves_of(part, f"{path}.{i}").items()}
    return {}


def same_state(got, wanted, tolerance=0.0):
    assert got.seq_index == wanted.seq_index
    assert_same_tensors(leaves_of(got), leaves_of(wanted), tolerance)


@pytest.mark.parametrize(
    ("chunks", "entries"),
    [  # entries: how many chunks the memory has learned from that the query at position 0, 1, 2 .. reads
        (1, [1, 2, 3, 4, 5]),
        (3, [0, 0, 1, 1, 1, 2, 2, 2, 3]),
        ((4, 2), [0, 0, 0, 2, 2, 2, 2, 4, 4]),
        ((2, 4), [0, 0, 0, 1, 1, 1, 1, 2]),
        ((6, 4), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 3]),
    ],
)
def test_which_memory_a_position_reads(chunks, entries):
    memory = NeuralMemory(DIM, chunks)
    assert [memory.chunk_config.reads.entry(position) for position in range(len(entries))] == entries


def test_an_older_memory_is_kept_while_it_is_read():
    """Reads in groups of 4, chunks of 2: 6 tokens are three chunks, of which token 6 reads what two have left."""
    memory = build("plain", chunk_size=(4, 2))
    with torch.no_grad():
        _, state = memory(tokens("plain", n=6))
        _, level = memory(tokens("plain", n=7))
    for name, kept in state.read_weights.items():
        assert torch.equal(kept, state.updates[name][:, 2])
    assert level.read_weights is None, "token 7 reads all three"


def test_fields():
    first = ("seq_index", "weights", "cache_store_segment", "states", "updates", "active_page_indices")
    assert NeuralMemState._fields[:6] == first
    state = NeuralMemState(8)
    assert state == (8, *(None,) * (len(NeuralMemState._fields) - 1))
    assert state.position == 8
    assert state._replace(cache_store_segment=torch.zeros(2, 3, 4)).position == 11
    with pytest.raises(TypeError):
        NeuralMemState()


@each_configuration
def test_shapes_of_what_is_carried(name):
    memory, x = build(name), tokens(name)
    _, state = memory(x, store_mask=mask())
    chunk, order = memory.store_chunk_size, memory.engine.rule.slots
    rows, stored = 3 * memory.internal_heads, 9 // chunk * chunk
    assert (state.seq_index, state.position) == (stored, 9)
    assert state.cache_store_mask.shape == (3, 9 - stored)
    assert_close(state.cache_store_segment, (x[1:] if x.ndim == 4 else x)[..., stored:, :])
    for key, start in memory.init_weights(3).items():
        shape = start.shape[1:]
        assert state.weights[key].shape == state.states[0][key].shape == (rows, *shape)
        assert state.updates[key].shape == (rows, stored // chunk + 1, *shape)
        assert_close(state.updates[key][:, 0], start)
        assert_close(state.updates[key][:, -1], state.states[0][key], 1e-12)
        if order:
            assert state.states[1][key].shape == (order, rows, *shape)
    assert len(state.states[1]) == (len(state.weights) if order else 0)
    assert state.updates.first_chunk == 0
    _, later = memory(x, state=state)
    assert later.updates.first_chunk == stored // chunk
    assert_same_tensors({k: v[:, 0] for k, v in later.updates.items()}, state.states[0], 1e-12)


@each_configuration
def test_a_state_passed_in_is_never_modified(name):
    memory, x = build(name), tokens(name)
    _, state = memory(x, store_mask=mask())
    before = {k: v.detach().clone() for k, v in leaves_of(state).items()}
    fields = tuple(state)
    out, after = memory(x, state=state, store_mask=mask())
    (out.sum() + sum(v.sum() for v in leaves_of(after).values())).backward(retain_graph=True)
    with torch.no_grad():
        memory(x, state=state, ttt_batch_size=4, detach_mem_state=True)
        memory(x, state=after)
        if memory.tokenwise:
            memory.retrieve_memories(x[0] if x.ndim == 4 else x, state.states[0])
    assert all(a is b for a, b in zip(fields, state, strict=True))
    same = {k: v.detach() for k, v in leaves_of(state).items()}
    assert same.keys() == before.keys()
    assert all(torch.equal(same[k], before[k]) for k in before)


@each_configuration
@pytest.mark.parametrize("n", [1, 3, 8, 9])
def test_table_and_back(name, n):
    """Everything but updates survives; rows, rows in another order and stacked rows stream on as they would have."""
    memory, x, more = build(name), tokens(name, n=n), tokens(name, n=7, seed=1)
    with torch.no_grad():
        _, state = memory(x, store_mask=mask(n=n))
        wanted, end = memory(more, state=state)
        table = state.to_tensordict()
        assert table.batch_size == (3,)
        same_state(NeuralMemState.from_tensordict(table), state._replace(updates=None))

        got, got_end = memory(more, state=NeuralMemState.from_tensordict(table))
        assert torch.equal(got, wanted)
        same_state(got_end, end)

        for rows in ([1], [2, 0], [0, 0, 1, 2]):
            got, _ = memory(more[..., rows, :, :], state=NeuralMemState.from_tensordict(table[rows]))
            assert_close(got, wanted[rows], 1e-12)

        parts = [memory(x[..., i : i + 1, :, :], store_mask=mask(n=n)[i : i + 1])[1].to_tensordict() for i in range(3)]
        for stacked in (torch.cat(parts), torch.stack(parts).flatten()):
            got, _ = memory(more, state=NeuralMemState.from_tensordict(stacked))
            assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("name", ["order 2", "pair", "views", "no momentum", "reads that look back"])
def test_table_from_a_file(name, tmp_path):
    memory, x, more = build(name), tokens(name), tokens(name, n=7, seed=1)
    with torch.no_grad():
        _, state = memory(x, store_mask=mask())
        wanted, _ = memory(more, state=state)
    table = state.to_tensordict()
    torch.save(table.to_dict(), tmp_path / "state.pt")
    table.save(tmp_path / "table")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.pop("batch_size", None)
    loaded.pop("device", None)
    for again in (TensorDict(loaded, batch_size=[3]), TensorDict.load(tmp_path / "table")):
        with torch.no_grad():
            got, _ = memory(more, state=NeuralMemState.from_tensordict(again))
        assert torch.equal(got, wanted)


def test_tables_that_are_no_state():
    memory, x = build("plain"), tokens("plain")
    table, other = memory(x)[1].to_tensordict(), memory(x[:, :4])[1].to_tensordict()
    rows = [dict(row) for row in (table[:1], other[:1])]
    mixed = TensorDict({"seq_index": torch.cat([row["seq_index"] for row in rows])}, batch_size=[2])
    with pytest.raises(
        ValueError, match=r"^td must be rows that stand at one position, got rows at positions \[8, 4\]"
    ):
        NeuralMemState.from_tensordict(mixed)
    with pytest.raises(ValueError, match=r"^td must be one dim of rows.*, got batch size \(2, 3\)"):
        NeuralMemState.from_tensordict(torch.stack((table, table)))
    with pytest.raises(ValueError, match=r"^td must be one dim of rows.*, got batch size \(0,\)"):
        NeuralMemState.from_tensordict(table[:0])
    with pytest.raises(ValueError, match="^batch must be the number of rows, 3, got 4"):
        memory(x)[1].to_tensordict(4)
    with pytest.raises(ValueError, match="^batch must be the number of rows, got None"):
        NeuralMemState(0).to_tensordict()
    assert NeuralMemState.from_tensordict(NeuralMemState(8).to_tensordict(2)) == NeuralMemState(8)


@each_configuration
def test_copies_of_the_memory(name):
    """pickle, deepcopy, torch.save, state_dict: the copy computes the same, and shares nothing."""
    memory, x = build(name), tokens(name)
    wanted, _ = memory(x)
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    fresh = randomise(build(name), seed=9, scale=1.0)
    assert (fresh(x)[0] - wanted).abs().max() > 1e-3
    fresh.load_state_dict(memory.state_dict())
    copies = [pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory), torch.load(file, weights_only=False), fresh]
    for twin in copies:
        assert torch.equal(twin(x)[0], wanted)
        assert [k for k, _ in twin.named_parameters()] == [k for k, _ in memory.named_parameters()]
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1.0)
        assert (twin(x)[0] - wanted).abs().max() > 1e-3
    assert torch.equal(memory(x)[0], wanted)


@each_configuration
def test_copies_of_the_state(name):
    memory, x, more = build(name), tokens(name), tokens(name, n=7, seed=1)
    with torch.no_grad():
        _, state = memory(x, store_mask=mask())
        wanted, _ = memory(more, state=state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state), torch.load(file, weights_only=True)]
    copies.append(pickle.loads(pickle.dumps(mem_state_detach(memory(x, store_mask=mask())[1]))))
    for twin in copies:
        assert isinstance(twin, NeuralMemState)
        same_state(twin, state)
        assert twin.updates.first_chunk == 0
        with torch.no_grad():
            assert torch.equal(memory(more, state=twin)[0], wanted)
    for k, v in leaves_of(copies[1]).items():
        assert v.data_ptr() != leaves_of(state)[k].data_ptr() or v.numel() == 0


@each_configuration
def test_detached(name):
    """Equal values; no gradient goes back through the state, and every gradient does without."""
    memory = build(name)
    x, more = tokens(name).requires_grad_(), tokens(name, n=7, seed=1)
    _, state = memory(x)
    _, cut = memory(x, detach_mem_state=True)
    attached, _ = memory(more, state=state)
    (grad,) = torch.autograd.grad(attached.sum(), x, retain_graph=True)
    assert (grad != 0).any()
    for detached in (mem_state_detach(state), cut):
        assert isinstance(detached, NeuralMemState)
        same_state(detached, state)
        assert not any(v.requires_grad for v in leaves_of(detached).values())
        assert detached.updates.first_chunk == 0
        out, _ = memory(more, state=detached)
        assert torch.equal(out, attached)
        assert torch.autograd.grad(out.sum(), x, allow_unused=True) == (None,)
        out, _ = memory(more, state=detached)
        out.sum().backward()
    assert mem_state_detach(NeuralMemState(4)) == NeuralMemState(4)


@each_configuration
@pytest.mark.parametrize("cuts", [[4], [2, 3, 7]], ids=str)
def test_backward_through_a_carried_state(name, cuts):
    """Gradients over several calls are those of one call: in parameters, tokens and what is carried out."""
    memory, x = build(name), tokens(name, n=10).requires_grad_()
    leaves = dict(memory.named_parameters()) | {"x": x}
    whole, end = memory(x)
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        out, state = memory(x[..., start:stop, :], state=state)
        outs.append(out)
    wanted = gradients([whole, *leaves_of(end.states).values()], leaves)
    got = gradients([torch.cat(outs, dim=1), *leaves_of(state.states).values()], leaves)
    assert_same_gradients(got, wanted, 1e-6 if name == "spectral" else 1e-8)


def test_truncated_backpropagation_lets_go_of_the_graph():
    """With the state cut, what a call built is freed once two further calls no longer need it."""
    memory, x = build("anchors"), tokens("anchors")
    state, seen = None, []
    for _ in range(3):
        piece = x.clone().requires_grad_()
        seen.append(weakref.ref(piece))
        out, state = memory(piece, state=state, detach_mem_state=True)
        out.sum().backward()
        del piece, out
    gc.collect()
    assert seen[0]() is None
    assert seen[1]() is None


def test_calls_that_complete_no_chunk_copy_nothing():
    memory, x = build("order 2"), tokens("order 2")
    with torch.no_grad():
        _, state = memory(x[:, :5])
        _, later = memory(x[:, 5:7], state=state)
    for before, after in ((state.weights, later.weights), *zip(state.states, later.states, strict=True)):
        assert all(before[k].data_ptr() == after[k].data_ptr() for k in before)


def counted(names=("a", "b")):
    calls = []

    def make(name):
        calls.append(name)
        return torch.ones(2) * 3

    return LazyTensors(names, make, first_chunk=5), calls


def test_lazy_tensors_are_built_once_when_read():
    lazy, calls = counted()
    assert (list(lazy), len(lazy), "a" in lazy, "c" in lazy) == (["a", "b"], 2, True, False)
    assert repr(lazy) == "LazyTensors(a, b)"
    assert calls == []
    assert lazy["b"] is lazy["b"]
    assert dict(lazy).keys() == {"a", "b"}
    assert calls == ["b", "a"]
    with pytest.raises(KeyError):
        lazy["c"]
    assert lazy.get("c") is None


def test_lazy_tensors_map_and_pickle():
    lazy, calls = counted()
    doubled = lazy.map(lambda x: x * 2)
    assert calls == []
    assert doubled["a"].tolist() == [6, 6]
    assert calls == ["a"]
    for twin in (pickle.loads(pickle.dumps(doubled)), copy.deepcopy(doubled)):
        assert isinstance(twin, LazyTensors)
        assert twin.first_chunk == 5
        assert twin["b"].tolist() == [6, 6]


def test_lazy_tensors_let_go_of_what_they_were_built_from():
    source = torch.ones(3)
    alive = weakref.ref(source)
    lazy = LazyTensors(["a", "b"], lambda name, source=source: source * 2)
    del source
    lazy["a"]
    assert alive() is not None
    lazy["b"]
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("made_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("read_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_lazy_tensors_keep_the_mode_of_their_making(made_in, read_in):
    p = torch.ones(2, requires_grad=True)
    with made_in():
        lazy = LazyTensors(["a"], lambda name: p * 2)
    with read_in():
        value = lazy["a"]
    assert value.requires_grad == (made_in is torch.enable_grad)
    assert value.is_inference() == (made_in is torch.inference_mode)


def test_lazy_tensors_are_built_in_full_precision():
    """Read inside or outside of autocast: the same."""
    x = torch.randn(3, 4, 4)
    lazy = [LazyTensors(["a"], lambda name: x @ x) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = lazy[0]["a"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, lazy[1]["a"])


@each_configuration
def test_an_optimizers_step_does_not_change_what_was_carried_out(name):
    """What is read late is what would have been read at once."""
    memory, x = build(name), tokens(name)
    with torch.no_grad():
        _, early = memory(x, store_mask=mask())
        wanted = {k: v.clone() for k, v in leaves_of(early).items()}
        nothing = memory(x[..., :0, :])[1]
        start = {k: v.clone() for k, v in leaves_of(memory(x[..., :0, :])[1]).items()}
        _, late = memory(x, store_mask=mask())
        for p in memory.parameters():
            p.add_(1.0)
        got = leaves_of(late)
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
        got = leaves_of(nothing)
        assert all(torch.equal(got[k], start[k]) for k in start)
