"""Traces of memories: known numbers from a memory driven by hand."""

import pytest
import torch

from titans_pytorch.analysis.plot import plot_traces, smoothed
from titans_pytorch.analysis.storing import memories_of, storing_off
from titans_pytorch.analysis.trace import trace_memories
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.tasks.benefit import benefit_on_task, benefit_on_text, memory_change, paired
from titans_pytorch.tasks.registry import build_task

SMALL = {"vocab_size": 40, "d_model": 8, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "chunk_size": 4, "window": 8}


def model_of(variant, **more):
    torch.manual_seed(0)
    return build_model(ModelConfig(variant=variant, n_persistent=0, **SMALL, **more)).double()


def ids_of(n=30, b=2):
    return torch.randint(0, 40, (b, n), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_a_trace_is_what_the_memory_did(variant):
    model, ids = model_of(variant), ids_of()
    one, other = trace_memories(model, ids, piece=7)
    with torch.no_grad():
        _, state, surprises = model(ids, return_cache=True, return_surprises=True)
    for trace, layer, (loss, step) in zip((one, other), state.layers, surprises, strict=True):
        assert trace.surprise == pytest.approx(loss.mean(dim=(0, 1)).tolist(), rel=1e-9)
        assert trace.step == pytest.approx(step.mean(dim=(0, 1)).tolist(), rel=1e-9)
        memory = memories_of(model)[trace.name]
        start, end = memory.init_weights(2), layer.memory.states[0]
        moved = sum((end[k] - start[k]).flatten(1).square().sum(1) for k in start).sqrt()
        size = sum(start[k].flatten(1).square().sum(1) for k in start).sqrt()
        assert trace.change[-1] == pytest.approx((moved / size).mean().item(), rel=1e-9)
        assert len(trace.change) == len(trace.moved) == 5
        assert trace.change[0] == trace.moved[0]
        assert len(trace.decay) == len(trace.momentum) == 30
        assert all(0 < d < 1 for d in trace.decay)
    assert memory_change(model, ids).keys() == {one.name, other.name}


def test_pieces_do_not_change_what_is_seen():
    model, ids = model_of("mac"), ids_of()
    whole, pieces = (trace_memories(model, ids, piece=p) for p in (30, 3))
    for a, b in zip(whole, pieces, strict=True):
        assert a.surprise == pytest.approx(b.surprise, rel=1e-9)
        assert a.change[-1] == pytest.approx(b.change[-1], rel=1e-9)


def test_nothing_changes_with_storing_off():
    model = model_of("lmm", use_momentum=False)
    with storing_off(model):
        (trace, _) = trace_memories(model, ids_of())
    assert trace.change == [0.0]
    assert trace.momentum == []
    assert trace_memories(model, ids_of())[0].change[0] > 0


def test_the_picture(tmp_path):
    traces = trace_memories(model_of("mag"), ids_of(), piece=8)
    assert plot_traces(traces, tmp_path / "a" / "memory.png", "title")
    assert (tmp_path / "a" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert smoothed([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]


def test_the_interval_of_a_benefit():
    """Gains 1, 2, 3: mean 2, deviation 1."""
    found = paired("bits", [1.0, 1.0, 1.0], [2.0, 3.0, 4.0], lower_is_better=True)
    half = 1.96 / 3**0.5
    assert (found.gain, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert found.verdict == "storing helps"
    assert paired("accuracy", [1.0] * 3, [2.0, 3.0, 4.0], lower_is_better=False).verdict == "storing harms"
    assert paired("accuracy", [1.0, 0.0], [0.0, 1.0], lower_is_better=False).verdict == "no difference found"
    assert paired("accuracy", [1.0], [0.0], lower_is_better=False).verdict == "no difference found"


def test_a_memory_that_is_all_there_is():
    """A model that answers only from its memory: storing off leaves it nothing."""
    task = build_task("recall", {"pairs": 4, "queries": 4, "keys": 12, "values": 4, "length": 16})

    class Remembers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of("lmm")

        def forward(self, ids):
            state = self.inner(ids, return_cache=True)[1].layers[0].memory
            start = memories_of(self.inner)["blocks.0.layer.remember.memory"].init_weights(len(ids))
            stored = any(not torch.equal(state.states[0][k], start[k]) for k in start)
            return task.reference(ids) if stored else torch.zeros(*ids.shape, task.vocab_size)

    found = benefit_on_task(Remembers(), task, 6, 20)
    assert (found.on, found.off, found.gain, found.low) == (1.0, 0.0, 1.0, 1.0)
    model = model_of("lmm")
    text = benefit_on_text(model, torch.randint(0, 40, (5, 17), dtype=torch.uint8), skip=3)
    assert text.rows == 5
    assert text.gain == pytest.approx(text.off - text.on)
    assert text.on != text.off
