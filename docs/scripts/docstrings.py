"""An extension of griffe, for two habits of our docstrings.

- A paragraph of lines "name: what it is" becomes a list. Names are those of parameters or members (with commas between
  several), so that no other colon is taken for one.
- Under "Args:", an entry for several names becomes an entry for each, so that each shows its type and default.
"""

import re

import griffe

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?P<rest>(?: \[[^\]]*\])?: .*)")
SHARED = re.compile(r"(?P<first>    \w+)(?P<others>(?:, \w+)+)(?P<rest>: .*(?:\n {5,}\S.*)*)", re.MULTILINE)


def listed(text: str, known: set[str]) -> str:
    """The docstring with such paragraphs as lists."""
    return "\n\n".join(_listed(paragraph, known) for paragraph in text.split("\n\n"))


def apart(text: str) -> str:
    """The docstring with an entry for each of the names that share one."""
    return SHARED.sub(_apart, text)


def _apart(match: re.Match) -> str:
    first = match["first"].strip()
    also = [f"    {name}: see `{first}`." for name in match["others"].removeprefix(", ").split(", ")]
    return "\n".join([match["first"] + match["rest"], *also])


def _listed(paragraph: str, known: set[str]) -> str:
    lines = paragraph.split("\n")
    if _entry(lines[0], known) is None:
        return paragraph
    out = []
    for line in lines:
        entry = _entry(line, known)
        out.append(f"  {line}" if entry is None else f"- `{entry['names']}`{entry['rest']}")
    return "\n".join(out)


def _entry(line: str, known: set[str]):
    match = ENTRY.fullmatch(line)
    return match if match and set(match["names"].split(", ")) <= known else None


class OurHabits(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None or not (obj.is_class or obj.is_function):
            return
        known = {parameter.name for parameter in obj.parameters}
        if obj.is_class:
            known |= set(obj.members)
        obj.docstring.value = apart(listed(obj.docstring.value, known))
