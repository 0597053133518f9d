"""Gates and pages in the transformer: what its memories are given, and that a cache turns the same pages."""

import pytest
import torch

from titans_pytorch import MemoryAsContextTransformer, SymplecticGating, gate_trace
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.mac import MacConfig, build_mac

from .mac_options import build, draw_ids

PAGES = {"use_symplectic_gating": True, "num_pages": 3, "symplectic_page_threshold": 0.1, "qk_rmsnorm": True}
LAYERS = {"depth": 2, "segment_len": 4, "neural_memory_segment_len": 2}


def memories(model):
    return [layer.memory for layer in model.layers if layer.memory is not None]


def switches(model):
    return [int(memory.page_switch_events) for memory in memories(model)]


@pytest.mark.parametrize(
    ("options", "kwargs", "every"),
    [
        ({}, {}, 2),
        ({"neural_memory_batch_size": 8}, {}, 8),
        ({"neural_memory_segment_len": None, "num_longterm_mem_tokens": 1}, {}, 5),
        ({}, {"page_switch_every": 6}, 6),
        ({}, {"page_switch_every": None}, None),
        ({}, {"num_pages": 1}, None),
    ],
)
def test_pages_are_turned_in_windows_of_the_sequence(options, kwargs, every):
    model = build(LAYERS | options | {"neural_memory_kwargs": PAGES | kwargs})
    for memory in memories(model):
        stage = memory.gates.stages[-1]
        windows = getattr(stage, "windows", None)
        chunks = getattr(windows, "chunks", None)
        assert every == (None if chunks is None else chunks * memory.store_chunk_size)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("prompt", [1, 7, 13])
def test_cached_sampling_turns_the_same_pages(keyed, prompt):
    kwargs = PAGES | {"manifold_state_keyed_paging": keyed, "symplectic_gate_kwargs": {"phase_mix": 0.5}}
    model = build(LAYERS | {"num_longterm_mem_tokens": 1, "neural_memory_kwargs": kwargs})
    ids, texts, counts = draw_ids(2, prompt), [], []
    for use_cache in (False, True):
        torch.manual_seed(0)
        text = model.sample(ids, prompt + 15, show_progress=False, use_cache=use_cache)
        texts.append(text)
    assert torch.equal(*texts)

    whole = torch.cat((ids, texts[0]), dim=1)
    for pieces in ([whole], whole.split([3, 1, 4, whole.shape[1] - 8], dim=1)):
        for memory in memories(model):
            memory.page_switch_events.zero_()
        cache = None
        with torch.no_grad():
            for piece in pieces:
                _, cache = model(piece, cache=cache, return_cache=True)
        counts.append((switches(model), [layer.memory.active_page_indices.tolist() for layer in cache.layers]))
    assert counts[0] == counts[1]
    assert min(counts[0][0]) > 2, "every layer turned pages"


def test_a_gate_given_once_is_one_for_each_layer():
    gate = SymplecticGating(12, diag=True, gated=True)
    model = build(LAYERS | {"neural_memory_kwargs": {"use_symplectic_gating": True, "symplectic_gate": gate}})
    first, second = (memory.symplectic_gate for memory in memories(model))
    assert first is not second
    assert not torch.equal(first.to_twist_q.weight, second.to_twist_q.weight), "they go their own ways"


def test_a_layer_can_be_traced():
    model = build(LAYERS | {"neural_memory_kwargs": PAGES})
    memory = memories(model)[1]
    seen = []
    memory.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(draw_ids(2, 20))
    trace = gate_trace(memory, seen[0])
    assert int(trace.switched.sum()) == switches(model)[1] > 0


@pytest.mark.parametrize(
    ("switches", "gated", "pages"),
    [
        ({}, False, 1),
        ({"symplectic_page_threshold": 0.2}, False, 1),
        ({"use_symplectic_gating": True}, True, 1),
        ({"use_symplectic_gating": True, "num_pages": 2, "symplectic_page_threshold": 0.2}, True, 2),
    ],
)
def test_the_switches_of_the_training_script(switches, gated, pages):
    small = {"dim": 32, "depth": 2, "dim_head": 16, "heads": 2, "memory_dim_head": 16, "memory_heads": 2}
    config = MacConfig(**small, neural_memory_layers=(1, 2), **switches)
    assert RunConfig(model=config).to_dict()["model"]["num_pages"] == pages
    model = build_mac(config, torch.device("cpu"))
    assert isinstance(model, MemoryAsContextTransformer)
    for memory in memories(model):
        assert (memory.symplectic_gate is not None) == gated
        assert memory.internal_heads == 2 * pages
        if gated:
            assert memory.symplectic_page_threshold == switches.get("symplectic_page_threshold", 0.5)
    model(torch.randint(0, 256, (1, 33)), return_loss=True).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
