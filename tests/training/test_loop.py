import math
import random

import pytest
import torch
from tiny_script import PRESETS, TinyModel
from torch import nn

from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.data import ByteData
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.loop import Trainer
from titans_pytorch.training.metrics import MetricsLog, read_metrics
from titans_pytorch.training.optim import build_optimizer, learning_rate
from titans_pytorch.training.text import Text

CPU = torch.device("cpu")


def data_of(length=2000):
    drawn = torch.randint(97, 105, (length,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ByteData("drawn", None, "", length, drawn[:-200], drawn[-200:])


def trainer(out, model=None, **settings):
    torch.manual_seed(0)
    model = model or TinyModel(12).double()
    settings = {
        "steps": 6,
        "batch_size": 4,
        "seq_len": 12,
        "lr": 1e-2,
        "warmup_steps": 2,
        "validate_every": 0,
        **settings,
    }
    config = TrainConfig(**settings)
    return Trainer(model, Text(data_of(), config), config, out, device=CPU)


def without_dropout():
    torch.manual_seed(0)
    model = TinyModel(8).double()
    model.drop = nn.Identity()
    return model


def test_accumulation_is_one_large_batch(tmp_path):
    large, small = without_dropout(), without_dropout()
    trainer(tmp_path / "a", large, batch_size=6).fit()
    trainer(tmp_path / "b", small, batch_size=2, grad_accum=3).fit()
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # Adam divides rounding by tiny second moments
    for key in ("loss", "grad_norm"):
        values = [[r[key] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_learning_rate():
    config = TrainConfig(steps=110, warmup_steps=10, lr=2.0, min_lr_ratio=0.25)
    assert [learning_rate(step, config) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(60, config) == pytest.approx(1.25)  # half way between 2 and 0.5
    assert learning_rate(35, config) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(110, config) == learning_rate(500, config) == pytest.approx(0.5)
    assert learning_rate(0, TrainConfig(warmup_steps=0, lr=2.0)) == 2.0


def test_only_linear_maps_decay():
    model = TinyModel(8)
    decays = {id(p): g["weight_decay"] for g in build_optimizer(model, TrainConfig()).param_groups for p in g["params"]}
    by_name = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert by_name.pop("out.weight") == 0.1
    assert set(by_name.values()) == {0.0}


def test_the_gradient_is_clipped_and_its_norm_logged(tmp_path):
    seen = []
    training = trainer(tmp_path, clip=1e-3, steps=2)
    step = training.optimizer.step
    training.optimizer.step = lambda: (
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in training.model.parameters()))),
        step(),
    )
    training.fit()
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert all(r["grad_norm"] > 1e-2 for r in read_metrics(training.metrics))


def test_muon_takes_the_hidden_matrices():
    model = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 8), nn.LayerNorm(12))
    model.to_logits = nn.Linear(12, 9)
    config = TrainConfig(optimizer="muon", lr=0.5, weight_decay=0.25)
    muon, rest = build_optimizer(model, config).optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(rest, torch.optim.AdamW)
    assert [p for g in muon.param_groups for p in g["params"]] == [model[1].weight]
    others = {id(p): g["weight_decay"] for g in rest.param_groups for p in g["params"]}
    assert others.keys() == {id(p) for p in model.parameters()} - {id(model[1].weight)}
    assert {others[id(p)] for p in (model[2].weight, model.to_logits.weight)} == {0.25}
    assert others[id(model[0].weight)] == 0.0
    assert isinstance(build_optimizer(nn.Embedding(2, 2), config), torch.optim.AdamW)  # nothing for Muon


