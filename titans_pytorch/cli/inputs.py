"""Options and texts of the commands on a finished run."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from titans_pytorch.analysis.storing import memories_of
from titans_pytorch.cli.runs import load_run
from titans_pytorch.models.language_model import LanguageModel
from titans_pytorch.training.config import LARGEST_SEED, DataConfig, RunConfig, TaskConfig
from titans_pytorch.training.data import load_data
from titans_pytorch.training.device import resolve_device
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser, number

__all__ = [
    "held_out_text",
    "need_bytes",
    "need_memory",
    "opened",
    "parser_for",
    "read_bytes",
    "seed_number",
    "temperature",
    "whole",
]


def parser_for(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all these commands share."""
    parser = OneLineParser(prog, description)
    parser.add_argument("run", metavar="RUN", help="the folder of a run of titans train")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or another of torch [auto]")
    return parser


whole = number(int, "a whole number of at least 1", lambda n: n >= 1)
seed_number = number(int, f"a whole number from 0 to {LARGEST_SEED}", lambda n: 0 <= n <= LARGEST_SEED)
temperature = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)


def opened(options: argparse.Namespace) -> tuple[torch.device, RunConfig, LanguageModel]:
    """The device, and the run with its model on it, that the options of `parser_for` name."""
    device = resolve_device(options.device)
    return device, *load_run(Path(options.run), device)


def need_memory(run: RunConfig, model: LanguageModel, name: str) -> None:
    if not memories_of(model):
        raise TrainingError(f"{name}: a {run.model.variant} model has no memory")


def need_bytes(run: RunConfig, tokens: int = 256) -> None:
    if run.model.vocab_size < tokens:
        raise TrainingError(f"text needs a model of bytes (256 tokens), the run's knows {run.model.vocab_size}")


def read_bytes(path: str) -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise TrainingError(f"{path} is not a file")
        return Path(path).read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error


def held_out_text(run: RunConfig, file: str | None, length: int) -> Tensor:
    """uint8: the held-out part of the run's text, or a file of one's own (plain, .gz, .bz2, .xz or .zip), all of it."""
    if file is not None:
        data = load_data(DataConfig(data=file))
        found = torch.cat((data.train, data.held_out))
    elif isinstance(run.data, TaskConfig):
        raise TrainingError("text: the run was trained on a task; give a file with --text")
    else:
        found = load_data(run.data).held_out
    if len(found) <= length:
        raise TrainingError(f"length must be less than the text's {len(found)} bytes, got {length}")
    return found
