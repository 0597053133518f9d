"""`--rule NAME` in every command: trained, read back, analysed, searched."""

import json

import pytest
import torch

from titans_pytorch.cli.main import main
from titans_pytorch.models.rule_settings import RULES
from titans_pytorch.models.runs import load_run

from .conftest import tiny_yaml

OF_COPY = "data: {task: copy, settings: {payload: 4, segment_len: 8}, test_rows: 4}"


@pytest.mark.parametrize("rule", ["gated_deltanet", "lact"])
def test_train_and_every_command(tmp_path, rule, capsys):
    out = tmp_path / "run"
    words = ["train", "--config", tiny_yaml(tmp_path, OF_COPY, "mag"), "--vocab-size", "18", "--rule", rule]
    assert main([*words, "--check"]) == 0
    assert f"  rule: {rule}\n" in capsys.readouterr().out
    assert main([*words, "--steps", "2", "--out", str(out)]) == 0
    run, model = load_run(out)
    assert run.model.rule == rule
    memory = model.blocks[0].layer.remember.memory
    assert memory.store_chunk_size == (4 if rule == "lact" else 1)
    with torch.no_grad():
        assert model(torch.randint(0, 18, (1, 9))).isfinite().all()
    capsys.readouterr()
    assert main(["analyze", str(out), "--length", "24", "--piece", "3"]) == 0  # pieces without a complete chunk
    assert main(["memory-check", str(out)]) == 0
    assert main(["eval", str(out), "--length", "24"]) == 0
    found = json.loads((out / "analysis" / "memory.json").read_text())["memories"][0]
    assert len(found["surprise"]) == (24 + 2) // memory.store_chunk_size  # with two persistent tokens


def test_search_over_rules(tmp_path):
    """The configuration's chunk_size is of the one rule that has a mini-batch."""
    words = ["--config", tiny_yaml(tmp_path, OF_COPY, "lmm"), "--vocab-size", "18", "--steps", "1"]
    out = tmp_path / "search"
    assert (
        main(["search", *words, "--out", str(out), "--grid", "rule=titans,deltanet,yaad", "--report-seeds", "7"]) == 0
    )
    saved = [json.loads(path.read_text())["model"] for path in out.glob("0*-seed0/config.json")]
    assert {model["rule"]: model["chunk_size"] for model in saved} == {"titans": 4, "deltanet": 64, "yaad": 4}


def test_mistakes_of_a_search_over_rules(tmp_path, capsys):
    words = ["search", "--config", tiny_yaml(tmp_path, OF_COPY, "lmm"), "--out", str(tmp_path / "search")]
    assert main([*words, "--grid", "rule=titans,delta_net"]) == 1
    assert "rule must be one of " in (error := capsys.readouterr().err)
    assert error.endswith("got 'delta_net'; the nearest is deltanet\n")
    assert error.count("\n") == 1
    assert main([*words, "--grid", "rule=deltanet", "--grid", "chunk_size=4,8"]) == 1
    assert "grid: chunk_size 4 cannot be combined with rule deltanet" in capsys.readouterr().err


def test_help_names_the_rules(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--rule {titans," + ",".join(RULES) + "}" in " ".join(capsys.readouterr().out.split())


def test_a_run_keeps_its_rule(tmp_path, capsys):
    words = ["--config", tiny_yaml(tmp_path, OF_COPY, "lmm"), "--vocab-size", "18", "--rule", "yaad", "--steps", "1"]
    out = tmp_path / "run"
    assert main(["train", *words, "--out", str(out)]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "2"]) == 0
    assert load_run(out)[0].model.rule == "yaad"
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--rule", "deltanet"]) == 1
    assert "rule: " in capsys.readouterr().err
