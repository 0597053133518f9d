"""A state or cache is read by the settings that made it and by no others, shapes fit or not: the message names the
setting. What changes no state's meaning (engine, thresholds, dtype, copies, parameters) is no other setting."""

import copy
import functools
import inspect
import io
import json
import pickle

import pytest
import torch
from torch import nn

from titans_pytorch import (
    LMMLayer,
    MACLayer,
    MAGLayer,
    MALLayer,
    MemoryAsContextTransformer,
    MemoryAttention,
    MemoryMLP,
    ModelConfig,
    NeuralMemory,
    NeuralMemState,
    SegmentedAttention,
    build_model,
    gate_trace,
    mem_state_detach,
    titans_memory,
)
from titans_pytorch.mac_transformer import NOT_OF_A_CACHE
from titans_pytorch.memory.config import NOT_OF_A_STATE
from titans_pytorch.models.attention import SegmentAttention, WindowAttention
from titans_pytorch.models.language_model import NOT_OF_A_CACHE as NOT_OF_A_MODELS_CACHE
from titans_pytorch.rules.losses import LpLoss
from titans_pytorch.rules.optimizers import Muon
from titans_pytorch.rules.parts import PartsRule
from titans_pytorch.rules.retentions import LqNorm

from .subjects import AdaGradRule

DIM = 6
GATED = {"use_symplectic_gating": True}
PAGED = {**GATED, "num_pages": 4, "page_switch_every": 8}


def refused(name):
    return pytest.raises(ValueError, match=rf"^{name}\S* must be .*, got ")


def huber(prediction, target):
    return nn.functional.huber_loss(prediction, target, reduction="none").mean(dim=-1)


