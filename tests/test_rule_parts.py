"""Losses, optimizers and retentions by hand, and what they refuse."""

import pytest
import torch

from titans_pytorch import MemoryMLP, NeuralMemory, NeuralMemState
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.rules.losses import DotProduct, HuberLoss, LpLoss
from titans_pytorch.rules.optimizers import Momentum, Muon, Optimizer
from titans_pytorch.rules.parts import PartsRule
from titans_pytorch.rules.rates import WriteRates
from titans_pytorch.rules.retentions import Decay, ElasticNet, KLSoftmax, LqNorm, NormRescale

from .helpers import assert_close, randomise, refusal
from .naive_memory import newton_schulz

DIM = 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rates(retention=0.9, momentum=0.5, step=0.3):
    ones = torch.ones(2, dtype=torch.float64)
    return WriteRates(ones[:, None], retention * ones, momentum * ones[:, None], step=step * ones)


# losses


def huber(e, bound):
    norm = e.norm(dim=-1)
    return torch.where(norm <= bound, e.square().mean(-1), bound * (e.square() + 1e-6).sqrt().mean(-1))


LOSSES = {
    "dot": (DotProduct(), lambda y, v, b: -(y * v).sum(-1) / v.shape[-1]),
    "p = 1": (LpLoss(1.0), lambda y, v, b: ((y - v).square() + 1e-6).sqrt().mean(-1)),
    "p = 2": (LpLoss(2.0), lambda y, v, b: ((y - v).square() + 1e-6).mean(-1)),
    "p = 3": (LpLoss(3), lambda y, v, b: ((y - v).square() + 1e-6).pow(1.5).mean(-1)),
    "huber": (HuberLoss(), lambda y, v, b: huber(y - v, b)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_slope(name):
    loss, plain = LOSSES[name]
    y, v, bound = randn(3, 5, DIM).requires_grad_(), randn(3, 5, DIM, seed=1), randn(3, 5, seed=2).exp() + 1
    near = (y - v).norm(dim=-1) <= bound
    assert near.any()
    assert not near.all()
    wanted = plain(y, v, bound)
    assert_close(loss(y, v, bound), wanted, 1e-12)
    assert_close(loss.slope(y, v, bound), torch.autograd.grad(wanted.sum(), y)[0], 1e-12)


def test_at_large_errors_the_lp_loss_is_the_power_of_the_norm():
    y, v = 100 * randn(6, DIM), randn(6, DIM, seed=1)
    assert_close(LpLoss(3.0)(y, v) * DIM, (y - v).norm(p=3, dim=-1) ** 3, 1e-9)


@pytest.mark.parametrize("p", [0.99, 0, -1.0, float("inf"), float("nan"), "2", None, True])
def test_p_is_at_least_1(p):
    with pytest.raises(ValueError, match=refusal("p")):
        LpLoss(p)


@pytest.mark.parametrize("loss", [LpLoss, DotProduct, HuberLoss])
def test_a_loss_is_an_object(loss):
    with pytest.raises(ValueError, match=rf"^store_memory_loss_fn must be .*{loss.__name__}\(\)"):
        NeuralMemory(DIM, store_memory_loss_fn=loss)


# optimizers


def test_optimizers():
    surprise, before = randn(2, DIM, 3), randn(2, DIM, 3, seed=1)
    assert torch.equal(Optimizer().step(surprise, (), rates())[0], surprise)
    momentum, (carried,) = Momentum().step(surprise, (before,), rates())
    assert_close(momentum, 0.5 * before + surprise, 1e-14)
    assert torch.equal(carried, momentum)
    for muon, scale in ((Muon(), 1.0), (Muon(outside=True), 0.3)):
        update, (carried,) = muon.step(surprise, (before,), rates())
        assert torch.equal(carried, momentum)
        assert_close(update, scale * torch.stack([newton_schulz(m) for m in momentum]), 1e-10)


def test_muon_leaves_vectors_alone():
    surprise, before = randn(2, DIM), randn(2, DIM, seed=1)
    assert_close(Muon().step(surprise, (before,), rates())[0], 0.5 * before + surprise, 1e-14)


# retentions


def test_decay_and_elastic_net():
    w, u = randn(2, DIM, 3), randn(2, DIM, 3, seed=1)
    z = 0.9 * w + u
    assert_close(Decay().join(w, u, (), rates())[0], z, 1e-14)
    small = z.abs() <= 0.4
    assert small.any()
    assert not small.all()
    got = ElasticNet(0.4).join(w, u, (), rates())[0]
    assert_close(got, torch.where(small, 0.0, z - 0.4 * z.sign()), 1e-14)
    assert torch.equal(ElasticNet(0.0).join(w, u, (), rates())[0], z)


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0, 4.0])
def test_the_lq_norm_is_the_slope_of_half_its_square(q):
    sums = randn(1, DIM, 3).requires_grad_()
    half = (sums.abs() ** q).sum() ** (2 / q) / 2
    wanted = torch.autograd.grad(half, sums)[0]
    assert_close(LqNorm(q).start(sums), wanted, 1e-12)
    assert_close(LqNorm(q).init(wanted)[0], sums, 1e-10)


