"""Folders that `titans train` leaves: the configuration and the weights, read back."""

from pathlib import Path

import torch

from titans_pytorch.common.files import read_json
from titans_pytorch.models.config import ModelConfig, TitansConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.models.language_model import LanguageModel
from titans_pytorch.training.checkpoint import WEIGHTS, check_sums, last_checkpoint, load_weights, read_last
from titans_pytorch.training.errors import TrainingError

__all__ = ["load_run", "model_of", "run_config"]


def run_config(folder: Path) -> TitansConfig:
    """The configuration of the run in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainingError(f"{folder} holds no run: there is no {path}")
    try:
        return TitansConfig.from_dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is not a configuration of titans train: {error}") from error


def model_of(config: ModelConfig, device: torch.device) -> LanguageModel:
    """The model of a configuration's model section, on a device."""
    try:
        return build_model(config, device)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"the model cannot be built: {error}") from error


def load_run(folder: Path, device: torch.device) -> tuple[TitansConfig, LanguageModel]:
    """The run in a folder and its model as it was last saved, ready to be used."""
    run = run_config(folder)
    model = model_of(run.model, device)
    load_weights(model, weights_of(folder))
    return run, model.eval()


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
