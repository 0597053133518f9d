"""What is refused before data is read."""

import dataclasses
import os
import re

import pytest
import torch

from tests import helpers
from titans_pytorch.cli.main import main
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.training import start
from titans_pytorch.training.config import RunConfig, TrainConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.mac import MacConfig, build_mac
from titans_pytorch.training.run import Run, one_line, train
from titans_pytorch.training.start import check_start, least_bytes, processes_of


def refused(tmp_path, **settings) -> str:
    """By `train`, before it asks for a model or data."""

    def never(*_):
        raise AssertionError("asked for data or a model")

    run = Run(TitansConfig.tiny(device="cpu").replace(**settings), tmp_path / "run", False, "")
    with pytest.raises(TrainingError) as error:
        train(run, never, never)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_stride": 65, "seq_len": 64}, "eval_stride must be at most seq_len = 64, got 65"),
        ({"device": "meta"}, "device must be one that computes, got 'meta'"),
        ({"device": "cuda:77"}, "device must be ..., got 'cuda:77'"),
        ({"device": "hpu"}, "device must be ..., got 'hpu'"),
        ({"device": "gpu"}, "device must be ..., got 'gpu'"),
        (
            {"d_model": 2**40, "mem_heads": 1},
            "the parameters (widths, layers, vocab_size) and their optimizer need at least",
        ),
        ({"vocab_size": 10**12}, "the parameters (widths, layers, vocab_size) and their optimizer need at least"),
        ({"ffn_mult": 3e38}, "the parameters (widths, layers, vocab_size) and their optimizer need at least"),
        ({"batch_size": 10**9}, "the activations of a batch (batch_size, seq_len) need at least"),
        ({"seq_len": 10**12}, "the activations of a batch (batch_size, seq_len) need at least"),
        ({"eval_batch_size": 10**12}, "the windows of an evaluation (eval_batch_size, seq_len) need at least"),
    ],
)
def test_refused_at_the_start(tmp_path, settings, message):
    assert re.search(helpers.message(message), refused(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("inf")}, "lr must be a number of at most 3.4e+38 in size, got inf"),
        ({"lr": 10**400}, "lr must be at most 9223372036854775807, got ..."),
        ({"window": 0x10**9000}, "window must be at most 9223372036854775807, got a int too long to print"),
        ({"steps": 2**64}, "steps must be at most 9223372036854775807"),
        ({"data": "a\0b"}, "data must be text without control characters"),
        ({"data": "\ud800"}, "data must be text without control characters"),
        ({"data": "x" * 5000}, "data must be at most 4096 characters, got 5000 characters"),
        ({"sample_len": 10**12}, "sample_len must be at most 10000000, got 1000000000000"),
        ({"validate_sequences": 10**12}, "validate_sequences must be at most"),
        ({"threads": 10**9}, "threads must be at most"),
        ({"n_layers": 10**6}, "n_layers must be at most"),
        ({"init_step_bias": 1e300}, "init_step_bias must be a number of at most"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be at most 1.0, got 1.5"),
    ],
)
def test_refused_as_a_setting(settings, message):
    with pytest.raises(ValueError, match=helpers.message(message)):
        TitansConfig.tiny(**settings)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number of at least 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be ..., got '2.0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be ..., got '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK must be a whole number of at least 0, got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE = 2, got 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "9"}, "LOCAL_RANK must be below WORLD_SIZE = 2, got 9"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "99999"}, "MASTER_PORT must be at most 65535, got 99999"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be ..., got 'http'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE above 1 needs RANK"),
    ],
)
def test_what_a_launcher_says(environment, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=helpers.message(message)):
        processes_of(environment)
    for name in start.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.search(helpers.message(message), refused(tmp_path))


def test_processes_that_are_launched_well():
    assert processes_of({}) == processes_of({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"}) == 1
    launched = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    assert processes_of(launched) == 4


def test_a_batch_is_shared_by_all_processes():
    run = TitansConfig.tiny(batch_size=6)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 processes, got 6"):
        start.check_settings(run, 4)


def test_the_folder(tmp_path):
    run = TitansConfig.tiny(device="cpu")
    (tmp_path / "file").write_text("")
    assert check_start(run, tmp_path / "a" / "b") == torch.device("cpu")
    with pytest.raises(TrainingError, match="out must be a folder, got"):
        check_start(run, tmp_path / "file")
    with pytest.raises(TrainingError, match="out must be in a folder; .*file is a file, got"):
        check_start(run, tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="out must be"):
        check_start(run, tmp_path / "link")
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(TrainingError, match="out must be in a folder that can be written to"):
            check_start(run, tmp_path / "closed" / "run")


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "baseline"])
def test_the_parameters_are_counted_from_below(variant):
    from titans_pytorch.models.family import build_model

    for settings in ({}, {"mem_layers": 1}, {"d_hidden": 3}, {"conv_kernel": 0}, {"n_persistent": 0}, {"window": 8}):
        config = TitansConfig.tiny(variant=variant, **settings).model
        there = sum(p.numel() for p in build_model(config, "meta").parameters())
        assert there / 4 < config.least_parameters() <= there


@pytest.mark.parametrize("changes", [{}, {"memory": False}, {"heads": 1, "dim_head": 8}, {"ff_mult": 0.1}])
def test_those_of_the_transformer(changes):
    config = dataclasses.replace(MacConfig(dim=64, depth=2, neural_memory_layers=(2,)), **changes)
    there = sum(p.numel() for p in build_mac(config, torch.device("cpu")).parameters())
    assert config.least_parameters() <= there
    huge = RunConfig(dataclasses.replace(config, dim=10**9), training=TrainConfig(device="cpu"))
    assert max(least_bytes(huge).values()) > 1e18


def test_check_only(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--preset", "tiny", "--steps", "7", "--device", "cpu", "--out", str(out), "--check"]) == 0
    said = capsys.readouterr().out
    config = TitansConfig.from_yaml(said[: said.index("\n\n")])
    assert config == TitansConfig.tiny(steps=7, device="cpu")
    assert re.search(r"\n[\d,]+ parameters; nothing was trained\n$", said)
    assert not out.exists()
    assert main(["train", "--preset", "tiny", "--eval-stride", "9999", "--check", "--out", str(out)]) == 1
    assert "eval_stride must be at most" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--task", "copy", "--first-len", "3", "--check", "--out", str(out)]) == 1
    assert "first_len must be" in capsys.readouterr().err


def test_a_search_checks_all_points_first(tmp_path, capsys):
    words = ["search", "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "s"), "--grid"]
    assert main([*words, "eval_stride=8,9999"]) == 1
    assert "eval_stride must be at most" in capsys.readouterr().err
    assert main([*words, "lr=1e-3", "--seeds=-1"]) == 1
    assert "seed must be" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_no_memory_is_a_line(capsys):
    assert one_line("titans", lambda: torch.empty(2**58)) == 1
    assert capsys.readouterr().err.count("\n") == 1

    def fails():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        one_line("titans", fails)