def test_the_state_of_another_optimizer():
    model = TinyModel(16)
    adamw, muon = (build_optimizer(model, TrainConfig(optimizer=name)) for name in ("adamw", "muon"))
    with pytest.raises(ValueError, match="the state of another optimizer"):
        muon.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(tmp_path, precision):
    training = trainer(tmp_path, TinyModel(8), steps=60, precision=precision, validate_every=60)
    training.fit()
    records = read_metrics(training.metrics)
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 60
    assert losses[0] > 5.0
    assert sum(losses[-5:]) / 5 < 3.0  # eight byte values: 2.08 nats at best
    assert records[-1]["held_out_bits_per_byte"] < 4.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_repeats_the_losses_exactly(tmp_path, optimizer):
    settings = {"steps": 9, "checkpoint_every": 4, "optimizer": optimizer}
    whole = trainer(tmp_path / "a", **settings)
    whole.fit()
    stop_at = random.Random(1).randrange(4, 9)

    def crash(step):
        if step == stop_at:
            raise RuntimeError

    crashed = trainer(tmp_path / "b", **settings)
    crashed.on_step = crash
    with pytest.raises(RuntimeError):
        crashed.fit()
    torch.rand(5)
    resumed = trainer(tmp_path / "b", TinyModel(12).double(), **settings)
    resumed.resume()
    assert resumed.progress.step == 4
    resumed.fit()
    a, b = ([(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(t.metrics)] for t in (whole, resumed))
    assert a == b
    assert [step for step, *_ in b] == list(range(1, 10))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path, bad):
    model = TinyModel(8)
    training = trainer(tmp_path, model, checkpoint_every=2)
    training.on_step = lambda step: step == 3 and model.out.bias.data.fill_(bad)
    before = {}
    training.optimizer.register_step_post_hook(lambda *_: before.update(w=model.out.weight.detach().clone()))
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan; the checkpoint of step 2 is kept in "):
        training.fit()
    assert torch.equal(model.out.weight, before["w"])  # no update was made with it
    resumed = trainer(tmp_path, TinyModel(8), checkpoint_every=2)
    resumed.resume()
    assert all(p.isfinite().all() for p in resumed.model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_not_saved(tmp_path, bad):
    training = trainer(tmp_path, TinyModel(8), checkpoint_every=2)
    training.on_step = lambda step: step == 4 and training.model.out.bias.data.fill_(bad)
    with pytest.raises(Diverged, match=r"step 4: the model's out.bias is not finite; the checkpoint of step 2 is kept"):
        training.fit()
    assert sorted(p.name for p in training.checkpoints.iterdir()) == ["step_00000000", "step_00000002"]


def test_a_measurement_that_is_not_finite_stops(tmp_path, monkeypatch):
    training = trainer(tmp_path, TinyModel(8), validate_every=2)
    monkeypatch.setattr(training.subject, "measure", lambda *_: {"held_out_bits_per_byte": math.nan})
    with pytest.raises(Diverged, match=r"step 2: held_out_bits_per_byte is nan; the checkpoint of step 0 is kept"):
        training.fit()
    assert all("held_out_bits_per_byte" not in r for r in read_metrics(training.metrics))


class SteepModel(TinyModel):
    """A finite loss whose gradient is not: the root of zero."""

    def forward(self, ids, return_loss=False):
        out = super().forward(ids, return_loss)
        return out + (self.out.bias * 0.0).sum().sqrt() if return_loss else out


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    message = (
        r"step 1: the gradient norm is nan; the checkpoint of step 0 is kept.*gradient of the parameter bias of out"
    )
    with pytest.raises(TrainingError, match=message):
        trainer(tmp_path, SteepModel(8)).fit()


class Poisoned(nn.Linear):
    """Infinite where a random number says so, as dropout would draw it. failed: the first call that was."""

    calls = failed = 0

    def forward(self, x):
        self.calls += 1
        bad = bool(torch.rand(()) < 0.1)
        if bad and not self.failed:
            self.failed = self.calls
        return super().forward(x) * (math.inf if bad else 1.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_module_is_named(tmp_path, precision, seed):
    """In the micro-batch that failed, with the random numbers that it had, in its own precision."""
    model = TinyModel(8)
    model.out = Poisoned(8, 256)
    training = trainer(tmp_path, model, precision=precision, grad_accum=4, steps=40)
    torch.manual_seed(seed)
    with pytest.raises(TrainingError) as error:
        training.fit()
    said = str(error.value)
    step, number = divmod(model.out.failed - 1, 4)
    assert said.startswith(f"step {step + 1}: the loss is nan; the checkpoint of step 0 is kept in ")
    wanted = f"micro-batch {number + 1} of 4: the first value that is not finite is the output of out (Poisoned), in "
    assert f"; {wanted}{precision}: " in said


def test_a_full_disk_names_the_step_and_what_is_kept(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    training = trainer(tmp_path, checkpoint_every=2)
    training.on_step = lambda step: step == 4 and monkeypatch.setattr("titans_pytorch.training.checkpoint.write", full)
    with pytest.raises(TrainingError, match=r"step 4: .*No space left on device; the checkpoint of step 2 is kept in"):
        training.fit()
    assert sorted(p.name for p in training.checkpoints.iterdir()) == ["step_00000000", "step_00000002"]


def test_metrics_of_a_run_that_was_cut_off(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, resume_step=1)
    log.write({"step": 2, "loss": 1.25})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}]
    log.close()
    MetricsLog(path).close()
    assert read_metrics(path) == []


def test_presets_are_sound():
    assert PRESETS["tiny"].training.steps == 24
