"""Learned rates against their formulas, token by token and chunk by chunk; layouts, start values, wrong transforms."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from titans_pytorch import NeuralMemory
from titans_pytorch.memory.rates import RateConfig, Rates, SigmoidStep

from .helpers import assert_close, randomise

DIM, CHUNK = 5, 3


def build(**changes):
    options = RateConfig(
        heads=2,
        kv_per_token=2,
        momentum_order=2,
        learned_combine=True,
        combine_zeroth=True,
        modulated_params=3,
        max_modulation=1.5,
        attn_pool=False,
        residual_mix=True,
        step_transform=SigmoidStep(0.25),
        step_bias=None,
        momentum_bias=None,
        decay_bias=None,
    )
    return randomise(Rates(DIM, replace(options, **changes)).double(), scale=0.3)


def tokens(b=2, m=4):
    return torch.randn(b, m * CHUNK, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def linear(module, x):
    return x @ module.weight.T + module.bias


@pytest.mark.parametrize("attn_pool", [False, True])
def test_formulas_and_layouts(attn_pool):
    rates, x = build(attn_pool=attn_pool), tokens()
    got = rates(x, CHUNK, with_residual=True)
    for b in range(2):
        for m in range(4):
            chunk = x[b, m * CHUNK : (m + 1) * CHUNK]
            pooled = chunk.mean(0)
            if attn_pool:
                logits = chunk @ rates.reduce_to_chunk_rep.to_attn_logits.weight.T
                pooled = (logits.exp() / logits.exp().sum(0) * chunk).sum(0)
            step = 0.25 * sigmoid(linear(rates.to_adaptive_step, chunk))  # [c (h u)]
            keep = 1 - sigmoid(linear(rates.to_decay_factor, pooled))
            momentum = sigmoid(linear(rates.to_momentum, pooled))  # [(h o)]
            combine = linear(rates.to_learned_momentum_combine, pooled)  # [(h o+1)]
            modulation = 1.5 * sigmoid(linear(rates.to_layer_modulation, pooled))  # [(h w)]
            mix = sigmoid(linear(rates.to_learned_weight_residual_mix, pooled))
            for h in range(2):
                row = b * 2 + h
                assert_close(got.learning_rate[row, m], step[:, h * 2 : h * 2 + 2].flatten(), 1e-13, "step")
                assert_close(got.retention[row, m], keep[h], 1e-13, "keep")
                assert_close(got.momentum[row, m], momentum[h * 2 : h * 2 + 2], 1e-13, "momentum")
                own = combine[h * 3 : h * 3 + 3].exp()
                assert_close(got.combine[row, m], own / own.sum(), 1e-13, "combine")
                assert_close(got.modulation[row, m], modulation[h * 3 : h * 3 + 3], 1e-13, "modulation")
                assert_close(got.residual_mix[row, m], mix[h], 1e-13, "mix")


def test_what_is_off_is_not_there():
    rates = build(momentum_order=0, modulated_params=0, residual_mix=False)
    got = rates(tokens(), CHUNK, with_residual=False)
    assert (got.momentum, got.combine, got.modulation, got.residual_mix) == (None,) * 4
    used = ("to_adaptive_step.weight", "to_adaptive_step.bias", "to_decay_factor.weight", "to_decay_factor.bias")
    assert {name for name, _ in rates.named_parameters()} == set(used)
    assert build()(tokens(), CHUNK, with_residual=False).residual_mix is None


@pytest.mark.parametrize(("order", "zeroth", "members"), [(1, False, None), (1, True, 2), (2, False, 2), (3, True, 4)])
def test_members_of_the_mixture(order, zeroth, members):
    """A mixture of one is that one: no parameters that could not learn."""
    got = build(momentum_order=order, combine_zeroth=zeroth)(tokens(), CHUNK, with_residual=False)
    assert got.combine is None if members is None else got.combine.shape == (4, 4, members)
    assert build(learned_combine=False)(tokens(), CHUNK, with_residual=False).combine is None


def test_attention_pool_starts_as_the_mean():
    torch.manual_seed(0)
    memory = NeuralMemory(DIM, CHUNK, attn_pool_chunks=True)
    chunks = torch.randn(2, 4, CHUNK, DIM)
    assert_close(memory.rates.reduce_to_chunk_rep(chunks), chunks.mean(2), 1e-6)


def test_start_biases():
    """Each given start value sets its bias, its weight to zero: the rate is the same for every token."""
    memory = NeuralMemory(
        DIM, CHUNK, heads=2, dim_head=4, init_adaptive_step_bias=-2.0, init_momentum_bias=1.5, init_decay_bias=-4
    )
    got = memory.rates(tokens().float(), CHUNK, with_residual=False)
    for rate, logit in ((got.learning_rate, -2.0), (got.momentum, 1.5), (1 - got.retention, -4.0)):
        assert_close(rate, torch.full_like(rate, logit).sigmoid(), 1e-5)
    free = NeuralMemory(DIM, CHUNK).rates
    for linear in (free.to_adaptive_step, free.to_momentum, free.to_decay_factor):
        assert (linear.weight != 0).all()


def test_keep_is_exact_where_the_decay_is_small():
    memory = NeuralMemory(DIM, CHUNK, init_decay_bias=40.0)
    keep = memory.rates(tokens().float(), CHUNK, with_residual=False).retention
    assert keep.flatten()[0].item() == pytest.approx(4.248354e-18, rel=1e-5)


class LearnedStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x.sigmoid() * self.scale


def test_a_learned_step_transform_is_part_of_the_memory():
    memory = NeuralMemory(DIM, CHUNK, adaptive_step_transform=LearnedStep())
    memory = copy.deepcopy(memory).double()
    assert "rates.step_transform.scale" in memory.state_dict()
    out, _ = memory(tokens())
    out.sum().backward()
    assert memory.rates.step_transform.scale.grad != 0


def test_the_step_transform_sees_logits_and_gives_steps():
    seen = []

    def transform(logits):
        seen.append(logits)
        return logits * 0.0 + 0.125

    memory = NeuralMemory(DIM, CHUNK, heads=2, dim_head=4, num_kv_per_token=2, adaptive_step_transform=transform)
    _, _, (_, step) = memory(tokens().float(), return_surprises=True)
    assert seen[0].shape == (2, 12, 4)
    assert step.shape == (2, 2, 24)
    assert (step == 0.125).all()


@pytest.mark.parametrize("transform", [lambda x: x[..., :1], lambda x: x.mean(), lambda x: 0.1, lambda x: x.mT])
def test_a_step_transform_of_another_shape_is_refused(transform):
    memory = NeuralMemory(DIM, CHUNK, heads=2, adaptive_step_transform=transform, dim_head=DIM)
    with pytest.raises(ValueError, match=r"adaptive_step_transform must be .* shape \(2, 12, 2\), got .*"):
        memory(tokens().float())


@pytest.mark.parametrize("engine", ["auto", "dual", "matrix", "sequential"])
@pytest.mark.parametrize("options", [{}, {"momentum": False}, {"momentum": False, "accept_weight_residual": True}])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_pool_that_nothing_needs_gets_a_gradient(engine, options, chunks):
    """DistributedDataParallel waits for every parameter, also where no rate of the pooled chunk is used."""
    memory = NeuralMemory(DIM, CHUNK, attn_pool_chunks=True, forget_gate=False, engine=engine, **options)
    memory(torch.randn(2, chunks * CHUNK, DIM))[0].sum().backward()
    assert [name for name, p in memory.named_parameters() if p.grad is None] == []
