"""MemoryAsContextTransformer: the released package's numbers, the laws over random options, and use as a module."""

import io
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import titans_pytorch
from titans_pytorch import mac_transformer
from titans_pytorch.interop.peer import load_peer_state_dict
from titans_pytorch.interop.peer_mac import translate_mac_keys
from titans_pytorch.mac_transformer import MemoryAsContextTransformer, SegmentedAttention, flex_attention
from titans_pytorch.memory.presets import paper_memory_kwargs
from titans_pytorch.memory_models import MemoryMLP

from .helpers import refusal
from .mac_options import OPTIONS, TOKENS, build, draw_ids, float64

VECTORS = Path(__file__).parent / "vectors"
TAME = {"qk_rmsnorm": True, "default_step_transform_max_lr": 0.1}
PLAIN = {"depth": 2, "segment_len": 4, "neural_memory_layers": ()}
FULL = {
    "depth": 3,
    "segment_len": 4,
    "num_longterm_mem_tokens": 1,
    "num_persist_mem_tokens": 2,
    "neural_memory_segment_len": 2,
    "neural_memory_batch_size": 4,
    "neural_mem_weight_residual": True,
    "neural_memory_qkv_receives_diff_views": True,
    "neural_memory_layers": (1, 3),
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# the released package's numbers


def from_vector(name):
    case = torch.load(VECTORS / f"mac_{name}.pt", weights_only=True)
    kwargs = json.loads(case["kwargs"])
    with float64():
        if "neural_memory_model" in kwargs:
            name, arguments = kwargs["neural_memory_model"]["__model__"]
            kwargs["neural_memory_model"] = getattr(titans_pytorch, name)(**arguments)
        model = MemoryAsContextTransformer(**kwargs)
    load_peer_state_dict(model, case["state_dict"])
    return model, case


@pytest.mark.parametrize("name", ["base", "gate", "train_mac"])
def test_agrees_with_the_released_package(name):
    model, case = from_vector(name)
    assert relative(model(case["ids"]), case["logits"]) < 1e-5
    loss = model(case["ids"], return_loss=True)
    assert relative(loss, case["loss"]) < 1e-5

    loss.backward()
    grads = {key: case["grads"].get(key, torch.zeros_like(value)) for key, value in case["state_dict"].items()}
    grads = translate_mac_keys(model, grads)
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-4, atol=1e-5, msg=key)


def test_released_state_dict_that_does_not_fit_is_named():
    model, case = from_vector("train_mac")
    state = case["state_dict"]
    without = {key: value for key, value in state.items() if key != "layers.1.5.to_out.weight"}
    with pytest.raises(ValueError, match="layers.1.attention.to_out.weight"):
        load_peer_state_dict(model, without)
    for key in ("layers.9.0.static_alpha", "layers.1.7.weight", "layers.0.4.to_keys.weight", "surprise"):
        with pytest.raises(ValueError, match=key):
            load_peer_state_dict(model, {**state, key: torch.zeros(1)})
    with pytest.raises(ValueError, match="to_logits.weight"):
        load_peer_state_dict(model, {**state, "to_logits.weight": torch.zeros(3, 3)})


# laws


@settings(max_examples=40, deadline=None)
@given(options=OPTIONS, n=st.integers(2, 30), at=st.integers(0, 29), seed=st.integers(0, 99))
def test_causal(options, n, at, seed):
    model, ids, at = build(options, seed), draw_ids(1, n, seed), min(at, n - 2)
    changed = ids.clone()
    changed[:, at + 1 :] = (changed[:, at + 1 :] + 1 + draw_ids(1, n - at - 1, seed + 1) % (TOKENS - 1)) % TOKENS
    with torch.no_grad():
        out, other = model(ids), model(changed)
        cut = model(ids[:, : at + 1])
    assert relative(out[:, : at + 1], other[:, : at + 1]) < 1e-9
    assert relative(out[:, : at + 1], cut) < 1e-9
    assert not torch.allclose(out[:, at + 1 :], other[:, at + 1 :])


@settings(max_examples=40, deadline=None)
@given(options=OPTIONS, pieces=st.lists(st.integers(1, 11), min_size=2, max_size=7), seed=st.integers(0, 99))
def test_any_pieces_equal_the_whole(options, pieces, seed):
    model, ids = build(options, seed), draw_ids(2, sum(pieces), seed)
    with torch.no_grad():
        assert_pieces_equal_the_whole(model, ids, pieces)