@pytest.mark.parametrize("q", [1.5, 2.0, 2.5, 4.0])
def test_the_lq_norm_as_printed(q):
    sums = randn(2, DIM, 3)
    norm = (sums.abs() ** q).sum(dim=(1, 2), keepdim=True) ** (1 / q)
    weights = LqNorm(q, printed=True).start(sums)
    assert_close(weights, sums / norm ** (q - 2), 1e-12)
    assert_close(LqNorm(q, printed=True).init(weights)[0], sums, 1e-10)


def test_the_lq_norm_of_2_is_a_forget_gate():
    w, u = randn(2, DIM, 3), randn(2, DIM, 3, seed=1)
    for printed in (False, True):
        assert_close(LqNorm(2.0, printed).join(w, u, (w,), rates())[0], 0.9 * w + u, 1e-12)


def test_the_lq_norm_in_float32_of_any_size():
    """Powers of very small and very large weights neither underflow nor overflow; zeros have finite slopes."""
    for scale in (1e-12, 1.0, 1e12):
        sums = (scale * randn(1, DIM, 3)).float().requires_grad_()
        weights = LqNorm(4.0).start(sums)
        assert_close(weights.double(), LqNorm(4.0).start(sums.double()), 1e-5)
        assert torch.autograd.grad(weights.sum(), sums)[0].isfinite().all()
    zero = torch.zeros(1, DIM, 3, requires_grad=True)
    for rule in (LqNorm(4.0), LqNorm(1.5), LqNorm(4.0, printed=True)):
        weights = rule.start(zero)
        assert (weights == 0).all()
        assert torch.autograd.grad(weights.sum(), zero)[0].isfinite().all()


def test_kl_softmax():
    logits, u = randn(2, DIM, 3), randn(2, DIM, 3, seed=1)
    retention = KLSoftmax(5.0)
    w = retention.start(logits)
    assert_close(w, 5.0 * logits.exp() / logits.exp().sum(dim=1, keepdim=True), 1e-12)
    got = retention.join(w, u, (), rates())[0]
    z = (0.9 * w.log() + u).exp()
    assert_close(got, 5.0 * z / z.sum(dim=1, keepdim=True), 1e-12)
    assert_close(KLSoftmax().start(logits).sum(dim=1), torch.full((2, 3), DIM**0.5, dtype=torch.float64), 1e-12)


def test_kl_softmax_after_an_underflow():
    w = torch.tensor([[[0.0], [2.0]]], requires_grad=True)
    got = KLSoftmax().join(w, torch.zeros(1, 2, 1), (), WriteRates(torch.ones(1, 1), torch.ones(1)))[0]
    assert got.isfinite().all()
    assert torch.autograd.grad(got.sum(), w)[0].isfinite().all()


