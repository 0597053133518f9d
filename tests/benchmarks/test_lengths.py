"""benchmark_lengths.py: every model, every length, storing on and off; what is finished is kept."""

import json

import pytest
from benchmark_lengths import compare, summary

CONFIG = """
model: {vocab_size: 40, d_model: 8, n_layers: 1, n_heads: 2, mem_heads: 2, mem_layers: 1, n_persistent: 1, window: 8,
        chunk_size: 8}
data: {task: recall, settings: {pairs: 2, queries: 2, keys: 8, values: 4}, test_times: [1, 2], test_rows: 8}
training: {steps: 2, batch_size: 4, seq_len: 16, warmup_steps: 1, threads: 1, device: cpu, validate_every: 0}
"""


def test_all_models(tmp_path, capsys):
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(CONFIG)
    words = ["--config", str(config), "--seeds", "2", "--out", str(out)]
    files = ["--output-json", str(tmp_path / "r.json"), "--output-png", str(tmp_path / "r.png")]
    compare([*words, *files])
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["models"]) == ["mac", "mag", "mal", "lmm", "baseline"]
    for name, model in result["models"].items():
        assert [point["length"] for point in model["curve"]] == [16, 32]
        assert [len(point["accuracy"]["seeds"]) for point in model["curve"]] == [2, 2]
        assert ("storing_off" in model["curve"][0]) == (name != "baseline")
    assert result["chance"] == 0.25
    assert result["run"]["seeds"] == [0, 1]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "mac, storing off" in capsys.readouterr().out
    compare(words)
    assert "== mac" not in capsys.readouterr().out, "finished runs are kept"


def test_a_summary():
    scores = [[{"length": 8, "accuracy": a, "storing_off": 0.1}] for a in (0.5, 0.7, 0.9)]
    found = summary([{"scores": s, "parameters": 3, "training_seconds": 1.0} for s in scores])
    assert found["curve"][0]["accuracy"]["mean"] == pytest.approx(0.7)
    assert found["curve"][0]["accuracy"]["sd"] == pytest.approx(0.2)
    assert found["curve"][0]["storing_off"]["sd"] == pytest.approx(0.0)
