"""Update rules: the protocol, shown by the rule of rules/base.py and one with a slot of its own."""

import re

import pytest
import torch
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.engines.sequential import SequentialEngine
from titans_pytorch.rules import base
from titans_pytorch.rules.base import UpdateRule, like
from titans_pytorch.rules.titans import TitansRule

from .helpers import FrozenRule, assert_close, randomise, refusal
from .laws.subjects import AdaGradRule

DIM = 6


def documented_rule():
    """The rule of the module's docstring."""
    code = re.search(r"(    class SignRule.*?)\n\n`NeuralMemory", base.__doc__, re.DOTALL)[1]
    names = {"UpdateRule": UpdateRule, "like": like}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    return names["SignRule"]()


def test_the_documented_rule_does_what_it_says():
    rule = documented_rule()
    memory = randomise(NeuralMemory(DIM, 1, update_rule=rule, model=MemoryMLP(DIM, 1)).double(), scale=0.2)
    assert isinstance(memory.engine, SequentialEngine)
    seq = torch.randn(2, 5, DIM, dtype=torch.float64)
    updates, _ = memory.store_memories(seq, return_surprises=False)
    keys, values, _ = memory.projections.keys_and_values(*memory.chunk_views(seq), 1, None)
    rates = memory.rates_of(memory.chunk_views(seq).keys, False)
    weights = {name: w.detach().requires_grad_() for name, w in memory.init_weights(2).items()}
    for name, wanted in weights.items():
        for t in range(5):
            start = weights["model.weights.0"], weights["norm.gamma"]
            normed = nn.functional.layer_norm(keys[:, t] @ start[0], (DIM,))
            error = normed * (start[1].unsqueeze(1) + 1) + keys[:, t] - values[:, t]
            loss = (rates.learning_rate[:, t] * error.square().mean(-1)).sum()
            (gradient,) = torch.autograd.grad(loss, weights[name])
            wanted = like(rates.retention[:, t], wanted) * wanted - 0.01 * gradient.sign()
            assert_close(updates[name][:, t + 1], wanted, 1e-12)


def test_a_rule_of_your_own_streams_with_its_slots():
    memory = randomise(NeuralMemory(DIM, 2, batch_size=4, update_rule=AdaGradRule()).double(), scale=0.2)
    seq = torch.randn(2, 15, DIM, dtype=torch.float64)
    whole, end = memory(seq)
    first, state = memory(seq[:, :7])
    second, last = memory(seq[:, 7:], state=state)
    assert_close(torch.cat((first, second), dim=1), whole, 1e-12)
    for name, slot in end.states[1].items():
        assert slot.shape[0] == 1
        assert (slot > 0).any()
        assert_close(last.states[1][name], slot, 1e-12)


def test_a_subclass_of_the_papers_rule_is_not_run_as_the_papers():
    memory = randomise(NeuralMemory(DIM, 2, update_rule=FrozenRule()).double())
    assert isinstance(memory.engine, SequentialEngine)
    _, state = memory(torch.randn(1, 6, DIM, dtype=torch.float64))
    assert all(torch.equal(state.states[0][name], start) for name, start in memory.init_weights(1).items())
    with pytest.raises(ValueError, match=refusal("engine")):
        NeuralMemory(DIM, update_rule=FrozenRule(), engine="dual")


@pytest.mark.parametrize("engine", ["dual", "matrix"])
def test_the_chunkwise_engine_refuses_a_rule_without_closed_form(engine):
    with pytest.raises(ValueError, match=refusal("engine")):
        NeuralMemory(DIM, update_rule=AdaGradRule(), engine=engine)


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"update_rule": "delta"}, "update_rule"),
        ({"update_rule": TitansRule}, "update_rule"),
        ({"update_rule": TitansRule(), "max_grad_norm": 1.0}, "max_grad_norm"),
        ({"update_rule": TitansRule(), "momentum": False}, "momentum"),
        ({"update_rule": TitansRule(), "momentum_order": 2}, "momentum_order"),
        ({"update_rule": TitansRule(), "spectral_norm_surprises": True}, "spectral_norm_surprises"),
        ({"update_rule": AdaGradRule(), "learned_momentum_combine": True}, "learned_momentum_combine"),
    ],
)
def test_wrong_arguments_are_named(keywords, named):
    with pytest.raises(ValueError, match=refusal(named)):
        NeuralMemory(DIM, **keywords)


def test_the_papers_rule_given_by_hand_is_the_same():
    torch.manual_seed(0)
    memory = NeuralMemory(DIM, 2, batch_size=4, momentum_order=2, spectral_norm_surprises=True).double()
    torch.manual_seed(0)
    same = NeuralMemory(DIM, 2, batch_size=4, update_rule=TitansRule(momentum_order=2, spectral_norm=True)).double()
    seq = torch.randn(1, 12, DIM, dtype=torch.float64)
    assert torch.equal(memory(seq)[0], same(seq)[0])


class Doubled(TitansRule):
    """A loss of its own, with two arguments."""

    def loss(self, prediction, target):
        return 2 * super().loss(prediction, target)


def test_a_rule_may_have_a_loss_of_its_own():
    memory = randomise(NeuralMemory(DIM, 2, batch_size=4, update_rule=Doubled(), engine="sequential").double())
    same = NeuralMemory(DIM, 2, batch_size=4, default_step_transform_max_lr=2.0).double()
    same.load_state_dict(memory.state_dict())
    seq = torch.randn(1, 12, DIM, dtype=torch.float64)
    assert_close(memory(seq)[0], same(seq)[0], 1e-9)
