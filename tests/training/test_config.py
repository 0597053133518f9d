import json
import re
from dataclasses import replace

import pytest
from tiny_script import PRESETS

from titans_pytorch.training.config import DataConfig, TrainConfig, from_dict, settings_of, updated
from titans_pytorch.training.options import read_arguments

TINY = PRESETS["tiny"]


def parse(*argv):
    def add_options(parser):
        parser.add_argument("--out")
        parser.add_argument("--resume", action="store_true")

    return read_arguments("script", "about", list(argv), add_options, lambda options: TINY, presets=PRESETS)


def test_json_round_trip():
    changed = updated(TINY, {"width": 5, "layers": (3,), "lr": 0.25, "data": "x", "temperature": 0})
    assert from_dict(TINY, json.loads(changed.to_json())) == changed
    assert from_dict(TINY, json.loads(replace(changed, name="wide").to_json())).name == "wide"


def test_every_setting_has_help_and_a_unique_name():
    assert {"width", "data", "lr", "temperature"} <= set(settings_of(TINY))
    assert all(f.metadata["help"] for _, f, _ in settings_of(TINY).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1.0}, "unknown setting lrr; the nearest is lr"),
        ({"batch_sise": 1}, "the nearest is batch_size"),
        ({"steps": "5"}, "steps must be a whole number, got '5'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 0}, "steps must be a positive number, got 0"),
        ({"layers": ("a",)}, "layers must be whole numbers or none, got \\('a',\\)"),
        ({"precision": "half"}, "precision must be one of auto, float32, bfloat16, got 'half'"),
        ({"held_out": 1.0}, "held_out must be .*, got 1.0"),
        ({"beta2": 1.0}, "beta2 must be .*, got 1.0"),
        ({"clip": -1.0}, "clip must be .*, got -1.0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        updated(TINY, changes)


def test_unknown_keys_in_a_saved_configuration():
    saved = TINY.to_dict()
    with pytest.raises(ValueError, match="unknown section modle; the nearest is model"):
        from_dict(TINY, {"modle": saved["model"]})
    saved["training"]["warmup"] = 3
    with pytest.raises(ValueError, match="unknown setting training.warmup; the nearest is warmup_steps"):
        from_dict(TINY, saved)


def test_two_groups_may_not_share_a_name():
    with pytest.raises(ValueError, match="data: a setting of both model and data"):
        settings_of(replace(TINY, model=DataConfig()))


def test_command_line():
    given = parse("--lr", "3e-4", "--batch_size=7", "--layers", "1,4", "--out", "o", "--resume", "--train.steps", "9")
    assert vars(given.options) == {"out": "o", "resume": True}
    assert given.values == {"lr": 3e-4, "batch_size": 7, "layers": (1, 4), "steps": 9}
    assert given.run == updated(TINY, given.values)
    assert parse("--layers", "none").values == {"layers": None}
    assert parse().values == {}
    assert vars(parse().options) == {"out": None, "resume": False}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown setting --lrr; the nearest is --lr"),
        (["stray"], "got 'stray', which is no setting's name"),
        (["--lr", "fast"], "must be a number, got 'fast'"),
        (["--steps", "1.5"], "must be a whole number, got '1.5'"),
        (["--step", "5"], "the nearest is --steps"),
        (["--precision", "half"], "half"),
        (["--grad-accum", "-1"], "grad_accum must be a positive number, got -1"),
    ],
)
def test_command_line_mistakes_take_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(*argv)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_help_shows_each_presets_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "[tiny: 16, wide: 24]" in shown
    assert f"highest learning rate [tiny: 0.01, wide: {TrainConfig().lr}]" in shown


def test_a_configuration_that_version_0_1_saved():
    config = replace(TINY, name="tiny")
    saved = config.to_dict()
    saved["train"], saved["preset"] = saved.pop("training"), saved.pop("name")
    assert from_dict(TINY, saved) == config
