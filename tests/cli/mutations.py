"""Damaged configurations, from a seed: the committed ones with values, names, structure or bytes changed."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**12, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        " ",
        "auto",
        "cuda",
        "meta",
        "cpu:-1",
        "none",
        "yes",
        "\0",
        "a\nb",
        "\ud800",
        "x" * 5000,
        "💥",
        "../../x",
        "/",
    ),
    *([], [[]], [1], [0], [-1], [10**30], ["a"], [None], {}, {"a": 1}, {"a": {"b": {}}}, list(range(3000))),
)
TEXTS = (
    *(
        "!!bool x",
        "!!int x",
        "!!int ''",
        "!!float x",
        "!!null x",
        "!!timestamp x",
        "!!binary é",
        "!!binary aGk=",
        "!!set {a}",
    ),
    *(
        "!!python/object:os.system x",
        "!!python/tuple [1]",
        "!!omap [a: 1]",
        "!!str 3",
        "!unknown 3",
        "!!map 3",
        "!!seq 3",
    ),
    *(
        "1e999",
        "-.inf",
        ".nan",
        "0x" + "f" * 6000,
        "9" * 6000,
        "1:30:00",
        "010",
        "0b11",
        "1_000",
        "2024-01-01",
        "yes",
        "on",
    ),
    *(
        "[" * 400,
        "{" * 400,
        "[" * 30 + "]" * 30,
        "*nothing",
        "&a [*a]",
        "&a {b: *a}",
        "{<<: {a: 1}}",
        "{<<: 3}",
        "|",
        ">-",
    ),
    *(
        "'",
        '"',
        "\t",
        "? [a]",
        "{[1]: 2}",
        "{null: 2}",
        "{1: 2}",
        "{a: 1, a: 2}",
        "{? {a: 1} : 2}",
        "%TAG ! x",
        "@",
        "`",
    ),
)
LINES = (
    *(
        "---",
        "...",
        "--- 3",
        "[1]: 2",
        "null: 1",
        "1: 2",
        "? a",
        "<<: {a: 1}",
        "<<: *x",
        "model: 3",
        "model: []",
        "data: null",
    ),
    *(
        "training: {}",
        "%YAML 9.9",
        "\t",
        "- a",
        "steps: 3",
        "!!binary x: 1",
        "on: 1",
        "? [a, b]\n: 1",
        "a: &x [1]\nb: *x",
    ),
)
BYTES = (
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\t",
    b"\r",
    b":",
    b"[",
    b"}",
    b"#",
    b"'",
    b'"',
    b"\xe2\x80\xa8",
    b"&",
    b"*",
    b"!",
)


def damaged(seed: int) -> bytes:
    """A configuration, with one to three changes."""
    rng = random.Random(seed)
    text = rng.choice(CONFIGS).read_text()
    for _ in range(rng.randint(1, 2)):
        text = rng.choice((of_structure, of_structure, of_values, of_lines))(text, rng)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice(BYTES) + content[at + rng.randint(0, 2) :]
    if rng.random() < 0.05:
        content = rng.choice((b"", b"[]", b"0", b"false", b"''", b"- 1", content.decode("latin-1").encode("utf-16")))
    return content


def of_structure(text: str, rng: random.Random) -> str:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError, IndexError):
        return of_lines(text, rng)
    if not isinstance(found, dict):
        return of_lines(text, rng)
    places = list(inner(found))
    holder, name = rng.choice(places)
    kind = rng.randrange(6)
    if kind < 3:
        holder[name] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
        holder[rng.choice((name[:-1], name.upper(), "", "x", 3, None, True, 0.5))] = holder.pop(name)
    elif kind == 4:
        other, second = rng.choice(places)
        holder[name], other[second] = copy.deepcopy(other.get(second)), copy.deepcopy(holder.get(name))
    else:
        holder[name] = {name: holder[name]}
    try:
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    except ValueError:  # an integer of more digits than Python prints
        return of_lines(text, rng)


def inner(found: dict, depth: int = 5) -> Iterator[tuple[dict, Any]]:
    """Every place in it, less what lies deeper: an alias may lead back."""
    for name, value in found.items():
        if isinstance(name, str):
            yield found, name
        if isinstance(value, dict) and depth:
            yield from inner(value, depth - 1)


def of_values(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    name, colon, _ = lines[at].partition(":")
    lines[at] = f"{name}{colon or ':'} {rng.choice(TEXTS)}"
    return "\n".join(lines)


def of_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        lines.insert(at, " " * rng.choice((0, 2, 4)) + rng.choice(LINES))
    elif kind == 1:
        del lines[at : at + 1]
    elif kind == 2:
        lines[at:at] = lines[at : at + rng.randint(1, 3)]
    else:
        lines[at : at + 1] = [" " * rng.randint(0, 5) + line.strip() for line in lines[at : at + 1]]
    return "\n".join(lines)
