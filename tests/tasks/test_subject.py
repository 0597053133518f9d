"""A task as a subject of training."""

import pytest
import torch

from titans_pytorch.models.config import ModelConfig
from titans_pytorch.tasks.registry import build_task
from titans_pytorch.tasks.subject import TaskSubject, subject_of
from titans_pytorch.training.config import DataConfig, RunConfig, TaskConfig, TrainConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.text import Text


def subject(first_len, **train):
    task = build_task("recall", {"pairs": 2, "queries": 2, "length": 64})
    return TaskSubject(task, TrainConfig(batch_size=4, seq_len=64, **train), TaskConfig("recall", first_len=first_len))


def test_rows_grow():
    """16, 32, then 64 tokens: the first two for a quarter of the training each."""
    growing = subject(16, steps=20, grad_accum=2)
    shapes = [tuple(growing.batch(4 * i, 4).ids.shape) for i in range(40)]
    assert shapes == [(16, 16)] * 10 + [(8, 32)] * 10 + [(4, 64)] * 20
    assert all(growing.tokens(4 * i, 4) == 4 * 64 for i in range(40))
    for i in (0, 12, 39):  # two processes, and one
        halves = [growing.batch(4 * i + first, 2).ids for first in (0, 2)]
        assert torch.equal(torch.cat(halves), growing.batch(4 * i, 4).ids)
    assert subject(0, steps=20).length_at(0) == 64
    assert [subject(48, steps=4).length_at(4 * i) for i in range(4)] == [48, 48, 64, 64]


def test_settings_name_the_subject(text_file, tmp_path):
    train = TrainConfig(seq_len=32, seed=5)
    config = RunConfig(ModelConfig(), TaskConfig("recall", {"pairs": 5}), train)
    found = subject_of(config)
    assert found.task == build_task("recall", {"pairs": 5, "length": 32, "seed": 5})
    text = RunConfig(ModelConfig(), DataConfig(data=str(text_file), data_dir=str(tmp_path)), train)
    assert isinstance(subject_of(text), Text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TaskConfig("recall", {"seed": 3}), "data.settings cannot be combined with seed, which seed of training sets"),
        (TaskConfig("recall", {"pairs": "many"}), "data: pairs must be a whole number, got 'many'"),
        (TaskConfig("recal"), "data: unknown task recal; the nearest is recall"),
        (TaskConfig("recall", first_len=128), "first_len must be 0, or 24 to seq_len = 64 for this task, got 128"),
    ],
)
def test_mistakes(data, message):
    with pytest.raises(TrainingError) as error:
        subject_of(RunConfig(ModelConfig(), data, TrainConfig(seq_len=64)))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="test_times must be .*, got"):
        TaskConfig("recall", test_times=())


def test_a_score_leaves_training_mode_as_it_was():
    task = build_task("recall", {"length": 64})
    model = torch.nn.Embedding(task.vocab_size, task.vocab_size)
    assert (
        0
        <= TaskSubject(task, TrainConfig(validate_sequences=4)).measure(model, "cpu", torch.enable_grad)[
            "recall_accuracy"
        ]
        <= 1
    )
    assert model.training
