"""titans train: train one of the family's models on text or a task.

titans train --config configs/mac.yaml                      # settings from a file
titans train --config configs/mac.yaml --lr 1e-3 --steps 50 # any setting by name (also as --training.lr 1e-3)
titans train --preset tiny --task recall --pairs 4          # a task in place of text
titans train --config configs/mac.yaml --check               # check all settings, print them and stop
titans train --out runs/mac --resume                        # go on after Ctrl-C or a crash
torchrun --nproc-per-node 2 -m titans_pytorch.cli train ... # several processes, one model
"""

import shlex
from contextlib import ExitStack
from pathlib import Path

import torch

from titans_pytorch.cli.runs import model_of, run_from_dict
from titans_pytorch.cli.settings import read_arguments
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.tasks.subject import TaskSubject, checked_task, subject_of
from titans_pytorch.training.checkpoint import Saved
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.folder import claimed
from titans_pytorch.training.run import Run, report_changes, saved_run, train_claimed
from titans_pytorch.training.start import check_start

__all__ = ["train_command"]


def add_options(parser) -> None:
    parser.add_argument("--out", metavar="DIR", help="where the run is kept (runs/ and the configuration's name)")
    default = {} if parser.argument_default else {"default": False}
    parser.add_argument("--check", action="store_true", help="check the settings, print them, and stop", **default)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


def resumed(options, claim: ExitStack) -> Saved:
    """The checkpoint to go on from; its folder is claimed until `claim` ends."""
    if options.out is None:
        raise TrainingError("resume: give the run's folder with --out")
    if options.config or options.preset or options.task:
        raise TrainingError("resume: the run has its own configuration; leave out --config, --preset and --task")
    claim.enter_context(claimed(Path(options.out)))
    return saved_run(Path(options.out))


def config_of(saved: Saved) -> RunConfig:
    try:
        return run_from_dict(saved.state["about"]["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(f"{saved.path} is of another configuration: {error}") from error


def check(run: RunConfig, out: Path) -> None:
    """Everything that `train` checks before it reads data; prints the settings."""
    check_start(run, out)
    task = checked_task(run)
    if task is not None and isinstance(run.data, TaskConfig):
        TaskSubject(task, run.train, run.data)  # it checks first_len
    model = model_of(run.model, torch.device("meta"))
    print(TitansConfig(run.model, run.data, run.train, run.report).to_yaml())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; nothing was trained")


def train_command(argv: list[str]) -> None:
    command, saved = shlex.join(["titans", "train", *argv]), None
    with ExitStack() as claim:

        def base(options) -> RunConfig:
            nonlocal saved
            saved = resumed(options, claim)
            return config_of(saved)

        given = read_arguments("titans train", __doc__, argv, add_options, base if "--resume" in argv else None)
        run = given.run
        out = Path(given.options.out or f"runs/{run.preset or 'titans'}")
        if saved is None and not given.options.check:
            claim.enter_context(claimed(out))
        elif saved is not None:
            report_changes(saved.path, config_of(saved), run)
        if given.options.check:
            check(run, out)
            return
        train_claimed(Run(run, out, saved, command), model_of, subject_of)
