"""benchmark_text.py: its arms, its sums, and a run of a few steps that is kept."""

import json

import pytest
from benchmark_text import arms_of, compare, parameters, preset, summary


def test_the_arms_differ_in_the_memory_and_the_wide_one_is_as_large():
    arms = {name: run.model for name, run in arms_of(preset()).items()}
    sizes = {name: parameters(model) for name, model in arms.items()}
    assert arms["memory"].memory
    assert not arms["none"].memory
    assert not arms["wider"].memory
    assert sizes["none"] < sizes["memory"] <= sizes["wider"] < 1.02 * sizes["memory"]


def run(bits: float, **more) -> dict:
    return {
        "held_out_bits_per_byte": bits,
        "parameters": 7,
        "training_seconds": 1.0,
        "compared_with": {"xz": 2.5},
        **more,
    }


def test_a_summary_pairs_the_seeds():
    found = {
        "memory": [run(2.0, storing_off=2.5), run(2.2, storing_off=2.7)],
        "none": [run(2.1), run(2.31)],
        "wider": [run(1.9), run(2.2)],
    }
    result = summary(found)
    assert result["arms"]["memory"]["mean"] == pytest.approx(2.1)
    assert result["arms"]["storing_off"]["values"] == [2.5, 2.7]
    against = {pair["other"]: pair for pair in result["versus"]}
    assert against["storing_off"]["mean"] == pytest.approx(0.5), "above zero: the memory is better"
    assert against["storing_off"]["verdict"] == "better than storing_off"
    assert against["none"]["mean"] == pytest.approx(0.105)
    assert against["wider"]["verdict"] == "no difference found"


def test_a_short_run_is_kept(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"what is stored here is asked for there. " * 100)
    words = ["--data", str(text), "--seeds", "1", "--steps", "1", "--seq-len", "16", "--device", "cpu"]
    words += ["--out", str(tmp_path / "out")]
    compare([*words, "--output-json", str(tmp_path / "r.json"), "--output-png", str(tmp_path / "r.png")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["arms"]) == {"memory", "storing_off", "none", "wider"}
    assert result["run"]["seeds"] == [0]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    compare(words)
    assert "==" not in capsys.readouterr().out, "finished runs are kept"
