"""Layers against their slow twins, as layers in other people's models, and called wrongly."""

import pytest
import torch
from torch import nn

from titans_pytorch import LMMLayer, MACLayer, MAGLayer, MALLayer, NeuralMemory, titans_memory
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.models.gates import GATES

from .. import helpers
from ..helpers import assert_close, assert_same_gradients, gradients, randomise
from . import twins

LAYERS = {"mac": MACLayer, "mag": MAGLayer, "mal": MALLayer, "lmm": LMMLayer}
TWINS = {"mac": twins.mac, "mag": twins.mag, "mal": twins.mal, "lmm": twins.lmm}


def layer_of(name, dim=8, span=4, seed=0, n_persistent=2, **options):
    torch.manual_seed(seed)
    memory = titans_memory(
        dim, heads=2, hidden=5, chunk_size=3, max_step=0.3, conv_kernel=options.pop("conv_kernel", 3)
    )
    options |= {"mac": {"segment": span}, "lmm": {}}.get(name, {"window": span})
    layer = LAYERS[name](dim, heads=2, n_persistent=n_persistent, memory=memory, **options).double()
    return randomise(layer, seed, 0.2)


def sequence(n, batch=2, dim=8, seed=1):
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "n", "options"),
    [
        *[(name, n, {}) for name in LAYERS for n in (1, 11)],
        *[
            (name, 11, {"span": span, "n_persistent": p})
            for name in ("mac", "mag", "mal")
            for span, p in ((1, 0), (3, 1))
        ],
        *[(name, 9, {"gate": gate}) for name in ("mac", "mag") for gate in GATES[1:]],
        ("mac", 11, {"conv_kernel": 0}),
        ("mac", 12, {"conv_kernel": 5, "span": 2}),
    ],
)
def test_against_the_twin(name, n, options):
    layer, x = layer_of(name, **options), sequence(n).requires_grad_()
    out, _ = layer(x)
    wanted = TWINS[name](layer, x)
    assert_close(out, wanted, 1e-10)
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    assert_same_gradients(gradients([out], leaves), gradients([wanted], leaves))


@pytest.mark.parametrize("variant", LAYERS)
def test_every_norm_is_the_fast_one(variant):
    model = build_model(
        ModelConfig(variant=variant, vocab_size=8, d_model=8, n_layers=1, n_heads=2, mem_heads=2), "meta"
    )
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) >= 4
    assert {type(norm) for norm in norms} == {RMSNorm}


@pytest.mark.parametrize("name", LAYERS)
def test_memory_reaches_behind_every_window(name):
    """Changing the first token changes the last output, 10 windows later; not where nothing is stored."""
    layer, x = layer_of(name, n_persistent=1), sequence(40)
    other = x.clone()
    other[:, 0] += 1.0

    def difference():
        with torch.no_grad():
            return (layer(x)[0] - layer(other)[0])[:, -1].abs().max()

    assert difference() > 1e-6
    with storing_off(layer):
        assert difference() == 0


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_a_convex_gate_moves_between_memory_and_attention(name):
    """Its bias alone decides where its weights are zero: far above 0 only attention is left, far below only memory."""
    x = sequence(4)  # one segment
    for bias, other in ((60.0, "memory"), (-60.0, "attention")):
        layer = layer_of(name, gate="convex")
        with torch.no_grad():
            layer.gate.to_share.weight.zero_(), layer.gate.to_share.bias.fill_(bias)
        seen = {}
        layer.gate.register_forward_pre_hook(lambda _, given, seen=seen: seen.update(given=given))
        out, _ = layer(x)
        kept = seen["given"][other == "attention"]
        assert_close(out, layer.gate.to_out(kept), 1e-12)
    assert LAYERS[name](8, 2, gate="convex", init_gate_bias=-2.0).gate.to_share.bias.tolist() == [-2.0] * 8


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_is_trained(name):
    layer = layer_of(name, span=3)
    layer(sequence(10))[0].square().sum().backward()
    assert not [n for n, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_fit_any_sequence_of_vectors(name):
    """In someone's own model, under their optimizer."""
    torch.manual_seed(0)
    layer = LAYERS[name](32)
    model = nn.Sequential(nn.Linear(5, 32), nn.GELU())
    head, x = nn.Linear(32, 1), torch.randn(3, 20, 5)
    hidden = model(x)
    out, state = layer(hidden)
    assert out.shape == hidden.shape
    head(hidden + out).mean().backward()
    again, _ = layer(hidden[:, :1], state)
    assert again.shape == (3, 1, 32)


@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm"])
def test_without_momentum_or_decay(name):
    """Frozen decay: the memory keeps everything, whatever it reads."""
    torch.manual_seed(0)
    memory = titans_memory(8, momentum=False, decay=False).double()
    keep = memory.rates(sequence(5) * 100, 1, False).retention
    assert (keep == 1).all()
    layer = LAYERS[name](8, heads=2, memory=memory).double()
    out, state = layer(sequence(9))
    assert out.isfinite().all()
    assert not state.memory.states[1]
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MAGLayer(8, heads=3), "heads must be ..., got 3"),
        (
            lambda: MAGLayer(8, heads=4),
            "heads must be a divisor of dim = 8 that leaves heads of an even width..., got 4",
        ),
        (lambda: MAGLayer(8, 2, window=0), "window must be ..., got 0"),
        (lambda: MACLayer(8, 2, segment=-1), "segment must be ..., got -1"),
        (lambda: MACLayer(8, 2, gate="tanh"), "gate must be one of normalised, silu, sigmoid, convex, got 'tanh'"),
        (lambda: MAGLayer(8, 2, init_gate_bias=-2.0), 'init_gate_bias needs gate="convex"'),
        (lambda: MALLayer(8, 2, n_persistent=-1), "n_persistent must be ..., got -1"),
        (lambda: LMMLayer(8, memory=nn.Linear(8, 8)), "memory must be a NeuralMemory..., got Linear"),
        (lambda: LMMLayer(8, memory=NeuralMemory(6)), "memory must be one of dim = 8..., got a NeuralMemory of dim 6"),
        (lambda: titans_memory(8, heads=3), "heads must be a divisor of dim = 8, got 3"),
        (lambda: titans_memory(8, qk_norm="l1"), "qk_norm must be ..., got 'l1'"),
        (lambda: titans_memory(8, init_scale=0.0), "init_scale must be ..., got 0.0"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=helpers.message(message)):
        build()
