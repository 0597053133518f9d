"""Law 9 of the memory: every parameter has a gradient after every call, however little a call stores.

DistributedDataParallel waits for all of them.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from titans_pytorch import NeuralMemory
from titans_pytorch.memory import unused
from titans_pytorch.models.config import VARIANTS as FAMILY
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model

from ..helpers import SMALL, FrozenRule, randomise
from ..mac_options import OPTIONS, build, draw_ids
from .subjects import Subject, option_sets, store_chunk
from .test_memory_modes import PLAIN, VARIANTS


def gradients_of(module: nn.Module, out: torch.Tensor) -> dict:
    module.zero_grad()
    out.sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def has_all(module: nn.Module, call):
    """All gradients are there; without what joins them, outputs and gradients are the same bits where there are any."""
    out = call()
    got = gradients_of(module, out)
    missing = [name for name, g in got.items() if g is None]
    assert not missing, missing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans_pytorch.neural_memory.with_unused", lambda x, parameters: x)
        patch.setattr("titans_pytorch.models.memory.with_unused", lambda x, parameters: x)
        before = call()
        assert torch.equal(out, before)
        for name, g in gradients_of(module, before).items():
            assert torch.equal(got[name], torch.zeros_like(got[name]) if g is None else g), name


def check(options, engine="auto", masked=False):
    subject = Subject(options, engine)
    chunk = store_chunk(options)
    for n in {1, chunk, chunk + 1, 2 * chunk}:
        seq = subject.sequence(2, n)
        updates = subject.earlier(seq)[1].updates if subject.earlier else None
        updates = None if updates is None else {name: updates[name].detach() for name in updates}
        mask = torch.zeros(2, n, dtype=torch.bool) if masked else None
        has_all(subject.memory, lambda: subject.memory(seq, prev_weights=updates, store_mask=mask)[0])  # noqa: B023


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_variants(variant):
    options = dict(VARIANTS[variant])
    check({**PLAIN, **options}, options.pop("engine", "auto"))


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(options=option_sets, masked=st.booleans())
def test_of_any_options(options, masked):
    check(options, masked=masked)


@pytest.mark.parametrize(
    "options", [{}, {"qkv_conv_kernel": 3, "accept_weight_residual": True}, {"surprise_source": "prediction"}]
)
@pytest.mark.parametrize("n", [0, 1, 4, 9])
def test_of_a_continued_stream(options, n):
    """The state is cut from the graph, as in truncated backpropagation: initial weights take no part."""
    memory = randomise(NeuralMemory(4, chunk_size=4, batch_size=8, gated_transition=True, **options).double())
    seq = torch.randn(2, 6 + n, 4, dtype=torch.float64, requires_grad=True)
    _, state = memory(seq[:, :6], detach_mem_state=True)
    has_all(memory, lambda: memory(seq[:, 6:], state=state)[0])


def test_of_another_retrieve_chunk_and_of_one_call_window():
    memory = randomise(NeuralMemory(4, chunk_size=(8, 2), batch_size=4, gated_transition=True).double())
    for n in (1, 2, 5, 8, 9):
        seq = torch.randn(1, n, 4, dtype=torch.float64)
        has_all(memory, lambda: memory(seq, ttt_batch_size=2)[0])  # noqa: B023


def test_what_is_not_finite_stays_where_it_is():
    memory = NeuralMemory(4, chunk_size=4)
    with torch.no_grad():
        memory.projections.to_keys.weight.fill_(torch.nan)
    out = memory(torch.randn(1, 3, 4))[0]
    assert out.isfinite().all()
    assert gradients_of(memory, out)["projections.to_keys.weight"].eq(0.0).all()
    x = torch.tensor([0.0, -0.0, torch.inf])
    assert torch.equal(unused.with_unused(x, memory.parameters()).signbit(), x.signbit())
    with torch.no_grad():
        assert unused.with_unused(x, memory.parameters()) is x


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(options=OPTIONS, n=st.integers(1, 8))
def test_of_the_transformer(options, n):
    model = build(options)
    ids = draw_ids(2, n)
    has_all(model, lambda: model(ids))


@pytest.mark.parametrize("source", ["memory", "prediction"])
@pytest.mark.parametrize("variant", FAMILY)
def test_of_the_family(variant, source):
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=variant, chunk_size=4, surprise_source=source, **SMALL)).double()
    for n in (1, 2, 5):
        has_all(model, lambda: model(draw_ids(2, n)))  # noqa: B023
        _, state = model(draw_ids(2, n), return_cache=True)
        cache = state.detach()
        has_all(model, lambda: model(draw_ids(2, n), cache=cache, return_cache=True)[0])  # noqa: B023


def test_with_a_rule_that_uses_nothing():
    memory = NeuralMemory(4, chunk_size=2, heads=2, dim_head=4, update_rule=FrozenRule()).double()
    for n in (1, 2, 5):
        seq = torch.randn(1, n, 4, dtype=torch.float64)
        has_all(memory, lambda: memory(seq)[0])  # noqa: B023


def test_compiles_to_one_graph():
    memory = NeuralMemory(4, chunk_size=4, surprise_source="prediction")
    seq = torch.randn(1, 3, 4)
    out = torch.compile(lambda x: memory(x)[0], backend="aot_eager", fullgraph=True)(seq)
    assert not [name for name, g in gradients_of(memory, out).items() if g is None]
