"""Command-line options made from a configuration: `--name value` for each setting, `--name / --no-name` for a bool."""

import argparse
import dataclasses
import typing
from typing import Any, Literal

from titans_pytorch.training.config import RunConfig, groups_of, nearest, settings_of, updated

__all__ = ["parse_options"]


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line; the usage of a hundred options would hide them."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists every setting\n")


def number(kind: type) -> Any:
    def parse(text: str):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    parse = number(int)
    return tuple(parse(part) for part in text.split(",") if part.strip())


def named_values(text: str) -> dict[str, Any]:
    """`payload=8,distinct=true` as a dict of numbers, truth values and words."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE,..., got {part!r}")
        found[name.strip()] = plain_value(value.strip())
    return found


def plain_value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def option_for(hint: Any) -> dict[str, Any]:
    """What argparse needs to read a value of this type."""
    args = typing.get_args(hint)
    if type(None) in args:
        inner = option_for(next(a for a in args if a is not type(None)))
        read = inner.get("type", str)
        return {**inner, "type": lambda text: None if text.lower() == "none" else read(text)}
    if typing.get_origin(hint) is Literal:
        return {"choices": list(args)}
    if typing.get_origin(hint) is tuple:
        return {"type": whole_numbers, "metavar": "N,N,..."}
    if typing.get_origin(hint) is dict:
        return {"type": named_values, "metavar": "K=V,..."}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float):
        return {"type": number(hint), "metavar": "N" if hint is int else "X"}
    return {"metavar": "TEXT"}


def build_parser(presets: dict[str, RunConfig], description: str, prog: str | None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s [--SETTING VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--preset", choices=list(presets), help="which settings to start from")
    parser.add_argument("--out", metavar="DIR", help="where the run is kept (runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    some = next(iter(presets.values()))
    found = settings_of(some)
    for group in groups_of(some):
        section = parser.add_argument_group(f"settings: {group}", (type(getattr(some, group)).__doc__ or "").strip())
        for name, (owner, field, hint) in found.items():
            if owner == group:
                option = f"--{name.replace('_', '-')}"
                section.add_argument(option, help=help_of(presets, group, field), **option_for(hint))
    return parser


def hyphenated(argument: str) -> str:
    """`--batch_size=4` as `--batch-size=4`: both spellings are taken."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def help_of(presets: dict[str, RunConfig], group: str, field: dataclasses.Field) -> str:
    values = {preset: getattr(getattr(run, group), field.name) for preset, run in presets.items()}
    shown = {preset: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for preset, v in values.items()}
    if len(set(shown.values())) == 1:
        default = next(iter(shown.values()))
    else:
        default = ", ".join(f"{preset}: {value}" for preset, value in shown.items())
    return f"{field.metadata.get('help', '')} [{default}]".replace("%", "%%")


def parse_options(
    presets: dict[str, RunConfig], description: str, argv: list[str], prog: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`preset`, `out`, `resume` as far as given; the settings given, by flat name). Exits with 2 on a mistake."""
    parser = build_parser(presets, description, prog)
    given, unknown = parser.parse_known_args([hyphenated(argument) for argument in argv])
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            parser.error(f"got {name!r}, which is no setting's name and follows none that takes a value")
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown setting {name}{nearest(name, known)}")
    values = vars(given)
    general: dict[str, Any] = {name: values.pop(name) for name in ("preset", "out", "resume") if name in values}
    try:
        updated(presets[general.get("preset", next(iter(presets)))], values)
    except ValueError as error:
        parser.error(str(error))
    return general, values
