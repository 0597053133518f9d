"""An unknown name is refused, with the name that was meant."""

import pytest
from torch import nn

from titans_pytorch import (
    MemoryAsContextTransformer,
    MemoryMLP,
    NeuralMemory,
    SegmentedAttention,
    SymplecticGating,
    TitansConfig,
    titans_memory,
)
from titans_pytorch.common.names import known_keywords, nearest
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.training.config import TaskConfig, TrainConfig
from titans_pytorch.training.mac import MacConfig

SMALL = {"num_tokens": 8, "dim": 8, "depth": 1, "segment_len": 4}

CALLS = {
    "memory": (lambda: NeuralMemory(8, chunksize=4), "chunksize of NeuralMemory; the nearest is chunk_size"),
    "paper": (lambda: NeuralMemory.paper(8, chunksize=4), "chunksize of NeuralMemory.paper; the nearest is chunk_size"),
    "of paper alone": (lambda: NeuralMemory.paper(8, segmnt=4), "segmnt of NeuralMemory.paper; the nearest is segment"),
    "its step": (
        lambda: NeuralMemory.paper(8, 4, maxstep=0.1),
        "maxstep of NeuralMemory.paper; the nearest is max_step",
    ),
    "exact": (lambda: NeuralMemory.exact(8, maxstep=0.1), "maxstep of NeuralMemory.exact; the nearest is max_step"),
    "of the family": (lambda: titans_memory(8, chunksize=4), "chunksize of NeuralMemory; the nearest is chunk_size"),
    "by meaning": (lambda: NeuralMemory(8, num_heads=2), "num_heads of NeuralMemory; the nearest is heads"),
    "network": (lambda: MemoryMLP(8, num_layers=2), "num_layers of MemoryMLP; the nearest is depth"),
    "attention": (lambda: SegmentedAttention(8, window=2), "window of SegmentedAttention; the nearest is segment_len"),
    "gate": (lambda: SymplecticGating(8, quorummix=0.5), "quorummix of SymplecticGating; the nearest is quorum_mix"),
    "transformer": (
        lambda: MemoryAsContextTransformer(**SMALL, chunksize=4),
        "chunksize of MemoryAsContextTransformer; the nearest is neural_memory_segment_len",
    ),
    "memory of a transformer": (
        lambda: MemoryAsContextTransformer(**SMALL, neural_memory_kwargs={"headz": 4}),
        "headz of NeuralMemory; the nearest is heads",
    ),
    "section": (lambda: ModelConfig(chunksize=4), "chunksize of ModelConfig; the nearest is chunk_size"),
    "training": (lambda: TrainConfig(learning_rate=1.0), "learning_rate of TrainConfig; the nearest is lr"),
    "task": (lambda: TaskConfig(rows=4), "rows of TaskConfig; the nearest is test_rows"),
    "script": (lambda: MacConfig(n_layers=4), "n_layers of MacConfig; the nearest is depth"),
    "settings": (lambda: TitansConfig.of(chunksize=4), "chunksize; the nearest is chunk_size"),
    "replaced": (lambda: TitansConfig().replace(max_steps=4), "max_steps; the nearest is steps"),
    "preset": (lambda: TitansConfig.tiny(hidden_size=4), "hidden_size; the nearest is d_model"),
    "a preset's name": (lambda: TitansConfig.preset("tinny"), "preset tinny; the nearest is tiny"),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_the_nearest_name(call, message):
    with pytest.raises(ValueError, match=f"^unknown (argument |setting )?{message}"):
        call()


def test_it_is_a_type_error_as_pythons_own():
    with pytest.raises(TypeError, match="unknown argument colour of NeuralMemory$"):
        NeuralMemory(8, colour=1)


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("--learning-rate", ["--lr", "--layers"], "--lr"),
        ("--batchsize", ["--batch-size", "--steps"], "--batch-size"),
        ("--Batch_Size", ["--batch-size", "--steps"], "--batch-size"),
        ("training.learning_rate", ["training.lr", "training.steps"], "training.lr"),
        ("--max-new-tokens", ["--new-bytes", "--temperature"], "--new-bytes"),
        ("n_embd", ["d_model", "n_heads"], "d_model"),  # by meaning before letters
        ("stepz", ["steps"], "steps"),
    ],
)
def test_by_meaning_and_by_letters(name, known, found):
    assert nearest(name, known) == f"; the nearest is {found}"


def test_none_is_near():
    assert nearest("colour", ["steps", "lr"]) == ""


def test_subclasses_take_keywords_of_their_own():
    @known_keywords
    class Base(nn.Module):
        def __init__(self, size=1):
            super().__init__()
            self.size = size

    class More(Base):
        def __init__(self, colour="red", **rest):
            super().__init__(**rest)

    assert More(colour="blue", size=3).size == 3
    with pytest.raises(ValueError, match="unknown argument sise of Base; the nearest is size"):
        More(sise=3)


def test_a_function_that_takes_all_keywords_cannot_know_them():
    with pytest.raises(TypeError, match="takes every keyword"):
        known_keywords(lambda **more: None)
