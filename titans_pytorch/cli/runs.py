"""Folders that `titans train` leaves: the configuration and the weights, read back."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.training.checkpoint import last_checkpoint, load_weights
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.errors import TrainingError

__all__ = ["load_run", "model_of", "run_config", "run_from_dict"]


def run_from_dict(saved: dict) -> RunConfig:
    """What `RunConfig.to_dict` saved."""
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not sections of settings")
    names = {"train": "training"}
    sections = {names.get(name, name): section for name, section in saved.items() if name != "preset"}
    return replace(TitansConfig.from_dict(sections).to_run(), preset=saved.get("preset", ""))


def run_config(folder: Path) -> RunConfig:
    """The configuration of the run in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainingError(f"{folder} holds no run: there is no {path}")
    try:
        return run_from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is not a configuration of titans train: {error}") from error


def model_of(config, device: torch.device) -> nn.Module:
    """The model of a configuration's model section, on a device."""
    try:
        return build_model(config, device)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"the model cannot be built: {error}") from error


def load_run(folder: Path, device: torch.device) -> tuple[RunConfig, nn.Module]:
    """The run in a folder and its model as it was last saved, ready to be used."""
    run = run_config(folder)
    model = model_of(run.model, device)
    path = folder / "model.safetensors"
    if not path.is_file():
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise TrainingError(f"{folder} holds no weights: there is neither {path} nor a checkpoint")
        path = checkpoint / "model.safetensors"
    load_weights(model, path)
    return run, model.eval()
