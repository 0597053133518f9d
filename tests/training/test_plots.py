"""The pictures of a run show what they say."""

import json
import math

import pytest

from titans_pytorch.training import plots


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn, in place of a file."""
    kept = []
    monkeypatch.setattr(plots, "saved", lambda figure, target: kept.append(figure) or True)
    return kept


def metrics(folder, *records):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_accuracy_with_writing_on_and_off(figures, tmp_path):
    on, off = "copy_accuracy", "copy_accuracy_storing_off"
    path = metrics(
        tmp_path, {"step": 1, "loss": 2.0}, {"step": 5, on: 0.5, off: 0.125}, {"step": 10, on: 1.0, off: 0.25}
    )
    scores = [
        {"length": 64, "accuracy": 0.75, "storing_off": 0.1},
        {"length": 128, "accuracy": 0.5, "storing_off": 0.2},
    ]
    assert plots.draw_accuracy(path, tmp_path / "a.png", "title", on, 0.0625, scores)
    curves, bars = figures[0].axes
    found = lines(curves)
    assert found["writing on"] == [[5, 50], [10, 100]]
    assert found["writing off"] == [[5, 12.5], [10, 25]]
    assert {y for _, y in found["chance 6.2%"]} == {6.25}
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("training step", "accuracy on held-out rows, %")
    assert [bar.get_height() for bar in bars.patches] == [75, 50, 10, 20]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["64 tokens", "128 tokens"]


def test_accuracy_of_a_model_without_memory_that_was_stopped(figures, tmp_path):
    path = metrics(tmp_path, {"step": 5, "copy_accuracy": 0.5})
    assert plots.draw_accuracy(path, tmp_path / "a.png", "title", "copy_accuracy", 0.1)
    (curves,) = figures[0].axes
    assert lines(curves).keys() == {"this model", "chance 10.0%"}


def test_the_loss_in_the_unit_that_is_predicted(figures, tmp_path):
    path = metrics(tmp_path, {"step": 1, "loss": math.log(2)}, {"step": 2, "loss": 3 * math.log(2)})
    assert plots.draw_loss_curve(path, tmp_path / "l.png", "title", "answer", {"xz": 1.5})
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "bits per answer"
    mean = lines(axes)["training, running mean"]
    assert mean[0] == pytest.approx([1, 1])
    assert mean[1] == pytest.approx([2, (0.95 * 1 + 3) / 1.95])
    assert "xz 1.50" in lines(axes)
