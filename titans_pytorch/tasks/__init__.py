"""Synthetic tasks for models with memory, and long contexts cut from any text.

Each task makes its own rows (a function of seed and position alone), knows its solution and the level of guessing, and
scores any model at any length. Start at `task.py`; `TASKS` in `registry.py` lists them by name.
"""

TASK_NAMES = ("copy", "patterns", "needle", "recall", "variables", "text_passkey")  # of registry.TASKS, without torch
