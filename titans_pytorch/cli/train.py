"""titans train: train one of the family's models on text or a task.

titans train --config configs/mac.yaml                      # settings from a file
titans train --config configs/mac.yaml --lr 1e-3 --steps 50 # any setting by name (also as --training.lr 1e-3)
titans train --preset tiny --task recall --pairs 4          # a task in place of text
titans train --out runs/mac --resume                        # go on after Ctrl-C or a crash
torchrun --nproc-per-node 2 -m titans_pytorch.cli train ... # several processes, one model
"""

import shlex
from dataclasses import replace
from pathlib import Path

from titans_pytorch.cli.runs import model_of, run_from_dict
from titans_pytorch.cli.settings import read_arguments
from titans_pytorch.tasks.subject import subject_of
from titans_pytorch.training.checkpoint import last_checkpoint, read_training
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.run import Run, report_changes, train

__all__ = ["train_command"]


def add_options(parser) -> None:
    parser.add_argument("--out", metavar="DIR", help="where the run is kept (runs/ and the configuration's name)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


def base(options) -> RunConfig | None:
    """The configuration that is resumed; None for a new run."""
    folder = Path(options.out or "")
    if options.out is None:
        raise TrainingError("resume: give the run's folder with --out")
    if options.config or options.preset or options.task:
        raise TrainingError("resume: the run has its own configuration; leave out --config, --preset and --task")
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise TrainingError(f"{folder} has no checkpoint to resume from")
    try:
        return run_from_dict(read_training(checkpoint)["about"]["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{checkpoint} is of another configuration: {error}") from error


def train_command(argv: list[str]) -> None:
    resume = "--resume" in argv
    given = read_arguments("titans train", __doc__, argv, add_options, base if resume else None)
    run = given.run
    out = Path(given.options.out or f"runs/{run.preset or 'titans'}")
    if resume:
        checkpoint = last_checkpoint(out / "checkpoints")
        report_changes(checkpoint, run_from_dict(read_training(checkpoint)["about"]["config"]), run)
    command = shlex.join(["titans", "train", *argv])
    train(Run(replace(run, preset=run.preset), out, resume, command), model_of, subject_of)
