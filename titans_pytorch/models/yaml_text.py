"""Reads and writes YAML: the scalars of YAML 1.2, keys that are text, and errors that name the line.

YAML 1.1, which PyYAML reads, takes `yes` for true, 1:30 for 90, 010 for 8, 2024-01-01 for a date and 4e-4 for text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from titans_pytorch.common.checks import Words, wrong

__all__ = ["read_yaml", "write_yaml"]

DEEPEST = 20
LONGEST = 1_000_000  # characters
TAG = "tag:yaml.org,2002:"
SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above. Errors are ValueErrors that name the line."""

    yaml_implicit_resolvers: dict = {}

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, AtLine):
                raise
            kind = node.tag.removeprefix(TAG)
            raise AtLine(node, f"{brief(node.value)} is no {kind}") from error

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag not in (f"{TAG}str", f"{TAG}merge"):
                got = key.value if isinstance(key, yaml.ScalarNode) else Words(f"a {key.id}")
                raise AtLine(key, str(wrong("a name", got, "text")))
            if key.value in seen:
                raise AtLine(key, f"{brief(key.value)} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `Loader` would read as another type."""

    yaml_implicit_resolvers: dict = {}


class AtLine(ValueError):
    def __init__(self, node: yaml.Node, what: str):
        super().__init__(f"line {node.start_mark.line + 1}: {what}")


for _kind, (_pattern, _first) in SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))


def whole(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if text.startswith("0x") else 10)


def real(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


Loader.add_constructor(f"{TAG}int", whole)
Loader.add_constructor(f"{TAG}float", real)


def brief(value: Any) -> str:
    text = value if isinstance(value, str) else "this"
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_yaml(text: str) -> Any:
    """Parse a text into dicts with text keys, lists, text, numbers, booleans and None. Raises ValueError if it is not
    YAML, or has other types, keys or tags.
    """
    if len(text) > LONGEST:
        raise wrong("the text", Words(f"{len(text)} characters"), f"at most {LONGEST} characters")
    try:
        for depth, event in depths(text):
            if depth > DEEPEST:
                raise ValueError(f"line {event.start_mark.line + 1}: nested more than {DEEPEST} levels deep")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1}: aliases (*{brief(event.anchor)}) are not read")
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def depths(text: str) -> Iterator[tuple[int, yaml.Event]]:
    depth = 0
    for event in yaml.parse(text, Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        yield depth, event


def write_yaml(value: Any) -> str:
    """Write what `read_yaml` reads."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)
