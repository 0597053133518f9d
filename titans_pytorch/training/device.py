"""Device and precision of a run."""

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.errors import TrainingError

__all__ = ["autocast_for", "describe_device", "resolve_device"]


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise TrainingError(f"device must be one that torch can use here, got {name!r} ({first[:120]})") from error
    if device.type == "meta":
        raise TrainingError(f"device must be one that computes, got {name!r}, which holds no numbers")
    return device


def autocast_for(device: torch.device, config: TrainConfig) -> Callable[[], AbstractContextManager]:
    """Return the autocast context of a run: bfloat16 by default on CUDA, on a CPU only with precision = bfloat16."""
    on_cuda = device.type == "cuda"
    wanted = config.precision == "bfloat16" or (
        config.precision == "auto" and on_cuda and torch.cuda.is_bf16_supported()
    )
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=wanted)


def describe_device(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