@settings(max_examples=10, deadline=None)
@given(options=OPTIONS, prompt=st.integers(1, 16), seed=st.integers(0, 99))
def test_one_token_at_a_time_equals_the_whole(options, prompt, seed):
    model, ids = build(options, seed), draw_ids(1, 17, seed)
    with torch.no_grad():
        assert_pieces_equal_the_whole(model, ids, [prompt] + [1] * (17 - prompt))


@pytest.mark.parametrize("name", ["base", "gate", "train_mac"])
def test_pieces_equal_the_whole_in_the_released_models(name):
    model, case = from_vector(name)
    with torch.no_grad():
        assert_pieces_equal_the_whole(model, case["ids"], [11, 1, 2, 1, 6] + [1] * (case["ids"].shape[1] - 21))


@pytest.mark.parametrize(
    "threshold",
    [{}, {"surprise_threshold": 0.1}, {"surprise_threshold": 1.0, "surprise_source": "prediction"}],
    ids=str,
)
def test_pieces_equal_the_whole_with_the_papers_memory(threshold):
    memory = paper_memory_kwargs(6, segment=4, heads=2, **threshold)
    chunk, batch = memory.pop("chunk_size"), memory.pop("batch_size")
    options = {"depth": 2, "segment_len": 5, "num_longterm_mem_tokens": 1, "neural_memory_kwargs": memory}
    model = build(options, neural_memory_segment_len=chunk, neural_memory_batch_size=batch)
    with torch.no_grad():
        assert_pieces_equal_the_whole(model, draw_ids(2, 20), [7, 1, 1, 1, 4, 1, 5])


def assert_pieces_equal_the_whole(model, ids, pieces):
    whole = model(ids)
    outs, cache = [], None
    for piece in ids.split(pieces, dim=1):
        out, cache = model(piece, cache=cache, return_cache=True)
        outs.append(out)
    assert cache.tokens == ids.shape[1]
    assert relative(torch.cat(outs, dim=1), whole) < 1e-8  # memories amplify rounding


@settings(max_examples=15, deadline=None)
@given(options=OPTIONS, n=st.integers(1, 25), seed=st.integers(0, 99))
def test_rows_do_not_influence_each_other(options, n, seed):
    model, ids = build(options, seed), draw_ids(3, n, seed)
    with torch.no_grad():
        together = model(ids)
        for row in range(3):
            assert relative(model(ids[row : row + 1]), together[row : row + 1]) < 1e-9


