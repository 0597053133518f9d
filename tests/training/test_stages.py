"""Two stages of training: the core with its memories off, then the memories."""

import pytest
import torch
from tiny_script import TinyModel
from two_processes import Model, patterns

from titans_pytorch.analysis.storing import memories_of, storing_off
from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.loop import Trainer
from titans_pytorch.training.metrics import read_metrics
from titans_pytorch.training.optim import learning_rate

CPU = torch.device("cpu")


def trainer(out, model=None, **settings):
    torch.manual_seed(0)
    model = model or Model(17).double()
    base = {"batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "validate_every": 0, "checkpoint_every": 0}
    config = TrainConfig(**{**base, **settings})
    return Trainer(model, patterns(config), config, out, device=CPU)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("after_core", ["memory", "all"])
def test_which_parameters_move(tmp_path, after_core):
    training = trainer(tmp_path, steps=4, core_steps=2, after_core=after_core)
    model = training.model
    seen, step = [weights(model)], training.optimizer.step

    def watched():
        step()
        seen.append(weights(model))

    training.optimizer.step = watched
    training.fit()
    of_memory = {name for name in seen[0] if name.startswith("memory.")}
    others = seen[0].keys() - of_memory
    assert moved(seen[0], seen[2]) == others
    assert moved(seen[2], seen[4]) == (of_memory if after_core == "memory" else of_memory | others)
    assert all(p.requires_grad for p in model.parameters())
    assert [r["stage"] for r in read_metrics(training.metrics)] == ["core"] * 2 + [after_core] * 2


def test_the_core_learns_with_storing_off(tmp_path):
    """Its losses are those of the model within `storing_off`; afterwards the model stores again."""
    one = trainer(tmp_path / "a", steps=3, core_steps=2)
    one.fit()
    torch.manual_seed(0)
    model = Model(17).double()
    model.memory.requires_grad_(False)
    other = trainer(tmp_path / "b", model, steps=2)
    other.subject = one.subject
    with storing_off(other.model):
        other.fit()
    losses = [[r["loss"] for r in read_metrics(t.metrics)][:2] for t in (one, other)]
    assert losses[0] == losses[1]
    ids = one.subject.batch(0, 2).ids
    with storing_off(one.model):
        off = one.model(ids)
    assert not torch.equal(off, one.model(ids))


def test_a_run_resumes_in_its_second_stage(tmp_path):
    whole = trainer(tmp_path / "a", steps=6, core_steps=2)
    whole.fit()
    first = trainer(tmp_path / "b", steps=6, core_steps=2, checkpoint_every=4)
    first.on_step = lambda step: (_ for _ in ()).throw(KeyboardInterrupt) if step == 5 else None
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = trainer(tmp_path / "b", steps=6, core_steps=2)
    again.resume()
    assert again.progress.step == 4
    again.fit()
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert losses[0] == losses[1]


def test_storing_off_is_exact():
    """Nothing is stored and nothing fades: the output does not depend on earlier tokens, and the state stays."""
    torch.manual_seed(0)
    model = Model(17).double()
    memory = model.memory
    a, b = torch.randn(2, 1, 12, 8, dtype=torch.double)
    b[:, -1] = a[:, -1]
    with storing_off(model):
        (out_a, state), (out_b, _) = memory(a), memory(b)
    assert torch.equal(out_a[:, -1], out_b[:, -1])
    for name, start in memory.init_weights(1).items():
        assert torch.equal(state.states[0][name], start)
    assert not torch.equal(memory(a)[0][:, -1], memory(b)[0][:, -1])
    assert memories_of(model) == {"memory": memory}


def test_each_stage_has_its_own_schedule():
    two = TrainConfig(steps=30, core_steps=10, warmup_steps=2, lr=1.0)
    first, second = TrainConfig(steps=10, warmup_steps=2, lr=1.0), TrainConfig(steps=20, warmup_steps=2, lr=1.0)
    assert [learning_rate(s, two) for s in range(10)] == [learning_rate(s, first) for s in range(10)]
    assert [learning_rate(s, two) for s in range(10, 30)] == [learning_rate(s, second) for s in range(20)]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="core_steps must be fewer than steps = 5, got 5"):
        TrainConfig(steps=5, core_steps=5)
    with pytest.raises(TrainingError, match="core_steps must be 0 with a model that has no memory, got 2"):
        trainer(tmp_path, TinyModel(8), steps=5, core_steps=2)