# (argument, what both have beside it, its two values)
MEMORY = [
    ("dim", {"model": MemoryMLP(6, 2), "dim_head": 6}, 6, 8),
    ("chunk_size", {}, 4, 8),
    ("chunk_size", {}, (4, 4), (8, 4)),
    ("batch_size", {}, 8, 16),
    ("batch_size", {}, 8, None),
    ("dim_head", {"heads": 2}, 6, 4),
    ("heads", {"dim_head": 6}, 1, 2),
    ("model", {}, MemoryMLP(DIM, 2), MemoryMLP(DIM, 3)),
    ("model", {}, MemoryAttention(DIM, scale=8.0), MemoryAttention(DIM, scale=4.0)),
    ("store_memory_loss_fn", {}, None, huber),
    ("adaptive_step_transform", {}, None, torch.sigmoid),
    ("default_step_transform_max_lr", {}, 1.0, 0.1),
    ("per_parameter_lr_modulation", {}, False, True),
    ("max_mem_layer_modulation", {"per_parameter_lr_modulation": True}, 1.0, 2.0),
    ("per_head_learned_parameters", {"heads": 2, "dim_head": 6}, True, False),
    ("attn_pool_chunks", {}, False, True),
    ("momentum", {}, True, False),
    ("momentum_order", {}, 1, 2),
    ("learned_momentum_combine", {"momentum_order": 2}, False, True),
    ("learned_combine_include_zeroth", {"learned_momentum_combine": True}, False, True),
    ("num_kv_per_token", {}, 1, 2),
    ("qkv_receives_diff_views", {}, False, True),
    ("pre_rmsnorm", {}, True, False),
    ("post_rmsnorm", {}, False, True),
    ("qk_rmsnorm", {}, False, True),
    ("max_grad_norm", {}, None, 1.0),
    ("activation", {}, None, nn.SiLU()),
    ("activation", {}, nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    ("accept_weight_residual", {}, False, True),
    ("spectral_norm_surprises", {}, False, True),
    ("gated_transition", {}, False, True),
    ("mem_model_norm_add_residual", {}, True, False),
    ("store_with_lookahead_value", {}, False, True),
    ("use_symplectic_gating", {}, False, True),
    ("symplectic_gate_kwargs", GATED, None, {"quorum_mix": 0.5}),
    ("symplectic_gate_kwargs.quorum_window", GATED, {"quorum_mix": 0.5}, {"quorum_mix": 0.5, "quorum_window": 5}),
    ("use_dmd_gating", {}, False, True),
    ("combine_symplectic_and_dmd", {}, False, True),
    ("manifold_state_keyed_paging", PAGED | {"symplectic_gate_kwargs": {"phase_mix": 0.5}}, False, True),
    ("hierarchical_paging", PAGED, False, True),
    ("coarse_pages", PAGED | {"hierarchical_paging": True}, 2, 4),
    ("fine_pages", PAGED | {"hierarchical_paging": True}, 2, 4),
    ("hierarchy_mix", PAGED | {"hierarchical_paging": True}, 1.0, 0.5),
    ("kinetics_coupling", {"kinetics_mix": 0.5}, False, True),
    ("kinetics_mix", {"kinetics_coupling": True}, 0.0, 0.5),
    ("kinetics_eps", {"kinetics_coupling": True, "kinetics_mix": 0.5}, 1e-6, 1e-3),
    ("num_pages", PAGED, 2, 4),
    ("page_switch_every", PAGED, 8, 4),
    ("dmd_window", {"use_dmd_gating": True}, None, 5),
    ("symplectic_gate", GATED, None, nn.Linear(DIM, 1)),
    ("page_router", PAGED, None, lambda page, complexity, angle: page),
    ("page_threshold_quantile", PAGED, None, 0.5),
    ("page_threshold_window", PAGED | {"page_threshold_quantile": 0.5}, 64, 32),
    ("read_active_page_only", PAGED, False, True),
    ("update_rule", {}, None, AdaGradRule()),
    ("update_rule.retention.q", {}, PartsRule(retention=LqNorm(4.0)), PartsRule(retention=LqNorm(3.5))),
    ("update_rule.optimizer", {}, PartsRule(optimizer=Muon()), PartsRule(optimizer=Muon(outside=True))),
    ("store_memory_loss_fn.p", {}, LpLoss(3.0), LpLoss(2.0)),
    ("learned_step", {}, True, False),
    ("forget_gate", {}, True, False),
    ("decay_first", {}, False, True),
    ("surprise_window", {}, 1, 3),
    ("qkv_conv_kernel", {}, None, 4),
    ("qkv_conv_kernel", {}, 2, 4),
    ("qk_l2norm", {}, False, True),
    ("output_gate", {}, None, "silu"),
    ("surprise_source", {}, "memory", "prediction"),
]
MEMORY_NAMES = {name.partition(".")[0] for name, *_ in MEMORY}


def memory_of(name, beside, value):
    options = {"chunk_size": 4, "batch_size": 8, **beside}
    if name == "dim":
        return NeuralMemory(value, **options)
    options[name.partition(".")[0]] = value
    if name == "combine_symplectic_and_dmd" and value:
        options |= {"use_symplectic_gating": True, "use_dmd_gating": True}
    return NeuralMemory(DIM, **options)


def tokens(memory, n=9, seed=0):
    views = (3,) if memory.diff_views else ()
    dtype = memory.memory_model_parameters[0].dtype
    return torch.randn(*views, 2, n, memory.dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_keyword_of_the_memory_is_listed():
    keywords = set(inspect.signature(NeuralMemory.__init__).parameters) - {"self"}
    assert MEMORY_NAMES | set(NOT_OF_A_STATE) == keywords
    assert not MEMORY_NAMES & set(NOT_OF_A_STATE)


@pytest.mark.parametrize(("name", "beside", "one", "other"), MEMORY, ids=[f"{m[0]}-{i}" for i, m in enumerate(MEMORY)])
@torch.no_grad()
def test_a_memory_refuses_the_state_of_another(name, beside, one, other):
    a, b = memory_of(name, beside, one), memory_of(name, beside, other)
    for maker, reader in ((a, b), (b, a)):
        if name == "combine_symplectic_and_dmd":
            name = "(use_symplectic_gating|use_dmd_gating)"
        _, state = maker(tokens(maker))
        same = memory_of(name, beside, one if maker is a else other) if "|" not in name else maker
        assert torch.isfinite(same(tokens(same), state=state)[0]).all()
        table = NeuralMemState.from_tensordict(state.to_tensordict()[[1, 0]])
        for given in (state, mem_state_detach(state), pickle.loads(pickle.dumps(state)), table):
            with refused(f"state.{name}"):
                reader(tokens(reader), state=given)
            if reader.gates is not None and reader.gates.stages:
                with refused(f"state.{name}"):
                    gate_trace(reader, tokens(reader), state=given)


def saved(value):
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file)


def test_settings_and_not_objects_count():
    """A memory of the same settings reads the state: a copy, a fresh one with its parameters, another engine, after
    thresholds were set, in another dtype, compiled; the state may be a copy, too."""
    options = {"chunk_size": 4, "batch_size": 8, **PAGED, "activation": nn.SiLU(), "store_memory_loss_fn": huber}
    memory = NeuralMemory(DIM, **options, symplectic_page_threshold=0.2)
    fresh = NeuralMemory(DIM, **options, engine="reference", use_accelerated_scan=True, init_decay_bias=-3.0)
    fresh.load_state_dict(memory.state_dict())
    fresh.symplectic_page_threshold, fresh.surprise_threshold = 0.2, None
    readers = [memory, fresh, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))]
    readers.append(torch.compile(memory, backend="eager"))
    with torch.no_grad():
        _, state = memory(tokens(memory))
        wanted, _ = memory(tokens(memory, seed=1), state=state)
        table = NeuralMemState.from_tensordict(state.to_tensordict())
        copies = [state, mem_state_detach(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), saved(state)]
        for given in (*copies, table, state._replace(configuration=None)):
            for reader in readers:
                got, after = reader(tokens(memory, seed=1), state=given)
                assert torch.allclose(got, wanted, atol=1e-5)
                assert after.configuration == memory.configuration
        double = copy.deepcopy(memory).double()
        assert double.configuration == memory.configuration
        _, state = double(tokens(double))
        double(tokens(double), state=saved(state))
        memory.surprise_threshold, memory.symplectic_page_threshold = 0.1, 0.9
        memory(tokens(memory), state=memory(tokens(memory))[1])


