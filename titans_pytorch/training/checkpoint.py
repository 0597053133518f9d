"""Checkpoints: a folder for each, which appears under its name only when everything in it is written.

`model.safetensors` holds the weights; `training.pt` (readable with weights_only=True) the optimizer, the random number
generators, the step, the position in the data, and what the run was started with.
"""

import errno
import io
import os
import pickle
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.optim import AnyOptimizer

__all__ = [
    "Progress",
    "last_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_training",
    "save_checkpoint",
    "save_weights",
]

WEIGHTS, TRAINING = "model.safetensors", "training.pt"


@dataclass
class Progress:
    """How far a run has come.

    step: optimizer steps.
    position: windows of data used.
    seconds: spent training.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights of `model` to `path` (.safetensors), beside and renamed; parameters that share storage are
    written once. OSError where the disk is full.
    """
    beside = path.with_name(f"{path.name}.part")
    try:
        save_model(model, str(beside), metadata={"format": "pt"})
        beside.chmod(0o644)  # safetensors leaves it readable for its owner alone
        sync(beside)
        os.replace(beside, path)
    except SafetensorError as error:  # its only sign of an operating system's error is in the text
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.ENOSPC) if full else str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads the weights at `path` into `model`. TrainingError where the file is broken or of another model."""
    try:
        load_model(model, str(path))
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be read, it may be cut off ({error})") from error
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise TrainingError(f"{path} does not fit the model ({first[:200]})") from error


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: AnyOptimizer, progress: Progress, about: dict[str, Any]
) -> Path:
    """Adds a checkpoint to a folder, then removes earlier ones; on an OSError these stay.

    Args:
        folder: of checkpoints.
        model: whose weights are written.
        optimizer: whose state is written.
        progress: how far the run has come; the checkpoint is named by its step.
        about: what the run was started with.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"step_{progress.step:08d}"
    if target.exists():  # the run was stopped right after it
        return target
    beside = folder / f"{target.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_weights(model, beside / WEIGHTS)
        write(beside / TRAINING, serialized(training_state(optimizer, progress, about)))
        os.replace(beside, target)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for earlier in checkpoints(folder):
        if earlier != target:
            shutil.rmtree(earlier, ignore_errors=True)
    return target


def training_state(optimizer: AnyOptimizer, progress: Progress, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": progress.step,
        "position": progress.position,
        "seconds": progress.seconds,
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python_rng": random.getstate(),
        "about": about,
    }


def serialized(state: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()  # torch.save on a full disk raises errors of its own, a file of ours an OSError
    torch.save(state, buffer)
    return buffer.getbuffer()


def write(path: Path, content: memoryview | bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
    sync(path)


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """Complete ones, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_training(checkpoint: Path) -> dict[str, Any]:
    """What training.pt of a `checkpoint` holds. TrainingError where it cannot be read."""
    path = checkpoint / TRAINING
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        # torch has an OSError without a file for what is cut off
        of_system = isinstance(error, OSError) and error.filename
        why = f": {error.strerror}" if of_system else ", it is cut off or no checkpoint"
        raise TrainingError(f"{path} cannot be read{why}") from error


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: AnyOptimizer) -> Progress:
    """Puts everything back as it was when the checkpoint was written.

    Args:
        checkpoint: its folder.
        model: takes the weights.
        optimizer: takes its state.

    Returns:
        How far the run had come.

    Raises:
        TrainingError: where a file is broken, or of another model or optimizer.
    """
    state = read_training(checkpoint)
    load_weights(model, checkpoint / WEIGHTS)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise TrainingError(f"{checkpoint / TRAINING} does not fit the optimizer ({error})") from error
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    random.setstate(state["python_rng"])
    return Progress(state["step"], state["position"], state["seconds"])
