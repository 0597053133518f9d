"""Counting: against numbers worked out by hand, against slow counts, and against what torch counts when it runs."""

import pytest
import torch
from harness import operations as ops
from harness.operations import MemoryShape
from speed.arms import FullAttention
from speed.cases import ENWIK8_TRANSFORMER, NAMED, TRAIN_MAC_MEMORY, memory_shape, operations, sweep_case
from torch.utils.flop_counter import FlopCounterMode

SMALL = MemoryShape(dim=6, chunk=2, weights=((3, 5), (5, 3)), heads=2, dim_head=3, anchor=4)


def test_a_product_by_hand():
    assert ops.product(2, 3, 4) == 2 * 4 * (3 + 3)  # of each of 8 outputs 3 multiplications and 3 additions


def test_a_small_memory_by_hand():
    # 8 tokens in 4 chunks of 2, one row, two heads; a weight has 15 numbers, one pass of a vector through it costs 30
    parts = ops.memory_operations(SMALL, batch=1, tokens=8)
    assert parts["projections"] == 4 * 8 * 2 * 6 * 6  # query, key, value and output, each 6 x 6
    assert parts["surprise"] == 2 * 8 * (30 + 60)  # forward through both, back through the second only
    assert parts["rates"] == 8 * 2 * 6 * (2 + 2) + 4 * 2 * 6 * 2 * 2  # step and read gate; decay and momentum
    recurrent = 8 * 30 + 4 * 2 * 30 + 8 * 30  # gradients; momentum and memory of each chunk; reads
    assert ops.recurrent_operations(SMALL, 3, 5, 8) == recurrent == 720
    assert parts["store and read"] == 2 * 2 * 720
    assert parts["spectral norm"] == 0