def test_a_batch_size_for_one_call_makes_no_other_state():
    """ttt_batch_size moves the start weights at other tokens of its call; the memory and its states stay what they
    are."""
    memory = NeuralMemory(DIM, 4, batch_size=8)
    with torch.no_grad():
        _, state = memory(tokens(memory), ttt_batch_size=4)
        assert state.configuration == memory.configuration
        memory(tokens(memory), state=state)
        memory(tokens(memory), state=state, ttt_batch_size=16)


def test_states_made_by_hand_are_read_by_their_shapes():
    memory, x = NeuralMemory(DIM, 4), torch.randn(2, 9, DIM)
    weights = {name: torch.randn_like(value) for name, value in memory.init_weights(2).items()}
    _, state = memory(x, state=NeuralMemState(0, weights))
    assert state.configuration == memory.configuration
    with pytest.raises(ValueError, match=r"^state.weights\['norm.gamma'\] must be "):
        memory(x, state=NeuralMemState(0, {name: value[:1] for name, value in weights.items()}))
    for made_by in ("{", "[]", "3", 3, {}):
        with pytest.raises(ValueError, match="^state.configuration must be as the call before returned it"):
            memory(x, state=state._replace(configuration=made_by))


def test_a_setting_that_came_later_had_its_default_before():
    """An older state lacks it; a newer one may have another value, which an older version refuses by name."""
    memory = NeuralMemory(DIM, 4, momentum=False)
    state = memory(tokens(memory))[1]
    settings = json.loads(state.configuration)
    newer = state._replace(configuration=json.dumps({**settings, "option_of_tomorrow": 3}))
    with pytest.raises(ValueError, match="^state.option_of_tomorrow must be its default, got 3$"):
        memory(tokens(memory), state=newer)
    del settings["momentum"]
    with pytest.raises(ValueError, match="^state.momentum must be False, got True$"):
        memory(tokens(memory), state=state._replace(configuration=json.dumps(settings)))


def test_a_table_of_rows_of_several_memories():
    tables = []
    for batch in (8, 16):
        memory = NeuralMemory(DIM, 4, batch_size=batch)
        tables.append(memory(tokens(memory))[1].to_tensordict())
    for joined in (torch.cat(tables), torch.stack(tables).flatten()):
        with refused("td.batch_size"):
            NeuralMemState.from_tensordict(joined)


MODEL = {
    "variant": ("mag", "mal"),
    "rule": ("titans", "yaad"),
    "vocab_size": (16, 17),
    "d_model": (16, 32),
    "n_layers": (1, 2),
    "n_heads": (2, 1),
    "ffn_mult": (2.0, 4.0),
    "n_persistent": (2, 3),
    "window": (8, 6),
    "mem_layers": (2, 1),
    "d_hidden": (16, 32),
    "mem_heads": (2, 4),
    "chunk_size": (4, 8),
    "use_momentum": (True, False),
    "use_decay": (True, False),
    "max_step": (0.1, 0.2),
    "surprise_source": ("memory", "prediction"),
    "conv_kernel": (4, 2),
    "qk_norm": ("l2", "none"),
    "gate": ("normalised", "silu"),
    "mem_norm": (False, True),
}


def model_of(**settings):
    small = {"vocab_size": 16, "d_model": 16, "n_layers": 1, "n_heads": 2, "mem_heads": 2, "window": 8, "chunk_size": 4}
    return build_model(ModelConfig(**small | settings)).eval()


