"""`--config FILE --key value`: a configuration from a file, a preset or a run, with settings replaced by name."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.presets import PRESETS
from titans_pytorch.tasks.registry import TASKS, build_task
from titans_pytorch.training.config import RunConfig, TaskConfig, groups_of, nearest, settings_of, updated
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser, hyphenated, option_for

__all__ = ["Given", "config_from", "read_arguments", "replaced", "settings_types"]

SECTIONS = {"model": "model", "data": "data", "training": "train", "train": "train", "report": "report"}
TASK_KEYS = ("length", "seed")  # of every task; the training section has them


def config_from(config: str | None, preset: str | None, task: str | None = None) -> RunConfig:
    """From a file or a preset (default: tiny), with a task in place of its data where one is given."""
    if config is not None and preset is not None:
        raise TrainingError("preset: give --config or --preset, not both")
    try:
        base = TitansConfig.preset(preset or "tiny") if config is None else TitansConfig.load(config)
        run = base.to_run(preset or (Path(config).stem if config else "tiny"))
        if task is not None and not (isinstance(run.data, TaskConfig) and run.data.task == task):
            build_task(task) if task not in TASKS else None  # an unknown name names the nearest
            run = dataclasses.replace(run, data=TaskConfig(task=task))
        return run
    except FileNotFoundError as error:
        raise TrainingError(f"config: {config} does not exist") from error
    except ValueError as error:
        raise TrainingError(str(error)) from error


def task_settings(run: RunConfig) -> dict[str, tuple[dataclasses.Field, Any]]:
    """name -> (field, type) of the settings of a run's task, none for text."""
    if not isinstance(run.data, TaskConfig) or run.data.task not in TASKS:
        return {}
    kind = TASKS[run.data.task]
    hints = typing.get_type_hints(kind)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(kind) if f.name not in TASK_KEYS}


def settings_types(run: RunConfig) -> dict[str, Any]:
    """name -> type of every setting that can be replaced."""
    found = {name: hint for name, (_, _, hint) in settings_of(run).items() if name not in ("task", "settings")}
    return {name: hint for name, (_, hint) in task_settings(run).items()} | found


def replaced(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """With settings, and those of a task, replaced by name. Raises ValueError for unknown names and wrong values."""
    known, of_task = settings_of(run), task_settings(run)
    task_part = {name: value for name, value in values.items() if name in of_task and name not in known}
    others = {name: value for name, value in values.items() if name not in task_part}
    for name in others:
        if name not in known:
            raise ValueError(f"unknown setting {name}{nearest(name, [*known, *of_task])}")
    run = updated(run, others)
    if task_part and isinstance(run.data, TaskConfig):
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, settings={**run.data.settings, **task_part}))
    return run


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line said: a configuration, the settings that it replaced, and the command's own options."""

    run: RunConfig
    values: dict[str, Any]
    options: argparse.Namespace


def read_arguments(prog: str, description: str, argv: list[str], add_options, base=None) -> Given:
    """add_options(parser) adds the command's own options; base(options): the configuration to start from, by default
    that of --config or --preset. Exits with 2 after a line on a mistake."""
    first = OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    start_options(first)
    add_options(first)
    argv = [undotted(word) for word in argv]
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    run = config_from(known.config, known.preset, known.task) if base is None else base(known)

    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--SETTING VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    start_options(parser)
    add_options(parser)
    names = add_settings(parser, run)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            parser.error(f"got {name!r}, which is no setting's name and follows none that takes a value")
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown setting {name}{nearest(name, options)}")
    found = vars(given)
    values = {name: found.pop(name) for name in names if name in found}
    try:
        run = replaced(run, values)
    except ValueError as error:
        parser.error(str(error))
    return Given(run, values, argparse.Namespace(**{**vars(known), **found}))


def start_options(parser: argparse.ArgumentParser) -> None:
    default: dict[str, Any] = {"default": None} if parser.argument_default is None else {}
    parser.add_argument("--config", metavar="FILE", help="settings to start from, .yaml or .json", **default)
    parser.add_argument("--preset", metavar="NAME", help=f"or one of {', '.join(PRESETS)}", **default)
    parser.add_argument("--task", metavar="NAME", help=f"train on a task: {', '.join(TASKS)}", **default)


def add_settings(parser: argparse.ArgumentParser, run: RunConfig) -> list[str]:
    """An option for each setting of the run, with its value as the default shown."""
    found, names = settings_of(run), []
    for group in groups_of(run):
        config = getattr(run, group)
        section = parser.add_argument_group(f"settings: {group}", (type(config).__doc__ or "").strip())
        for name, (owner, field, hint) in found.items():
            if owner == group and name not in ("task", "settings"):
                add_setting(section, field, hint, getattr(config, name))
                names.append(name)
        if group == "data":
            for name, (field, hint) in task_settings(run).items():
                if name not in found:
                    add_setting(section, field, hint, config.settings.get(name, field.default))
                    names.append(name)
    return names


def add_setting(section, field: dataclasses.Field, hint: Any, value: Any) -> None:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = f"{field.metadata.get('help', '')} [{shown}]".replace("%", "%%")
    section.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, help=text, **option_for(hint))


def undotted(word: str) -> str:
    """`--training.batch_size=4` as `--batch-size=4`; `--data.settings.payload` as `--payload`."""
    if not word.startswith("--"):
        return word
    name, equals, value = hyphenated(word)[2:].partition("=")
    section, dot, rest = name.partition(".")
    if dot and section in SECTIONS:
        name = rest.removeprefix("settings.")
    return f"--{name}{equals}{value}"
