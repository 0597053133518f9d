"""`--config FILE --key value`: a configuration from a file, a preset or a run, with settings replaced by name."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from titans_pytorch.common.names import unknown
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.presets import PRESETS
from titans_pytorch.tasks import TASK_NAMES
from titans_pytorch.training.config import RunConfig, TaskConfig, settings_of
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import Listed, listed_settings

__all__ = ["NAMED", "config_from", "listed", "replaced", "start_of", "start_options"]

TASK_KEYS = ("length", "seed")  # of every task; the training section has them


def config_from(config: str | None, preset: str | None, task: str | None = None) -> RunConfig:
    """The configuration of a file or a preset (default: tiny), with its data replaced by a task if one is given."""
    if config is not None and preset is not None:
        raise TrainingError("preset: give --config or --preset, not both")
    try:
        base = TitansConfig.preset(preset or "tiny") if config is None else TitansConfig.load(config)
        run = base if config is None else dataclasses.replace(base, name=base.name or Path(config).stem)
        if task is not None and not (isinstance(run.data, TaskConfig) and run.data.task == task):
            if task not in TASK_NAMES:
                raise ValueError(f"{unknown('task ', task, TASK_NAMES)}; known: {', '.join(TASK_NAMES)}")
            run = dataclasses.replace(run, data=TaskConfig(task=task))
        return run
    except FileNotFoundError as error:
        raise TrainingError(f"config: {config} does not exist") from error
    except ValueError as error:
        raise TrainingError(str(error)) from error


def task_settings(run: RunConfig) -> dict[str, tuple[dataclasses.Field, Any]]:
    """name -> (field, type) of the settings of a run's task, none for text."""
    if not isinstance(run.data, TaskConfig) or run.data.task not in TASK_NAMES:
        return {}
    from titans_pytorch.tasks.registry import TASKS

    kind = TASKS[run.data.task]
    hints = typing.get_type_hints(kind)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(kind) if f.name not in TASK_KEYS}


def listed(run: RunConfig) -> Listed:
    """Name -> (section, field, type, value) of every setting that is an option, those of the task among them."""
    found = {name: row for name, row in listed_settings(run).items() if name not in ("task", "settings")}
    if isinstance(run.data, TaskConfig):
        given = run.data.settings
        for name, (field, hint) in task_settings(run).items():
            found.setdefault(name, ("data", field, hint, given.get(name, field.default)))
    return found


def replaced(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Replace settings of a run, and of its task, by name. ValueError for unknown names and wrong values."""
    known, of_task = settings_of(run), task_settings(run)
    task_part = {name: value for name, value in values.items() if name in of_task and name not in known}
    others = {name: value for name, value in values.items() if name not in task_part}
    for name in others:
        if name not in known:
            raise unknown("setting ", name, [*known, *of_task])
    run = run.replace(**others)
    if task_part and isinstance(run.data, TaskConfig):
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, settings={**run.data.settings, **task_part}))
    return run


def start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings to start from, .yaml or .json")
    parser.add_argument("--preset", metavar="NAME", help=f"or one of {', '.join(PRESETS)}")
    parser.add_argument("--task", metavar="NAME", help=f"train on a task: {', '.join(TASK_NAMES)}")


def start_of(given: argparse.Namespace) -> RunConfig:
    return config_from(given.config, given.preset, given.task)


NAMED: dict[str, Any] = {
    "listed": listed,
    "replace": replaced,
    "usage": "%(prog)s [--config FILE] [--SETTING VALUE ...]",
}
