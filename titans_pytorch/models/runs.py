"""Folders that `titans train` and train_mac.py leave: the configuration and the weights, read back."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_pytorch.common.checks import of_kind
from titans_pytorch.common.files import read_json
from titans_pytorch.models.config import ModelConfig, TitansConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.training.checkpoint import WEIGHTS, check_sums, last_checkpoint, load_weights, read_last
from titans_pytorch.training.config import RunConfig, from_dict
from titans_pytorch.training.device import resolve_device
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.mac import MacConfig, build_mac

__all__ = ["config_of", "load_run", "model_of", "run_config"]


def load_run(folder: str | os.PathLike, device: torch.device | str = "cpu") -> tuple[RunConfig, Any]:
    """Load what `titans train`, train_mac.py or `make train` left in a folder.

    Args:
        folder: the run's, such as "runs/small".
        device: where to put the model; "auto" is CUDA if there is one, else the CPU.

    Returns:
        (config, model): every setting of the run, a TitansConfig or, of train_mac.py, a RunConfig with a MacConfig; and
        the model as it was last saved, a LanguageModel or a MemoryAsContextTransformer, in eval mode.

    Raises:
        TrainingError: in one line, where the folder holds no run, a file of it is damaged or of another model, or the
            device is not there.
        ValueError: for arguments of another type.
    """
    folder = Path(of_kind(folder, (str, os.PathLike), "folder", "the path of a run's folder"))
    device = resolve_device(str(of_kind(device, (str, torch.device), "device", "a torch.device or its name")))
    run = run_config(folder)
    model = model_of(run.model, device)
    load_weights(model, weights_of(folder))
    return run, model.eval()


def config_of(saved: Any) -> RunConfig:
    """The configuration that `RunConfig.to_dict` saved: of `titans train` or of train_mac.py. ValueError for another
    one.
    """
    section = saved.get("model") if isinstance(saved, dict) else None
    if isinstance(section, dict) and "neural_memory_layers" in section:
        return from_dict(RunConfig(MacConfig()), saved)
    return TitansConfig.from_dict(saved)


def run_config(folder: Path) -> RunConfig:
    """The configuration of the run in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainingError(f"{folder} holds no run: there is no {path}")
    try:
        return config_of(read_json(path))
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is not a configuration of titans train or train_mac.py: {error}") from error


def model_of(config: ModelConfig | MacConfig, device: torch.device) -> nn.Module:
    """The model of a configuration's model section, on a device."""
    if isinstance(config, MacConfig):
        return build_mac(config, device)
    try:
        return build_model(config, device)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"the model cannot be built: {error}") from error


def weights_of(folder: Path) -> Path:
    """The weights that a run saved last: at its end, or in a checkpoint after that, when it was resumed and stopped."""
    path = folder / WEIGHTS
    if path.is_file() and not stopped_later(folder):
        check_sums(folder, (WEIGHTS,))
        return path
    saved = read_last(folder / "checkpoints")
    if saved is None:
        raise TrainingError(f"{folder} holds no weights: there is neither {path} nor a checkpoint")
    return saved.path / WEIGHTS


def stopped_later(folder: Path) -> bool:
    """True if a checkpoint is of a later step than the one at which the run ended."""
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return False
    try:
        steps = read_json(folder / "result.json")["steps"]
        return steps < int(checkpoint.name.removeprefix("step_"))
    except (OSError, ValueError, TypeError, KeyError):
        return True
