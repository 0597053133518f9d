"""Checks before data is read: settings that conflict, devices, processes, folders, sizes beyond the memory here."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from titans_pytorch.common.checks import wrong
from titans_pytorch.training.config import DataConfig, RunConfig
from titans_pytorch.training.device import resolve_device
from titans_pytorch.training.errors import TrainingError

__all__ = ["check_start", "least_bytes", "processes_of"]

LAUNCHED = {"RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1, "LOCAL_WORLD_SIZE": 1}  # name -> its smallest value
LARGEST_PORT = 65535


def check_start(config: RunConfig, out: Path) -> torch.device:
    """Raise TrainingError for a run that cannot succeed; return its device. out: its output folder."""
    try:
        processes = processes_of(os.environ)
        device = resolve_device(config.training.device)
        check_settings(config, processes)
        check_precision(config, device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    check_folder(out)
    check_memory(config, device, processes)
    return device


def processes_of(environment: Mapping[str, str]) -> int:
    """Return the number of processes a launcher started. ValueError for a variable that is no number or out of
    range.
    """
    count = whole(environment, "WORLD_SIZE", 1) or 1
    for name, least in LAUNCHED.items():
        value = whole(environment, name, least)
        if value is not None and count > 1 and name in ("RANK", "LOCAL_RANK") and value >= count:
            raise wrong(name, value, f"below WORLD_SIZE = {count}")
        if value is not None and name == "MASTER_PORT" and value > LARGEST_PORT:
            raise wrong(name, value, f"at most {LARGEST_PORT}")
    if count > 1 and "RANK" not in environment:
        raise ValueError("WORLD_SIZE above 1 needs RANK: start the processes with torchrun or accelerate launch")
    return count


def whole(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise wrong(name, text, f"a whole number of at least {least}")
    return int(text)


def check_settings(config: RunConfig, processes: int) -> None:
    """Raise ValueError for settings of different sections that cannot be combined."""
    train, report = config.training, config.report
    if isinstance(config.data, DataConfig) and report.eval_stride > train.seq_len:
        raise wrong("eval_stride", report.eval_stride, f"at most seq_len = {train.seq_len}")
    if train.batch_size % processes:
        raise wrong("batch_size", train.batch_size, f"a multiple of the {processes} processes")


def check_precision(config: RunConfig, device: torch.device) -> None:
    if config.training.precision != "bfloat16":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"precision = bfloat16 needs a GPU that computes in it, {torch.cuda.get_device_name(device)} does not"
        )
    if not torch.amp.is_autocast_available(device.type):
        raise ValueError(f"precision = bfloat16 cannot be combined with device = {device}, which has no autocast")


def check_folder(out: Path) -> None:
    """Check that `out`, or the folder it would be made in, can be written to. TrainingError where it cannot."""
    there = next((path for path in (out, *out.absolute().parents) if os.path.lexists(path)), Path("/"))
    if not there.is_dir():
        raise TrainingError(
            str(wrong("out", str(out), "a folder" if there == out else f"in a folder; {there} is a file"))
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainingError(str(wrong("out", str(out), f"in a folder that can be written to; {there} cannot")))


def check_memory(config: RunConfig, device: torch.device, processes: int) -> None:
    """Raise TrainingError for a run whose lower bound of memory exceeds the memory of the device."""
    there = memory_of(device)
    for what, needed in least_bytes(config, processes).items():
        if there and needed > there:
            raise TrainingError(f"{what} need at least {size(needed)}, {device} has {size(there)} of memory")


def least_bytes(config: RunConfig, processes: int = 1) -> dict[str, float]:
    """Return lower bounds of memory: what needs it -> bytes."""
    model, train = config.model, config.training
    if not hasattr(model, "least_parameters"):
        return {}
    rows, width, tokens = train.batch_size // processes, model.width, getattr(model, "vocab_size", 256)
    found = {
        # a weight, its gradient and AdamW's two means, four bytes each
        "the parameters (widths, layers, vocab_size) and their optimizer": 16.0 * finite(model.least_parameters()),
        "the activations of a batch (batch_size, seq_len)": 4.0 * rows * train.seq_len * (width + tokens),
    }
    if isinstance(config.data, DataConfig):
        evaluated = 4.0 * config.report.eval_batch_size * tokens
        found["the windows of an evaluation (eval_batch_size, seq_len)"] = evaluated * min(train.seq_len, 10**6)
    else:
        longest = max(config.data.test_times) * train.seq_len
        rows = min(config.data.test_rows, config.data.test_batch_size)
        found["the rows of the final scores (test_times, test_batch_size, seq_len)"] = 4.0 * rows * longest * tokens
    return found


def finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def memory_of(device: torch.device) -> float:
    """Return the bytes of memory of a device; 0 if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(machine_memory() or 0) if device.type == "cpu" else 0.0


def machine_memory() -> int | None:
    """Return the bytes of memory of this machine; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
