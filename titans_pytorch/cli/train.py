"""titans train: train one of the family's models on text or a task."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

from titans_pytorch.cli.commands import TRAIN, train_options
from titans_pytorch.cli.settings import NAMED, start_of
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.runs import config_of, model_of
from titans_pytorch.tasks.subject import TaskSubject, checked_task, subject_of
from titans_pytorch.training.again import started_as
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.run import TrainProgram
from titans_pytorch.training.start import check_start

__all__ = ["train_command"]


def resume_from(options: Namespace) -> Path:
    if options.out is None:
        raise TrainingError("resume: give the run's folder with --out")
    if options.config or options.preset or options.task:
        raise TrainingError("resume: the run has its own configuration; leave out --config, --preset and --task")
    return Path(options.out)


def check(run: RunConfig, out: Path) -> None:
    """Everything that `train` checks before it reads data; prints the settings."""
    check_start(run, out)
    task = checked_task(run)
    if task is not None and isinstance(run.data, TaskConfig):
        TaskSubject(task, run.training, run.data)  # it checks first_len
    model = model_of(run.model, torch.device("meta"))
    print(TitansConfig(**vars(run)).to_yaml())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; nothing was trained")


def train_command(argv: list[str]) -> None:
    program = TrainProgram(
        prog="titans train",
        description=TRAIN,
        add_options=train_options,
        start=start_of,
        resume_from=resume_from,
        saved_config=lambda options, saved: config_of(saved.state["about"]["config"]),
        build_model=model_of,
        make_subject=subject_of,
        named=NAMED,
        check=check,
        started_as=lambda: started_as() if Path(sys.argv[0]).stem == "titans-train" else f"{started_as()} train",
    )
    program.run(argv, shlex.join(["titans", "train", *argv]))
