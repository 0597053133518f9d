"""An extension of griffe, for three habits of ours.

- A paragraph of lines "name: what it is" becomes a list. Names are those of parameters or members (with commas between
  several), so that no other colon is taken for one.
- Under "Args:", an entry for several names becomes an entry for each, so that each shows its type and default.
- Fields of a dataclass that say what they mean (`setting(default, help)`, `field(default=.., metadata={"help": ..})`)
  become a list of attributes.
"""

import ast
import re

import griffe

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?P<rest>(?: \[[^\]]*\])?: .*)")
SHARED = re.compile(r"(?P<first>    \w+)(?P<others>(?:, \w+)+)(?P<rest>: .*(?:\n {5,}\S.*)*)", re.MULTILINE)


def listed(text: str, known: set[str]) -> str:
    """Return the docstring with such paragraphs as lists."""
    return "\n\n".join(_listed(paragraph, known) for paragraph in text.split("\n\n"))


def apart(text: str) -> str:
    """Return the docstring with an entry for each of the names that share one."""
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


def explained(value: str) -> tuple[str, str] | None:
    """(default, meaning) of a field that says what it means."""
    call = ast.parse(value, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    if call.func.id == "setting":
        default, meaning = call.args
    else:
        found = {keyword.arg: keyword.value for keyword in call.keywords}
        if call.func.id != "field" or not {"default", "metadata"} <= set(found):
            return None
        default, (meaning,) = found["default"], found["metadata"].values
    return ast.unparse(default), ast.literal_eval(meaning)


def settings(cls: griffe.Class) -> str:
    """Make an "Attributes:" section of the fields that have a help text; they are no longer listed as members."""
    lines = []
    for name, member in list(cls.members.items()):
        if member.is_attribute and member.value is not None and (found := explained(str(member.value))):
            default, meaning = found
            lines.append(f"    {name} ({member.annotation}): {meaning} [`{default}`]")
            del cls.members[name]
    return "\n\nAttributes:\n" + "\n".join(lines) if lines else ""


class OurHabits(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None or not (obj.is_class or obj.is_function):
            return
        known = {parameter.name for parameter in obj.parameters}
        if obj.is_class:
            known |= set(obj.members)
        obj.docstring.value = apart(listed(obj.docstring.value, known))
        if obj.is_class and "dataclass" in obj.labels and (section := settings(obj)):
            obj.docstring.value += section
            obj.members.pop("__init__", None)  # its defaults are whole calls of `setting`
