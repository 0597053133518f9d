"""Tasks by name, built from plain settings."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from ..training.config import checked
from .copy import Copy
from .long_text import PasskeyInText
from .needle import Needle
from .patterns import Patterns
from .recall import Recall
from .task import Task
from .variables import Variables

__all__ = ["TASKS", "build_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Copy, Patterns, Needle, Recall, Variables, PasskeyInText)}


def build_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """A task by its name.

    Args:
        name: copy, patterns, needle, recall, variables or text_passkey.
        settings: of the task, by their names; what is missing keeps its default.

    Raises:
        ValueError: for unknown names, naming the nearest known one, and for wrong values.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {str(name)[:60]}{_nearest(name, TASKS)}; known: {', '.join(TASKS)}")
    kind, settings = TASKS[name], dict(settings or {})
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown setting {str(key)[:60]} of the {name} task{_nearest(key, known)}")
    return kind(**{key: checked(key, value, hints[key]) for key, value in settings.items()})


def _nearest(name: str, known) -> str:
    close = get_close_matches(str(name)[:60], list(known), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""
