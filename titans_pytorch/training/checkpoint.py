"""Checkpoints: a folder for each, which appears under its name only when everything in it is written.

`model.safetensors` holds the weights; `training.pt` (readable with weights_only=True) the optimizer, the random number
generators, the step, the position in the data, and what the run was started with; `versions.json` the versions of the
format, torch and this package; `SHA256SUMS` the hashes of these files, as `sha256sum -c` reads them. The latest
checkpoint and the one before it are kept.
"""

import errno
import hashlib
import io
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from titans_pytorch.common.files import read_json, replacing, replacing_folder, write_json, write_text
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.optim import AnyOptimizer
from titans_pytorch.training.versions import versions

__all__ = [
    "Progress",
    "Saved",
    "check_finite",
    "check_sums",
    "last_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_last",
    "read_training",
    "save_checkpoint",
    "save_weights",
    "sha256_of",
    "write_sums",
]

FORMAT = 2  # 1: without hashes and versions
WEIGHTS, TRAINING, VERSIONS, SUMS = "model.safetensors", "training.pt", "versions.json", "SHA256SUMS"
STATE = {
    "step": int,
    "position": int,
    "seconds": float,
    "optimizer": dict,
    "torch_rng": torch.Tensor,
    "cuda_rng": list,
    "python_rng": tuple,
    "about": dict,
}


@dataclass
class Progress:
    """The progress of a run.

    step: optimizer steps.
    position: windows of data used.
    seconds: spent training.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified.

    path: its folder.
    state: the contents of its training.pt.
    damaged: later checkpoints that are damaged.
    """

    path: Path
    state: dict[str, Any]
    damaged: tuple[Path, ...] = ()


def check_finite(model: nn.Module) -> None:
    """Raise Diverged if a parameter of `model` has NaN or infinity, or a saved buffer has NaN."""
    parameters = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not (value.isfinite() if name in parameters else ~value.isnan()).all():
            raise Diverged(f"the model's {name} is not finite")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of `model` to `path` (.safetensors), atomically; parameters that share storage are written
    once. Diverged where they are not finite, OSError where the disk is full.
    """
    with replacing(path) as part:
        write_weights(model, part)


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of `model` to `path` in place; errors as in `save_weights`."""
    check_finite(model)
    try:
        save_model(model, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # its only sign of an operating system's error is in the text
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code) if code == errno.ENOSPC else str(error)) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Read the weights at `path` into `model`. TrainingError if the file is broken or belongs to another model."""
    if not path.is_file():
        raise TrainingError(f"{path} cannot be read, it is not a file")
    try:
        load_model(model, str(path))
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be read, it may be cut off ({error})") from error
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise TrainingError(f"{path} does not fit the model ({first[:200]})") from error


def sha256_of(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of the first `size` bytes of the file at `path` (default: all), in hexadecimal."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write the hashes of the files `names` in `folder` to its SHA256SUMS."""
    write_text(folder / SUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names))


def check_sums(folder: Path, names: Sequence[str]) -> bool:
    """Compare the files `names` in `folder` with its SHA256SUMS. Returns False where it has none; TrainingError where a
    hash differs.
    """
    try:
        lines = (folder / SUMS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return False
    for line, name in zip(lines, names, strict=False):
        if line != f"{sha256_of(folder / name)}  {name}".encode():
            raise TrainingError(f"{folder / name} is damaged: its sha256 is not the one in {folder / SUMS}")
    if len(lines) != len(names) + 1 or lines[-1]:
        raise TrainingError(f"{folder / SUMS} is damaged")
    return True


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: AnyOptimizer, progress: Progress, about: dict[str, Any]
) -> Path:
    """Add a checkpoint to a folder, then remove all others but the one before it. On an error they stay.

    Args:
        folder: folder of checkpoints.
        model: model whose weights are written.
        optimizer: optimizer whose state is written.
        progress: progress of the run; the checkpoint is named by its step.
        about: settings the run was started with.

    Returns:
        The checkpoint's folder.

    Raises:
        Diverged: where the model is not finite.
        OSError: where the disk is full.
    """
    check_finite(model)
    target = folder / f"step_{progress.step:08d}"
    with replacing_folder(target) as part:
        save_weights(model, part / WEIGHTS)
        write(part / TRAINING, serialized(training_state(optimizer, progress, about)))
        write_json(part / VERSIONS, {"format": FORMAT, **versions()})
        write_sums(part, (WEIGHTS, TRAINING, VERSIONS))
        remove(target)  # a checkpoint of an earlier run at this step
    for other in kept_back(checkpoints(folder), target):
        shutil.rmtree(other, ignore_errors=True)
    return target