def test_norm_rescale():
    w, u = randn(2, DIM, 3), randn(2, DIM, 3, seed=1)
    z = 0.9 * w + u
    got = NormRescale().join(w, u, (), rates())[0]
    assert_close(got, z / z.norm(dim=1, keepdim=True) * w.norm(dim=1, keepdim=True), 1e-12)
    assert_close(got.norm(dim=1), w.norm(dim=1), 1e-12)


@pytest.mark.parametrize(
    "retention", [ElasticNet(0.1), LqNorm(), KLSoftmax(), NormRescale()], ids=lambda r: type(r).__name__
)
def test_vectors_decay(retention):
    w, u = randn(2, DIM), randn(2, DIM, seed=1)
    got = retention.join(w, u, (w,) * retention.slots, rates())[0]
    assert_close(got, 0.9 * w + u, 1e-14)


@pytest.mark.parametrize("q", [1.0, 0.5, float("inf"), "4", True])
def test_q_is_above_1(q):
    with pytest.raises(ValueError, match=refusal("q")):
        LqNorm(q)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: ElasticNet(-0.1), "threshold"),
        (lambda: KLSoftmax(0.0), "total"),
        (lambda: LqNorm(4.0, printed="yes"), "printed"),
        (lambda: PartsRule(optimizer="muon"), "optimizer"),
        (lambda: PartsRule(Momentum()), "loss_fn"),
        (lambda: PartsRule(LpLoss), "loss_fn"),
        (lambda: PartsRule(max_grad_norm=0.0), "max_grad_norm"),
        (lambda: PartsRule(retention=Muon()), "retention"),
    ],
)
def test_wrong_arguments_are_named(build, named):
    with pytest.raises(ValueError, match=refusal(named)):
        build()


def memory_of(rule, **options):
    return randomise(NeuralMemory(DIM, 2, batch_size=4, model=MemoryMLP(DIM, 2), update_rule=rule, **options).double())


def test_weights_that_are_not_positive_are_refused_by_kl():
    memory = memory_of(PartsRule(retention=KLSoftmax()), mem_model_norm_add_residual=False)
    seq = randn(1, 8, DIM)
    good = {name: w.detach() for name, w in memory.init_weights(1).items()}
    bad = {name: w - w.max() for name, w in good.items()}
    memory.store_memories(seq, good)
    memory(seq, state=NeuralMemState(0, good))
    for call, name in (
        (lambda: memory.store_memories(seq, bad), "weights"),
        (lambda: memory.store_memories(seq, past_state=(bad, {})), "past_state"),
        (lambda: memory(seq, state=NeuralMemState(0, bad)), "state"),
        (lambda: memory(seq, state=NeuralMemState(0, good, states=(bad, {}))), "state"),
    ):
        with pytest.raises(
            ValueError, match=rf"^{name}.* must be positive everywhere.* KLSoftmax .*, got a smallest weight"
        ):
            call()


@pytest.mark.parametrize(
    "rule",
    [
        PartsRule(retention=LqNorm()),
        PartsRule(retention=KLSoftmax()),
        PartsRule(optimizer=Momentum(), retention=ElasticNet(0.1)),
    ],
)
def test_nothing_changes_where_storing_is_off(rule):
    memory = memory_of(rule)
    seq = randn(1, 8, DIM)
    with storing_off(memory):
        _, state = memory(seq)
    assert all(torch.equal(state.states[0][name], w) for name, w in memory.init_weights(1).items())


def test_slots_of_a_state_without_any():
    """A state of weights alone: slots begin where the rule says, not at zero."""
    memory = memory_of(PartsRule(retention=LqNorm()), mem_model_norm_add_residual=False)
    weights = {name: w.detach() * 2 for name, w in memory.init_weights(1).items()}
    _, state = memory(randn(1, 1, DIM), state=NeuralMemState(0, weights))
    for name, slot in state.states[1].items():
        assert_close(slot[0], LqNorm().sums(weights[name]), 1e-12)