def ids(n=7):
    return torch.randint(0, 16, (2, n), generator=torch.Generator().manual_seed(0))


def test_every_setting_of_a_model_is_listed():
    assert {*MODEL, *NOT_OF_A_MODELS_CACHE} == set(inspect.signature(ModelConfig).parameters)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "baseline"])
@pytest.mark.parametrize("name", MODEL)
@torch.no_grad()
def test_a_model_refuses_the_cache_of_another(variant, name):
    one, other = (model_of(**{"variant": variant, name: value}) for value in MODEL[name])
    for maker, reader in ((one, other), (other, one)):
        _, cache = maker(ids(), return_cache=True)
        for given in (cache, cache.detach(), cache.rows(torch.tensor([1, 0])), pickle.loads(pickle.dumps(cache))):
            with refused(f"cache.{name}"):
                reader(ids(), cache=given)
        twin = build_model(maker.config).eval()
        twin.load_state_dict(maker.state_dict())
        assert torch.equal(twin(ids(), cache=saved(cache)), maker(ids(), cache=cache))


def test_blocks_refuse_the_states_of_other_variants():
    states = {}
    for variant in ("mac", "mag", "mal", "lmm"):
        model = model_of(variant=variant)
        states[variant] = model(ids(), return_cache=True)[1]
    for variant in states:
        for other in set(states) - {variant}:
            with pytest.raises(
                ValueError, match=rf"^state must be the {variant.upper()}State that .*, got {other.upper()}State"
            ):
                model_of(variant=variant)(ids(), cache=states[other]._replace(configuration=None))


LAYERS = [
    (MACLayer, {"segment": (4, 6), "n_persistent": (2, 3), "gate": ("silu", "sigmoid"), "heads": (2, 1)}),
    (MAGLayer, {"window": (4, 6), "n_persistent": (2, 3), "gate": ("silu", "sigmoid"), "heads": (2, 1)}),
    (MALLayer, {"window": (4, 6), "n_persistent": (2, 3), "heads": (2, 1)}),
    (LMMLayer, {"n_persistent": (2, 3)}),
]


@pytest.mark.parametrize(("kind", "changes"), LAYERS)
@torch.no_grad()
def test_a_layer_refuses_the_state_of_another(kind, changes):
    x = torch.randn(2, 7, 8)
    for name, (one, other) in changes.items():
        given = {"memory": titans_memory(8, chunk_size=4)} | ({} if kind is LMMLayer else {"heads": 2})
        maker, reader = (kind(8, **copy.deepcopy(given) | {name: value}) for value in (one, other))
        _, state = maker(x)
        maker(x, state)
        with refused(f"state.{name}"):
            reader(x, state)
    maker, other_memory = (kind(8, heads=2, memory=titans_memory(8, chunk_size=chunk)) for chunk in (4, 8))
    with refused("state.batch_size"):
        other_memory(x, maker(x)[1])
    with pytest.raises(ValueError, match=rf"^state must be the {kind.__name__[:3]}State that"):
        maker(x, tuple(maker(x)[1]))


ATTENTION = {
    "dim": (16, 24),
    "segment_len": (4, 6),
    "num_persist_mem_tokens": (0, 2),
    "num_longterm_mem_tokens": (0, 2),
    "dim_head": (8, 4),
    "heads": (2, 1),
    "sliding": (False, True),
    "accept_value_residual": (False, True),
    "attend_kwargs": (None, {"scale": 0.5}),
}


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_refuses_the_cache_of_another(name):
    assert {*ATTENTION, "use_flex_attn", "self"} == set(inspect.signature(SegmentedAttention.__init__).parameters)

    def run(value, cache=None):
        options = {"dim": 16, "segment_len": 4, "dim_head": 8, "heads": 2, name: value}
        attention = SegmentedAttention(**options)
        heads, width = options["heads"], options["dim_head"]
        values = torch.randn(2, heads, 3, width) if options.get("accept_value_residual") else None
        return attention(torch.randn(2, 3, options["dim"]), values, cache=cache)[1].cached_key_values

    one, other = ATTENTION[name]
    for maker, reader in ((one, other), (other, one)):
        run(maker, saved(run(maker)))
        with refused(f"cache.{name}"):
            run(reader, run(maker))


