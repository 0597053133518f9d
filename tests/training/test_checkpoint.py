import errno
import hashlib
import os
import pickle
import random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_script import TinyModel
from torch import nn

from titans_pytorch.common.files import read_json, write_json
from titans_pytorch.training import checkpoint as module
from titans_pytorch.training.checkpoint import (
    Progress,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_last,
    save_checkpoint,
    save_weights,
    write_sums,
)
from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.optim import build_optimizer


def trained(steps=3, width=6):
    torch.manual_seed(0)
    model = TinyModel(width)
    optimizer = build_optimizer(model, TrainConfig())
    for _ in range(steps):
        model(torch.randint(256, (2, 9)), return_loss=True).backward()
        optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path):
    model, optimizer = trained()
    random.seed(5)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(3, 12, 1.5), {"config": {"a": [1, None]}})
    expected = torch.rand(4), random.random()
    fresh, fresh_optimizer = trained(0)
    assert load_checkpoint(path, fresh, fresh_optimizer) == Progress(3, 12, 1.5)
    assert (torch.rand(4).tolist(), random.random()) == (expected[0].tolist(), expected[1])
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = optimizer.state_dict(), fresh_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())
    assert load_file(path / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.load(path / "training.pt", weights_only=True)["about"] == {"config": {"a": [1, None]}}


def test_the_latest_two_are_kept(tmp_path):
    model, optimizer = trained()
    kept = []
    for step in (0, 5, 10):
        kept.append(save_checkpoint(tmp_path, model, optimizer, Progress(step), {}))
        assert sorted(tmp_path.iterdir()) == kept[-2:]
        assert last_checkpoint(tmp_path) == kept[-1]
    # of a run that began again: what is later belongs to another one
    again = save_checkpoint(tmp_path, model, optimizer, Progress(7), {})
    assert sorted(tmp_path.iterdir()) == [kept[1], again]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("name", "failure"), [("save_model", full_for_safetensors), ("write", full), ("write_sums", full), ("remove", full)]
)
def test_a_full_disk_leaves_the_earlier_one(tmp_path, monkeypatch, name, failure):
    model, optimizer = trained()
    good = save_checkpoint(tmp_path, model, optimizer, Progress(5), {})
    with monkeypatch.context() as patch:
        patch.setattr(f"{module.__name__}.{name}", failure)
        with pytest.raises(OSError, match="No space left on device") as raised:
            save_checkpoint(tmp_path, model, optimizer, Progress(10), {})
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [good]
    load_checkpoint(good, *trained(0))
    save_checkpoint(tmp_path, model, optimizer, Progress(10), {})


def test_a_half_written_one_is_not_the_last(tmp_path):
    model, optimizer = trained()
    good = save_checkpoint(tmp_path, model, optimizer, Progress(5), {})
    (tmp_path / "step_00000010.part").mkdir()
    assert last_checkpoint(tmp_path) == good
    assert save_checkpoint(tmp_path, model, optimizer, Progress(10), {}).name == "step_00000010"


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, name, share):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(5), {}) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(TrainingError, match=f"{name} is damaged"):
        load_checkpoint(path.parent, *trained(0))
    without_sums(path.parent)
    with pytest.raises(TrainingError, match=f"{name} cannot be read, it (may be|is) cut off"):
        load_checkpoint(path.parent, *trained(0))


def test_a_missing_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {}) / "model.safetensors"
    path.unlink()
    with pytest.raises(TrainingError, match="model.safetensors cannot be read"):
        load_checkpoint(path.parent, *trained(0))


def without_sums(checkpoint):
    """As an earlier version wrote it."""
    (checkpoint / "SHA256SUMS").unlink()
    (checkpoint / "versions.json").unlink()


def test_weights_of_another_model(tmp_path):
    save_weights(TinyModel(6), tmp_path / "w")
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_weights(TinyModel(7), tmp_path / "w")


def test_shared_tensors(tmp_path):
    def tied():
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    save_weights(model, tmp_path / "w")
    load_weights(other, tmp_path / "w")
    assert torch.equal(other[1].weight, model[0].weight)


class Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"step": 1}), "no checkpoint"),
        (pickle.dumps(Foreign()), "no checkpoint"),
        (b"", "no checkpoint"),
        ({"step": 1}, "training.pt is no checkpoint of a run: position is missing or of another type"),
        ([1], "training.pt is no checkpoint of a run: it holds a list"),
        (torch.ones(2), "training.pt is no checkpoint of a run: it holds a Tensor"),
    ],
)
def test_a_foreign_state_is_one_line(tmp_path, content, message, recwarn):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {})
    without_sums(path)
    if isinstance(content, bytes):
        (path / "training.pt").write_bytes(content)
    else:
        torch.save(content, path / "training.pt")
    with pytest.raises(TrainingError, match=message) as raised:
        load_checkpoint(path, *trained(0))
    assert "\n" not in str(raised.value)
    assert not recwarn.list


def test_a_state_of_wrong_parts(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {})
    state = torch.load(path / "training.pt", weights_only=True)
    without_sums(path)
    for name, value in (("optimizer", {}), ("torch_rng", torch.zeros(3)), ("python_rng", (1, 2, 3))):
        torch.save({**state, name: value}, path / "training.pt")
        with pytest.raises(TrainingError, match=r"does not fit the optimizer|no state of random number generators"):
            load_checkpoint(path, *trained(0))


def test_another_format(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {})
    write_json(path / "versions.json", {"format": 3})
    write_sums(path, ("model.safetensors", "training.pt", "versions.json"))
    with pytest.raises(TrainingError, match="step_00000005 has format 3, this version reads format 2"):
        read_last(tmp_path)


def test_other_versions_are_said(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {})
    write_json(path / "versions.json", {**read_json(path / "versions.json"), "torch": "1.0"})
    write_sums(path, ("model.safetensors", "training.pt", "versions.json"))
    said = []
    assert read_last(tmp_path, said.append).path == path
    assert said == [f"{path} was written with torch 1.0 (here {torch.__version__}): losses may differ slightly"]


def test_the_hashes_are_those_of_sha256sum(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), Progress(5), {})
    lines = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
    assert lines.keys() == {p.name for p in path.iterdir()} - {"SHA256SUMS"}
    for name, digest in lines.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path, bad):
    save_weights(TinyModel(6), tmp_path / "w")
    before = (tmp_path / "w").read_bytes()
    model = TinyModel(6)
    model.out.weight.data[3, 2] = bad
    with pytest.raises(Diverged, match="the model's out.weight is not finite"):
        save_weights(model, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_mask_of_minus_infinity_is_no_divergence(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    save_weights(model, tmp_path / "w")
