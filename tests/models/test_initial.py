"""Named initialisations, by the statistics of what they make."""

import math

import pytest
import torch
from torch import nn

from titans_pytorch import ModelConfig, build_model, titans_memory
from titans_pytorch.memory.rates import Rates
from titans_pytorch.models.config import VARIANTS
from titans_pytorch.models.initial import INITS, MEMORY_INITS, fill

from .. import helpers

SIZES = {"vocab_size": 100, "d_model": 64, "n_layers": 1, "n_heads": 2, "mem_heads": 2}


def model_of(**settings):
    torch.manual_seed(0)
    return build_model(ModelConfig(**SIZES | settings))


def follows(weight, name, std):
    outs, ins = weight.shape
    if name == "orthogonal":
        rows = weight if outs <= ins else weight.T
        return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
    largest = weight.abs().max().item()
    if name == "xavier":
        limit = math.sqrt(6 / (outs + ins))
        return 0.95 * limit < largest <= limit and weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    beyond = (weight.abs() > 2 * std).float().mean().item()  # of a normal distribution 0.0455
    return weight.std().item() == pytest.approx(std, rel=0.1) and 0.03 < beyond < 0.06


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MEMORY_INITS)
def test_every_linear_map(variant, name):
    model = model_of(variant=variant, init=name, init_std=0.05, init_step_bias=-2.0, init_decay_bias=-5.0)
    rates = {id(part) for found in model.modules() if isinstance(found, Rates) for part in found.modules()}
    linears = {
        key: part for key, part in model.named_modules() if isinstance(part, nn.Linear) and id(part) not in rates
    }
    assert len(linears) > 4
    for key, part in linears.items():
        assert follows(part.weight, name, 0.05), key
        assert part.bias is None or not part.bias.any(), key
    assert model.token_emb.weight.std().item() == pytest.approx(0.05, rel=0.1)
    for found in model.modules():
        if isinstance(found, Rates):
            assert (found.to_adaptive_step.bias == -2.0).all()
            assert (found.to_decay_factor.bias == -5.0).all()


def test_the_default_is_pytorch_s_own():
    linear = model_of(variant="mag").blocks[0].layer.gate.to_out
    limit = 1 / math.sqrt(64)
    assert 0.95 * limit < linear.weight.abs().max().item() <= limit
    torch.manual_seed(0)
    assert torch.equal(
        linear.weight, build_model(ModelConfig(**SIZES, variant="mag")).blocks[0].layer.gate.to_out.weight
    )


@pytest.mark.parametrize("name", INITS)
def test_what_has_an_initial_value_of_its_own(name):
    model = model_of(variant="mag", init=name, tie_embeddings=True, gate="convex", init_gate_bias=-2.0)
    assert model.to_logits.weight is model.token_emb.weight
    assert model.token_emb.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.blocks[0].layer.gate.to_share.bias == -2.0).all()


@pytest.mark.parametrize("name", MEMORY_INITS)
def test_fast_weights(name):
    """Before the scale, which multiplies them."""
    torch.manual_seed(0)
    first, last = titans_memory(64, hidden=96, init=name, init_std=0.05, init_scale=3.0).memory_model_parameters
    for weight in (first[0], last[0]):
        assert follows(weight.detach() / 3.0, name, 0.05)


def test_wrong_names():
    for name, made in (("init", lambda: ModelConfig(init="he")), ("mem_init", lambda: ModelConfig(mem_init="zeros"))):
        with pytest.raises(ValueError, match=helpers.message(f"{name} must be one of ..., got ")):
            made()
    with pytest.raises(ValueError, match=helpers.message("init must be one of xavier, normal, orthogonal, got 'zero'")):
        titans_memory(8, init="zero")
    with pytest.raises(ValueError, match=helpers.message("init must be one of ..., got 'default'")):
        fill(torch.empty(2, 2), "default")
    with pytest.raises(ValueError, match=helpers.message("init_std must be ..., got 0.0")):
        ModelConfig(init_std=0.0)