@torch.no_grad()
def test_attention_of_the_family_refuses_the_cache_of_another():
    x, p = torch.randn(2, 3, 16), torch.randn(2, 16)
    for kind, name, args in ((WindowAttention, "window", (x, p)), (SegmentAttention, "segment", (x, x, p))):
        _, cache = kind(16, 2, 8)(*args, None)
        kind(16, 2, 8)(*args, cache)
        with refused(f"cache.{name}"):
            kind(16, 2, 6)(*args, cache)
        with refused("cache.heads"):
            kind(16, 4, 8)(*args, cache)
        with pytest.raises(ValueError, match=r"^cache.keys must be of shape \(2, 4, 3, 4\).*, got \(2, 2, 3, 8\)"):
            kind(16, 4, 8)(*args, cache._replace(configuration=None))
    # a cache of another window, made by hand: the number of keys does not go with the position
    _, cache = WindowAttention(16, 2, 2)(x, p, None)
    with pytest.raises(
        ValueError, match=r"^cache.keys must be of shape \(2, 2, 3, 8\) at position 3, got \(2, 2, 2, 8\)"
    ):
        WindowAttention(16, 2, 8)(x, p, cache._replace(configuration=None))


TRANSFORMER = {
    "num_tokens": (16, 17),
    "dim": (16, 32),
    "depth": (2, 3),
    "segment_len": (4, 6),
    "neural_memory_segment_len": (4, 2),
    "neural_mem_gate_attn_output": (False, True),
    "num_longterm_mem_tokens": (0, 2),
    "num_persist_mem_tokens": (0, 2),
    "neural_memory_batch_size": (8, 16),
    "neural_memory_qkv_receives_diff_views": (False, True),
    "dim_head": (8, 4),
    "heads": (2, 1),
    "ff_mult": (2, 4),
    "num_residual_streams": (4, 1),
    "neural_memory_model": (None, MemoryMLP(16, 1)),
    "neural_memory_kwargs": ({"momentum_order": 1}, {"momentum_order": 2}),
    "neural_memory_layers": ((1,), (2,)),
    "sliding_window_attn": (False, True),
    "neural_mem_weight_residual": (False, True),
}


def transformer_of(**options):
    small = {"num_tokens": 16, "dim": 16, "depth": 2, "segment_len": 4, "dim_head": 8, "heads": 2}
    small |= {"neural_memory_segment_len": 4, "neural_memory_batch_size": 8}
    return MemoryAsContextTransformer(**small | options).eval()


def test_every_argument_of_the_transformer_is_listed():
    assert {*TRANSFORMER, *NOT_OF_A_CACHE} == set(inspect.signature(MemoryAsContextTransformer).parameters)


@pytest.mark.parametrize("name", TRANSFORMER)
@torch.no_grad()
def test_the_transformer_refuses_the_cache_of_another(name):
    batch = {"neural_memory_batch_size": 12} if name == "segment_len" else {}
    one, other = (transformer_of(**batch | {name: value}) for value in TRANSFORMER[name])
    for maker, reader in ((one, other), (other, one)):
        _, cache = maker(ids(), return_cache=True)
        assert torch.equal(maker(ids(), cache=saved(cache)), maker(ids(), cache=cache))
        for use in (functools.partial(reader, ids(), cache=cache), functools.partial(reader.decoder, cache)):
            with refused(f"cache.{name}"):
                use()


@torch.no_grad()
def test_the_transformers_layers_refuse_the_caches_of_others():
    """Also where the whole was put together by hand, in both ways of reading on."""
    model, other = transformer_of(), transformer_of(neural_memory_batch_size=16)
    cache, foreign = (m(ids(), return_cache=True)[1] for m in (model, other))
    mixed = cache._replace(layers=(cache.layers[0], foreign.layers[1]), configuration=None)
    windowed = transformer_of(sliding_window_attn=True)(ids(3), return_cache=True)[1]._replace(configuration=None)
    for given, name in ((mixed, "state.batch_size"), (windowed, "cache.sliding")):
        with refused(name):
            model(ids(), cache=given)
        with refused(name):
            model.decoder(given)
    for given in (None, (), cache.layers):
        with pytest.raises(ValueError, match="^cache must be the MacCache that an earlier call returned"):
            model.decoder(given)


@torch.no_grad()
def test_a_decoders_cache_is_the_models():
    model = transformer_of()
    decoder = model.decoder(model(ids(), return_cache=True)[1])
    tokens_read, layers, made_by = decoder.cache()
    assert (tokens_read, made_by) == (7, model.configuration)
    other = transformer_of(neural_memory_batch_size=16)
    assert [layer.attention.configuration for layer in layers] == [
        layer.attention.configuration for layer in model.layers
    ]
    assert [layer.memory.configuration for layer in layers] == [layer.memory.configuration for layer in model.layers]
    assert layers[0].memory.configuration != other.layers[0].memory.configuration
