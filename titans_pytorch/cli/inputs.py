"""The run, the device and the texts that the commands on a finished run are given."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.analysis.storing import memories_of
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.runs import load_run
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.data import load_data, load_text
from titans_pytorch.training.device import resolve_device
from titans_pytorch.training.errors import TrainingError

__all__ = [
    "held_out_text",
    "need_bytes",
    "need_memory",
    "opened",
    "read_bytes",
]


def opened(options: argparse.Namespace) -> tuple[torch.device, RunConfig, Any]:
    """The device, and the run with its model on it, that the options of `commands.parser_for` name. Sets threads."""
    device = resolve_device(options.device)
    run, model = load_run(options.run, device)
    choose_threads(options.threads, run.model.width)
    return device, run, model


def need_memory(run: RunConfig, model: nn.Module, name: str) -> None:
    if not memories_of(model):
        kind = f"a {run.model.variant} model" if isinstance(run, TitansConfig) else "a model trained with --no-memory"
        raise TrainingError(f"{name}: {kind} has no memory")


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


def held_out_text(run: RunConfig, file: str | None, length: int, limit: int = 0) -> Tensor:
    """uint8: the held-out part of the run's text, or a file of one's own (plain, .gz, .bz2, .xz or .zip), all of it.

    Args:
        run: the run.
        file: given with --text; None: the run's own text.
        length: bytes of a row, given with --length or those of training. TrainingError for a text that is not longer.
        limit: given with --limit: only the first bytes, this many; 0: all.
    """
    if file is not None:
        found = load_text(file, limit)
    elif isinstance(run.data, TaskConfig):
        raise TrainingError("text: the run was trained on a task; give a file with --text")
    else:
        try:
            found = load_data(run.data).held_out
        except TrainingError as error:
            raise TrainingError(f"the run's own text: {error}; give a file with --text") from error
    found = found[:limit] if limit else found
    if len(found) <= length:
        what = f"the first {limit} bytes of it (--limit)" if len(found) == limit else f"{len(found)} bytes"
        raise TrainingError(f"text must have more than length = {length} bytes, got {what}; give a smaller --length")
    return found
