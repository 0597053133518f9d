"""benchmark_rules.py: every rule at equal state, every load, writing on and off."""

import json

import pytest
import torch
from benchmark_rules import NONE, Model, compare, memory_of

from titans_pytorch.memory.named.registry import NAMED
from titans_pytorch.training.errors import TrainingError


@pytest.mark.parametrize("rule", NAMED)
@pytest.mark.parametrize("state", [4096, 9000])
def test_states_are_of_equal_size(rule, state):
    weights = memory_of(rule, state).init_weights(1).values()
    assert sum(w[0].numel() for w in weights) == pytest.approx(state, rel=0.06)


def test_the_arm_that_never_writes():
    torch.manual_seed(0)
    model = Model(9, NONE, 4096)
    memory = model.memory
    _, state = memory(torch.randn(1, 70, 64))
    assert all(torch.equal(state.states[0][name], w) for name, w in memory.init_weights(1).items())


def test_a_quick_run(tmp_path, capsys):
    files = ["--output-json", str(tmp_path / "r.json"), "--output-png", str(tmp_path / "r.png")]
    compare(["--quick", *files])
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["tasks"]) == ["recall", "needle", "copy"]
    for task in result["tasks"].values():
        assert list(task["rules"]) == ["none", "deltanet", "moneta"]
        for rule, found in task["rules"].items():
            assert [len(point["accuracy"]["seeds"]) for point in found["curve"]] == [2, 2]
            if rule == NONE:
                assert all(p["accuracy"] == p["storing_off"] for p in found["curve"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "copy: accuracy by payload" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--rules", "delta_net"], "deltanet"), (["--tasks", "recal"], "recall"), (["--rules", ","], "none")],
)
def test_wrong_names(argv, named):
    with pytest.raises(TrainingError, match=named):
        compare(argv)
