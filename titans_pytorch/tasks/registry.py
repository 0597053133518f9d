"""Tasks by name, built from plain settings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from titans_pytorch.common.names import unknown
from titans_pytorch.tasks.copy import Copy
from titans_pytorch.tasks.long_text import PasskeyInText
from titans_pytorch.tasks.needle import Needle
from titans_pytorch.tasks.patterns import Patterns
from titans_pytorch.tasks.recall import Recall
from titans_pytorch.tasks.task import Task
from titans_pytorch.tasks.variables import Variables
from titans_pytorch.training.config import checked

__all__ = ["TASKS", "build_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Copy, Patterns, Needle, Recall, Variables, PasskeyInText)}


def build_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """Build a task by its name.

    Args:
        name: copy, patterns, needle, recall, variables or text_passkey.
        settings: settings of the task, by name; missing ones keep their defaults.

    Raises:
        ValueError: for unknown names (it names the nearest known one) and for wrong values.
    """
    if name not in TASKS:
        raise ValueError(f"{unknown('task ', name, TASKS)}; known: {', '.join(TASKS)}")
    kind, settings = TASKS[name], dict(settings or {})
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key in settings:
        if key not in known:
            raise unknown("setting ", key, known, f" of the {name} task")
    return kind(**{key: checked(key, value, hints[key]) for key, value in settings.items()})