def test_a_window_of_the_dual_form_by_hand():
    # windows of 4 tokens, chunks of 2: queries 0..3 see 0, 2, 2, 4 pairs
    assert ops.visible_pairs(4, 2) == 8
    # of each window: 4 reads of memory and momentum, 8 pairs seen, 4 pairs into memory and momentum, and their sums
    window = 4 * 60 + 8 * 2 * (3 + 5) + 4 * 60 + 60
    assert ops.dual_operations(SMALL, 3, 5, tokens=8, window=4) == 2 * window == 1336


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (7, 1), (8, 4), (11, 4), (3, 5)])
def test_pairs_seen_one_by_one(tokens, chunk):
    seen = sum((t + 1) // chunk * chunk for t in range(tokens))
    assert ops.visible_pairs(tokens, chunk) == seen


@pytest.mark.parametrize(("order", "cheaper"), [(0, "dual"), (1, "recurrent")])
def test_the_cheaper_form_is_needed(order, cheaper):
    # chunks of one token: without momentum there is less to carry than to build
    wide = MemoryShape(dim=64, chunk=1, weights=((64, 64),), anchor=64, momentum_order=order)
    (form,) = ops.memory_forms(wide, 256)
    assert form["recurrent"] == 256 * 2 * 64 * 64 * (1 + (1 + order) + 1)
    assert form["dual"] == min(ops.dual_operations(wide, 64, 64, 256, t) for t in (1, 2, 4, 8, 16, 32, 64))
    assert min(form, key=form.get) == cheaper
    assert ops.memory_operations(wide, 1, 256)["store and read"] == form[cheaper]


def test_newton_schulz_by_hand():
    # 2 x 3: the plain iteration costs 5 x (24 + 16 + 24); Gram 24, last product 24, 17 squares of 16
    assert ops.newton_schulz_operations(2, 3) == ops.newton_schulz_operations(3, 2) == min(5 * 64, 48 + 17 * 16)
    # a long side: both passes over it once
    assert ops.newton_schulz_operations(4, 4000) == 2 * (2 * 4 * 4 * 4000) + 17 * 2 * 4**3


def test_spectral_norm_needs_built_weights():
    shape = MemoryShape(dim=6, chunk=2, weights=((3, 5),), anchor=4, spectral=True)
    assert [set(form) for form in ops.memory_forms(shape, 8)] == [{"recurrent"}]
    assert ops.memory_operations(shape, 3, 8)["spectral norm"] == 3 * 4 * ops.newton_schulz_operations(3, 5)


def flops_of(module, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def test_attention_as_torch_counts_it():
    layer = FullAttention(dim=12, heads=2, dim_head=4)
    counted = flops_of(layer, torch.randn(3, 10, 12))
    linear = sum(counted[f"FullAttention.{name}"] for name in ("to_qkv", "to_out"))
    causal = 3 * 2 * (2 * 2 * 4 * 55)  # rows, heads, scores and values of 55 pairs
    assert ops.attention_operations(12, 2, 4, batch=3, tokens=10) == linear + causal


def test_the_maps_of_a_memory_as_torch_counts_them():
    from titans_pytorch import NeuralMemory

    kwargs = {"dim": 12, "chunk_size": 4, "heads": 2, "dim_head": 3, "attn_pool_chunks": True}
    memory = NeuralMemory(**kwargs, per_parameter_lr_modulation=True)
    counted = flops_of(memory, torch.randn(2, 16, 12))
    of = {name.removeprefix("NeuralMemory."): count for name, count in counted.items()}
    shape = memory_shape(kwargs | {"per_parameter_lr_modulation": True})
    parts = ops.memory_operations(shape, batch=2, tokens=16)
    maps = ("to_queries", "to_keys", "to_values", "combine_heads")
    assert parts["projections"] == sum(of[f"projections.{name}"] for name in maps)
    assert parts["rates"] == of["rates"] + of["projections.retrieve_gate"]


def test_a_transformer_as_torch_counts_it():
    from titans_pytorch import MemoryAsContextTransformer

    kwargs = {"num_tokens": 17, "dim": 12, "depth": 2, "heads": 2, "dim_head": 4, "segment_len": 5}
    kwargs |= {"num_longterm_mem_tokens": 1, "num_persist_mem_tokens": 3, "num_residual_streams": 1}
    model = MemoryAsContextTransformer(**kwargs, neural_memory_layers=())
    counted = flops_of(model, torch.randint(0, 17, (3, 13)))
    parts = ops.transformer_operations(kwargs, None, batch=3, tokens=13)
    name = "MemoryAsContextTransformer"
    assert parts["logits"] == counted[f"{name}.to_logits"]
    assert parts["feed-forward"] == sum(counted[f"{name}.layers.{i}.feed_forward"] for i in range(2))
    # 15 tokens with the long-term ones: blocks of 6, 6 and 3; every query also sees three persistent tokens
    pairs = 21 + 21 + 6 + 15 * 3
    assert parts["attention"] == 3 * 2 * (4 * 2 * 15 * 12 * 8 + 2 * 2 * 8 * pairs)
    sliding = ops.transformer_operations(kwargs | {"sliding_window_attn": True}, None, 3, 13)["attention"]
    pairs = sum(range(1, 8)) + 8 * 7 + 15 * 3  # up to seven keys, the query's own among them
    assert sliding == 3 * 2 * (4 * 2 * 15 * 12 * 8 + 2 * 2 * 8 * pairs)


def test_the_shape_of_a_case():
    shape = memory_shape(TRAIN_MAC_MEMORY)
    assert shape.weights == ((64, 128), (128, 64))
    assert (shape.heads, shape.chunk, shape.anchor, shape.inner) == (4, 4, 128, 256)
    assert memory_shape({"dim": 384, "chunk_size": 64}).weights == ((384, 1536), (1536, 384))


def test_every_case_has_a_count():
    for case in (*NAMED, sweep_case(512, 16)):
        parts = operations(case)
        assert all(isinstance(count, int) and count >= 0 for count in parts.values()), case.name
        assert sum(parts.values()) > 0
    of_transformer = operations(next(case for case in NAMED if case.name == "enwik8-transformer"))
    tokens = 512 + 4 * (511 // 32)
    one = ops.memory_operations(memory_shape(dict(_memory_of(ENWIK8_TRANSFORMER))), 1, tokens)
    assert of_transformer["memory store and read"] == 3 * one["store and read"]


def _memory_of(kwargs):
    return {
        **kwargs["neural_memory_kwargs"],
        "dim": kwargs["dim"],
        "chunk_size": kwargs["neural_memory_segment_len"],
        "batch_size": kwargs["neural_memory_batch_size"],
        "model": kwargs["neural_memory_model"],
    }
