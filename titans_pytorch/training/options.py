"""Command-line options made from a configuration: `--name value` for each setting, `--name / --no-name` for a bool."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from titans_pytorch.common.names import nearest, unknown
from titans_pytorch.common.version import version_line
from titans_pytorch.training.config import MOST_THREADS, RunConfig, settings_of, updated

__all__ = ["Given", "OneLineParser", "number", "read_arguments", "script_help", "script_options"]

SECTIONS = ("model", "data", "training", "train", "report")  # of a configuration's file, and of a run
Listed = dict[str, tuple[str, dataclasses.Field, Any, Any]]


class OneLineParser(argparse.ArgumentParser):
    """The parser of every program. It has --version. Errors are one line; the usage of a hundred options would hide
    them. An unknown option is an error that names the nearest.

    Args:
        prog: the program's name; None: the script's.
        description: for --help.
        threads: add --threads.
        more: arguments of ArgumentParser.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, *, threads: bool = False, **more: Any):
        how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **more}
        super().__init__(prog=prog, description=description, **how)
        self.add_argument("--version", action="version", version=version_line(), help="print the versions and exit")
        if threads:
            self.add_argument("--threads", type=thread_count, default=0, metavar="N", help=THREADS_HELP)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists every setting\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse."""
        given, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"got {name!r}, which is no setting's name and follows none that takes a value")
            known = [option for action in self._actions for option in action.option_strings]
            self.error(str(unknown("setting ", name, known)))
        return given


def number(kind: Callable[[str], float], takes: str, fits: Callable[[float], bool] = lambda x: True) -> Any:
    """Return a type for argparse: text is read by `kind` and checked by `fits`. takes: the expected value, for
    errors.
    """

    def read(text: str) -> float:
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {takes}, got {text!r}") from None

    return read


THREADS_HELP = "CPU threads; 0: by the model's width, see docs/threads.md [0]"
thread_count = number(int, f"a whole number from 0 to {MOST_THREADS}", lambda n: 0 <= n <= MOST_THREADS)
any_int = number(int, "a whole number")
any_float = number(float, "a number")


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(any_int(part) for part in text.split(",") if part.strip())


def named_values(text: str) -> dict[str, Any]:
    """Parse `payload=8,distinct=true` to a dict of numbers, booleans and words."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE,..., got {part!r}")
        found[name.strip()] = plain_value(value.strip())
    return found


def one_word(words: tuple[str, ...], text: str) -> str:
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(words)}, got {text!r}{nearest(text, words)}")
    return text.lower()


def plain_value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def option_for(hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a value of this type."""
    args = typing.get_args(hint)
    if type(None) in args:
        inner = option_for(next(a for a in args if a is not type(None)))
        read = inner.get("type", str)
        return {**inner, "type": lambda text: None if text.lower() == "none" else read(text)}
    if typing.get_origin(hint) is Literal:
        return {"choices": list(args), "type": partial(one_word, args)}
    if typing.get_origin(hint) is tuple:
        return {"type": whole_numbers, "metavar": "N,N,..."}
    if typing.get_origin(hint) is dict:
        return {"type": named_values, "metavar": "K=V,..."}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float):
        return {"type": any_int, "metavar": "N"} if hint is int else {"type": any_float, "metavar": "X"}
    return {"metavar": "TEXT"}


@dataclasses.dataclass(frozen=True)
class Given:
    """A parsed command line.

    run: the configuration, with the settings given.
    values: these settings, by name.
    options: the program's own options.
    """

    run: RunConfig
    values: dict[str, Any]
    options: argparse.Namespace


def listed_settings(run: RunConfig) -> Listed:
    """Map each setting that is an option to (section, field, type, value)."""
    return {
        name: (group, f, hint, getattr(getattr(run, group), name))
        for name, (group, f, hint) in settings_of(run).items()
    }


def read_arguments(
    prog: str,
    description: str,
    argv: list[str],
    add_options: Callable[[argparse.ArgumentParser], None],
    start: Callable[[argparse.Namespace], RunConfig],
    *,
    presets: Mapping[str, RunConfig] | None = None,
    listed: Callable[[RunConfig], Listed] = listed_settings,
    replace: Callable[[RunConfig, dict[str, Any]], RunConfig] = updated,
    usage: str = "%(prog)s [--SETTING VALUE ...]",
) -> Given:
    """Read a command line: the program's own options, and settings by name. A mistake prints a line and exits with 2.

    Args:
        prog: the program's name.
        description: for --help.
        argv: the command line.
        add_options: adds the program's own options to a parser.
        start: called with these options; returns the configuration to start from.
        presets: presets whose values --help shows; None: the configuration to start from.
        listed: the settings that are options.
        replace: the configuration with settings replaced by name; ValueError for wrong values.
        usage: for --help.
    """
    parser = OneLineParser(prog, description, usage=usage)
    add_options(parser)
    argv = [undotted(word) for word in argv]
    options, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    run = start(options)
    names = add_settings(parser, presets or {"": run}, listed)
    found = vars(parser.parse_args(argv))
    values = {name: found.pop(name) for name in names if name in found}
    try:
        run = replace(run, values)
    except ValueError as error:
        parser.error(str(error))
    return Given(run, values, argparse.Namespace(**found))


def script_options(parser: argparse.ArgumentParser, presets: Mapping[str, RunConfig]) -> None:
    """Add the options of a training script that are no settings."""
    parser.add_argument("--preset", choices=list(presets), help="the preset to start from")
    parser.add_argument("--out", metavar="DIR", help="output folder (runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


def script_help(presets: Mapping[str, RunConfig], description: str) -> None:
    """Print --help or --version of a training script and exit, if that is asked for, before torch is imported.

    Args:
        presets: as of `training.run.main`.
        description: text for --help.
    """
    argv = sys.argv[1:]
    if {"-h", "--help", "--version"} & set(argv):
        first = next(iter(presets.values()))
        add = partial(script_options, presets=presets)
        read_arguments(Path(sys.argv[0]).name, description, argv, add, lambda given: first, presets=presets)


def add_settings(
    parser: argparse.ArgumentParser, presets: Mapping[str, RunConfig], listed: Callable[[RunConfig], Listed]
) -> list[str]:
    """Add an option for each setting, with its value in each preset as the default shown. Returns their names."""
    some, settings = next(iter(presets.values())), {preset: listed(run) for preset, run in presets.items()}
    rows = listed(some)
    sections: dict[str, Any] = {}
    for name, (group, field, hint, _) in rows.items():
        if group not in sections:
            about = (type(getattr(some, group)).__doc__ or "").strip()
            sections[group] = parser.add_argument_group(f"settings: {group}", about)
        shown = {preset: as_text(found[name][3]) for preset, found in settings.items()}
        default = ", ".join(f"{preset}: {value}" for preset, value in shown.items())
        if len(set(shown.values())) == 1:
            default = next(iter(shown.values()))
        text = f"{field.metadata.get('help', '')} [{default}]".replace("%", "%%")
        option = f"--{name.replace('_', '-')}"
        sections[group].add_argument(option, dest=name, default=argparse.SUPPRESS, help=text, **option_for(hint))
    return list(rows)


def as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def undotted(word: str) -> str:
    """Rewrite `--training.batch_size=4` as `--batch-size=4`; `--data.settings.payload` as `--payload`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("_", "-")
    section, dot, rest = name.partition(".")
    if dot and section in SECTIONS:
        name = rest.removeprefix("settings.")
    return f"--{name}{equals}{value}"