def kept_back(found: list[Path], target: Path) -> list[Path]:
    """Return the checkpoints to remove: all but `target` and the one before it."""
    at = found.index(target)
    return found[: max(0, at - 1)] + found[at + 1 :]


def remove(path: Path) -> None:
    """Remove a folder with its contents, or a link or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    buffer = io.BytesIO()  # on a full disk torch.save raises errors of its own, our file an OSError
    torch.save(state, buffer)
    return buffer.getbuffer()


def write(path: Path, content: memoryview | bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_last(folder: Path, say: Callable[[str], None] = print) -> Saved | None:
    """Read the newest undamaged checkpoint in `folder`; None if there is no checkpoint.

    Args:
        folder: folder of checkpoints.
        say: called with a line if a damaged checkpoint is skipped, or one has no hashes or was written by other
            versions.

    Raises:
        TrainingError: if all are damaged; it names the fault of the newest.
    """
    damaged: list[tuple[Path, TrainingError]] = []
    for path in reversed(checkpoints(folder)):
        try:
            state = read_training(path, say)
        except TrainingError as error:
            damaged.append((path, error))
            continue
        for _, why in damaged:
            say(f"{why}; taking {path}, the checkpoint before it")
        return Saved(path, state, tuple(path for path, _ in damaged))
    if damaged:
        raise damaged[0][1]
    return None


def read_training(checkpoint: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Read training.pt of a `checkpoint`; `say` as in `read_last`. TrainingError if a file of the checkpoint is
    damaged, has a later format or is no checkpoint of a run.
    """
    path = checkpoint / TRAINING
    try:
        notes = check_whole(checkpoint)
        if not path.is_file():
            raise TrainingError(f"{path} cannot be read: it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that a pickle was not written by torch
            state = torch.load(path, map_location="cpu", weights_only=True)
    except TrainingError:
        raise
    except Exception as error:  # for other bytes torch raises almost any error
        if isinstance(error, OSError) and error.filename:  # torch has an OSError without a file
            raise TrainingError(f"{error.filename} cannot be read: {error.strerror}") from error
        raise TrainingError(f"{path} cannot be read, it is cut off or no checkpoint") from error
    if not isinstance(state, dict):
        raise TrainingError(f"{path} is no checkpoint of a run: it holds a {type(state).__name__}")
    for name, kind in STATE.items():
        if type(state.get(name)) is not kind:
            raise TrainingError(f"{path} is no checkpoint of a run: {name} is missing or of another type")
    for note in notes:
        say(note)
    return state


def check_whole(checkpoint: Path) -> list[str]:
    """Check hashes and versions; return notes for the user. TrainingError if it is damaged or has a later format."""
    if not check_sums(checkpoint, (WEIGHTS, TRAINING, VERSIONS)):
        return [f"{checkpoint} has no {SUMS}, it was written by an earlier version: taken without a check"]
    written = read_json(checkpoint / VERSIONS)
    if written.get("format") != FORMAT:
        raise TrainingError(f"{checkpoint} has format {written.get('format')!r}, this version reads format {FORMAT}")
    here = versions()
    others = [f"{name} {written.get(name)} (here {here[name]})" for name in here if written.get(name) != here[name]]
    return [f"{checkpoint} was written with {', '.join(others)}: losses may differ slightly"] if others else []


def load_checkpoint(checkpoint: Path | Saved, model: nn.Module, optimizer: AnyOptimizer) -> Progress:
    """Restore model, optimizer and random number generators from a checkpoint.

    Args:
        checkpoint: its folder, or the result of `read_last`.
        model: module that gets the weights.
        optimizer: optimizer that gets its state.

    Returns:
        The progress of the run.

    Raises:
        TrainingError: if a file is damaged, or belongs to another model or optimizer.
    """
    saved = checkpoint if isinstance(checkpoint, Saved) else Saved(checkpoint, read_training(checkpoint))
    state, path = saved.state, saved.path / TRAINING
    load_weights(model, saved.path / WEIGHTS)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TrainingError(f"{path} does not fit the optimizer ({error})") from error
    try:
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        random.setstate(state["python_rng"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(f"{path} has no state of random number generators ({error})") from error
    return Progress(state["step"], state["position"], state["seconds"])