def test_gradients_through_pieces_equal_the_whole():
    model, ids = build(FULL), draw_ids(2, 17)
    probe = torch.randn(2, 17, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad((model(ids) * probe).sum(), parameters)
    outs, cache = [], None
    for piece in ids.split(5, dim=1):
        out, cache = model(piece, cache=cache, return_cache=True)
        outs.append(out)
    pieces = torch.autograd.grad((torch.cat(outs, dim=1) * probe).sum(), parameters)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def sizes(tree):
    """How many numbers the storages behind a nested cache hold."""
    if isinstance(tree, torch.Tensor):
        return tree.untyped_storage().nbytes()
    if isinstance(tree, dict):
        return sum(map(sizes, tree.values()))
    return sum(map(sizes, tree)) if isinstance(tree, tuple | list) else 0


@pytest.mark.parametrize("sliding", [False, True])
def test_cache_does_not_grow_and_is_not_modified(sliding):
    model = build({**FULL, "sliding_window_attn": sliding})
    with torch.no_grad():
        _, early = model(draw_ids(1, 23), return_cache=True)
        _, late = model(draw_ids(1, 123), return_cache=True)
        assert sizes([tuple(layer.attention) for layer in early.layers]) == sizes(
            [tuple(layer.attention) for layer in late.layers]
        )
        assert all(layer.memory is None or layer.memory.updates is None for layer in late.layers)

        token = draw_ids(1, 1, seed=5)
        first = model(token, cache=late)
        again, _ = model(token, cache=late, return_cache=True)
        assert torch.equal(first, again)


# single options


def test_loss_is_next_token_cross_entropy():
    model, ids = build(FULL), draw_ids(2, 14)
    logits = model(ids[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, TOKENS), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(model(ids, return_loss=True), expected)


def test_memory_layers_are_where_asked():
    layers = build({"depth": 4, "segment_len": 4, "neural_memory_layers": [2, 4]}).layers
    assert [layer.memory is not None for layer in layers] == [False, True, False, True]
    assert all(layer.memory is not None for layer in build({"depth": 3, "segment_len": 4}).layers)


def test_layers_have_their_own_copy_of_the_memory_model():
    given_model = MemoryMLP(12, depth=1)
    model = build({"depth": 2, "segment_len": 4}, neural_memory_model=given_model)
    a, b = (next(iter(layer.memory.memory_model_parameters)) for layer in model.layers)
    assert a is not b
    assert not torch.equal(a, b)


def test_weight_residual_is_for_memory_layers_behind_another():
    model = build({**FULL, "neural_memory_layers": (2, 3, 4), "depth": 4})
    accepts = [layer.memory is not None and layer.memory.accept_weight_residual for layer in model.layers]
    assert accepts == [False, False, True, True]


def test_weight_residual_is_from_the_nearest_memory_layer_before():
    model = build({**FULL, "neural_memory_layers": (1, 2, 4), "depth": 4})
    taken, left = [], []

    def record(memory, args, kwargs, out):
        taken.append(kwargs["prev_weights"])
        left.append(out[1].updates)

    for layer in model.layers:
        if layer.memory is not None:
            layer.memory.register_forward_hook(record, with_kwargs=True)
    model(draw_ids(1, 9))
    assert taken[0] is None
    assert taken[1] is left[0]
    assert taken[2] is left[1]


def test_no_option_that_is_off_leaves_a_trace_in_the_parameters():
    names = {name for name, _ in build(PLAIN).named_parameters()}
    assert not any(part in name for name in names for part in ("memory.", "memory_connection", "view_selector"))
    assert "layers.0.attention.to_value_mix.weight" not in names
    assert "layers.1.attention.to_value_mix.weight" in names


@pytest.mark.parametrize(
    ("batch_size", "kwargs", "expected"),
    [
        (8, {"num_pages": 2}, {"num_pages": 2, "page_switch_every": 8}),
        (None, {"num_pages": 2}, {"num_pages": 2, "page_switch_every": 4}),
        (8, {"num_pages": 2, "page_switch_every": 12}, {"num_pages": 2, "page_switch_every": 12}),
        (8, {"num_pages": 1}, {"num_pages": 1}),
        (8, {"heads": 2}, {"heads": 2}),
    ],
)
def test_memory_arguments_pass_through(monkeypatch, batch_size, kwargs, expected):
    """With pages, training and cached sampling have to agree on when a page may switch."""
    seen = []

    class Recorder(nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            seen.append(arguments)

    monkeypatch.setattr(mac_transformer, "NeuralMemory", Recorder)
    build({"depth": 1, "segment_len": 4}, neural_memory_batch_size=batch_size, neural_memory_kwargs=kwargs)
    own = {"dim": 12, "chunk_size": 4, "batch_size": batch_size, "model": None}
    own |= {"qkv_receives_diff_views": False, "accept_weight_residual": False}
    assert seen == [{**own, **expected}]


def test_own_token_embedding():
    class Tripled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    own = Tripled(TOKENS, 12).double()
    model = build(PLAIN, token_emb=own)
    assert model.token_emb is own
    twin = deepcopy(model)
    twin.token_emb = nn.Embedding.from_pretrained(own.weight.detach() * 3)
    torch.testing.assert_close(model(draw_ids(1, 9)), twin(draw_ids(1, 9)))


def test_add_value_residual_has_no_effect():
    ids = draw_ids(1, 9)
    assert torch.equal(build(FULL)(ids), build(FULL, neural_memory_add_value_residual=True)(ids))


def test_flex_attention_is_offered_and_off_on_cpu():
    assert flex_attention is mac_transformer.flex_attention
    assert mac_transformer.SegmentedAttention is SegmentedAttention
    ids = draw_ids(1, 9)
    plain, flex = build(PLAIN), build(PLAIN, use_flex_attn=True)
    assert torch.equal(plain(ids), flex(ids))
    assert torch.equal(plain(ids), flex(ids, disable_flex_attn=True))


# as a module


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("gate", [False, True])
def test_every_parameter_gets_a_gradient(streams, gate):
    model = build({**FULL, "num_residual_streams": streams, "neural_mem_gate_attn_output": gate})
    model(draw_ids(2, 17), return_loss=True).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_seed_alone_decides_the_initial_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(MemoryAsContextTransformer(num_tokens=5, dim=8, depth=2, segment_len=4, heads=1, dim_head=8))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_copies_agree():
    model, ids = build(FULL), draw_ids(2, 15)
    expected = model(ids)
    assert torch.equal(deepcopy(model)(ids), expected)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(ids), expected)

    other = build(FULL, seed=1)
    assert not torch.equal(other(ids), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), expected)


def test_inference_mode_and_checkpointing_agree():
    model, ids = build(FULL), draw_ids(2, 15)
    expected = model(ids)
    with torch.inference_mode():
        out, cache = model(ids, return_cache=True)
        more = model(ids[:, :3], cache=cache)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(more, model(torch.cat((ids, ids[:, :3]), dim=1))[:, 15:])

    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    again = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), parameters), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_agrees():
    model, ids = build({**PLAIN, "depth": 1, "num_longterm_mem_tokens": 1}), draw_ids(2, 15)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_half_precision_stays_close():
    model, ids = build({**FULL, "neural_memory_kwargs": TAME}).float(), draw_ids(2, 25)
    expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, return_loss=True)
        mixed = model(ids)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert relative(mixed.float(), expected) < 0.1
    assert relative(model.bfloat16()(ids).float(), expected) < 0.1


# wrong input


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"dim": -1}, "dim"),
        ({"depth": 0}, "depth"),
        ({"segment_len": 1.5}, "segment_len"),
        ({"num_longterm_mem_tokens": -1}, "num_longterm_mem_tokens"),
        ({"num_persist_mem_tokens": -1}, "num_persist_mem_tokens"),
        ({"num_residual_streams": 0}, "num_residual_streams"),
        ({"neural_memory_segment_len": 0}, "neural_memory_segment_len"),
        ({"neural_memory_layers": (0,)}, "neural_memory_layers"),
        ({"neural_memory_layers": (1, 3)}, "neural_memory_layers"),
        ({"neural_memory_layers": 2}, "neural_memory_layers"),
        ({"neural_memory_kwargs": {"chunk_size": 4}}, "neural_memory_kwargs"),
        ({"neural_memory_kwargs": 3}, "neural_memory_kwargs"),
        ({"neural_memory_batch_size": 7}, "neural_memory_batch_size"),
        ({"ff_mult": 0}, "ff_mult"),
        ({"dim_head": 5}, "dim_head"),
        ({"heads": 0}, "heads"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=refusal(name)):
        build({"depth": 2, "segment_len": 4, **kwargs})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"^ids must be token ids.*, got \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"^ids must be token ids.*, got \(2, 0\)"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"^ids must be .*, got \(2, 3, 4\)"),
        (torch.zeros(2, 3), "^ids must be integer token ids, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), "^ids must be .*, got torch.bool"),
        (torch.full((2, 3), TOKENS), f"^ids must be ids from 0 to {TOKENS - 1}, got token id {TOKENS}"),
        (torch.full((2, 3), -1), "^ids must be .*, got token id -1"),
        ([[1, 2]], "^ids must be .*, got list"),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        build(PLAIN)(ids)


def test_bad_calls_are_named():
    model, ids = build(PLAIN), draw_ids(2, 5)
    _, cache = model(ids, return_cache=True)
    with pytest.raises(ValueError, match="^return_loss=True needs at least two tokens and no cache"):
        model(ids[:, :1], return_loss=True)
    with pytest.raises(ValueError, match="^return_loss=True needs"):
        model(ids, return_loss=True, cache=cache)
    with pytest.raises(ValueError, match="^cache must be .*, got a batch of 2"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="^cache must be .*, got dict"):
        model(ids, cache={})
    with pytest.raises(ValueError, match="^cache.depth must be 3, got 2$"):
        build({**PLAIN, "depth": 3})(ids, cache=cache)
    with pytest.raises(ValueError, match="^cache must be of 3 layers, got 2 layers$"):
        build({**PLAIN, "depth": 3})(ids, cache=cache._replace(configuration=None))
