"""TaskSubject: trains and measures a model on a synthetic task (see `training/subjects.py`)."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_pytorch.analysis.storing import memories_of, storing_off
from titans_pytorch.tasks.registry import build_task
from titans_pytorch.tasks.task import Score, Task
from titans_pytorch.training.config import RunConfig, TaskConfig, TrainConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.plots import draw_accuracy, draw_loss_curve
from titans_pytorch.training.rows import Rows
from titans_pytorch.training.subjects import Context
from titans_pytorch.training.text import text_of

__all__ = ["TaskSubject", "checked_task", "subject_of", "task_of"]


class TaskSubject:
    """Trains on rows of a task. At each validation it measures `<task>_accuracy` on held-out rows and, if there is a
    memory, `<task>_accuracy_storing_off`: the same with writing switched off.
    """

    unit, counted = "answer", "tokens"

    def __init__(self, task: Task, config: TrainConfig, data: TaskConfig | None = None):
        data = data or TaskConfig(task.name)
        self.task, self.config, self.row_len, self.fingerprint = task, config, task.length, repr(task)
        self.accuracy = f"{task.name}_accuracy"
        self.test_times, self.test_rows, self.test_batch_size = data.test_times, data.test_rows, data.test_batch_size
        self.first_len = data.first_len
        if self.first_len and not task.shortest <= self.first_len <= task.length:
            takes = f"0, or {task.shortest} to seq_len = {task.length} for this task"
            raise TrainingError(f"first_len must be {takes}, got {self.first_len}")

    def length_at(self, position: int) -> int:
        """Return the tokens of a row in the batch at `position`. Rows begin short; each length has as many batches.

        Several short rows replace one long row with the same number of tokens: they hold more answers, and are learned
        sooner. Half of the training is at full length."""
        if not self.first_len:
            return self.row_len
        doublings = max(1, math.ceil(math.log2(self.row_len / self.first_len)))
        batches = self.config.steps * self.config.grad_accum
        through = min(1.0, 2 * (position // self.config.batch_size) / batches)
        return min(self.row_len, self.first_len * 2 ** int(through * doublings))

    def tokens(self, position: int, rows: int) -> int:
        length = self.length_at(position)
        return rows * (self.row_len // length) * length

    def batch(self, position: int, size: int) -> Rows:
        length = self.length_at(position)
        many = self.row_len // length
        return self.task.batch(position * many, size * many, length)

    def introduce(self) -> str:
        task = self.task
        return f"task: {task}, chance {task.chance:.1%}"

    def measure(self, model: nn.Module, device: torch.device, autocast: Context) -> dict[str, float]:
        on, off = self.on_and_off(model, self.config.validate_sequences, None, self.config.batch_size, device, autocast)
        name = self.accuracy
        return {name: on.accuracy} if off is None else {name: on.accuracy, f"{name}_storing_off": off.accuracy}

    def on_step(self, model: nn.Module, step: int, device: torch.device, autocast: Context) -> None:
        pass

    def conclude(self, model: nn.Module, out: Path, device: torch.device, autocast: Context) -> dict[str, Any]:
        """Measure accuracy at every test length; with a memory, also with writing switched off."""
        task, scores = self.task, []
        print(f"\naccuracy on {self.test_rows} held-out rows; chance {task.chance:.1%}")
        for length in (times * task.length for times in self.test_times):
            on, off = self.scores(model, length, device, autocast)
            scores.append({"length": length, "accuracy": on.accuracy, "exact": on.exact, "loss": on.loss})
            line = f"  length {length:>6}: {on.accuracy:.1%}"
            if off is not None:
                scores[-1]["storing_off"] = off.accuracy
                line += f" with the memory writing, {off.accuracy:.1%} with writing switched off"
            print(line)
        return {"task": repr(task), "chance": task.chance, "test_rows": self.test_rows, "scores": scores}

    def scores(
        self, model: nn.Module, length: int, device: torch.device, autocast: Context
    ) -> tuple[Score, Score | None]:
        """Return (score, score with writing switched off; None without a memory)."""

        return self.on_and_off(model, self.test_rows, length, self.test_batch_size, device, autocast)

    def on_and_off(self, model: nn.Module, *how: Any) -> tuple[Score, Score | None]:
        """Return the same. how: further arguments of `Task.score`."""

        def score() -> Score:
            return self.task.score(model, *how)

        on = score()
        if not memories_of(model):
            return on, None
        with storing_off(model):
            return on, score()

    def draw(self, out: Path, found: dict[str, Any]) -> list[str]:
        metrics, scores = out / "metrics.jsonl", found.get("scores", ())
        title = f"{out}: {self.task.name}, rows of {self.task.length} tokens"
        drawn = draw_accuracy(metrics, out / "accuracy.png", title, self.accuracy, self.task.chance, scores)
        draw_loss_curve(metrics, out / "loss.png", str(out), self.unit)
        return ["accuracy.png", "loss.png"] if drawn else []


def task_of(data: TaskConfig, train: TrainConfig) -> Task:
    """Build the task that the settings of `data` name, with the length and seed of `train`.

    Raises:
        TrainingError: for wrong settings.
    """
    for name, owner in (("length", "seq_len"), ("seed", "seed")):
        if name in data.settings:
            raise TrainingError(f"data.settings cannot be combined with {name}, which {owner} of training sets")
    try:
        return build_task(data.task, {**data.settings, "length": train.seq_len, "seed": train.seed})
    except (ValueError, TypeError) as error:
        raise TrainingError(f"data: {error}") from error


def checked_task(config: RunConfig) -> Task | None:
    """Return the task that the data section of `config` names, or None for text.

    Raises:
        TrainingError: if the model's vocabulary is smaller than the task's.
    """
    known = getattr(config.model, "vocab_size", None)
    task = task_of(config.data, config.training) if isinstance(config.data, TaskConfig) else None
    needed, takes = 256, "the 256 values of a byte"
    if task is not None:
        needed, takes = task.vocab_size, f"the task's {task.vocab_size} tokens"
    if known is not None and known < needed:
        raise TrainingError(f"vocab_size must be at least {takes}, got {known}")
    return task


def subject_of(config: RunConfig):
    """Return text or a task as the subject, as the data section of `config` says.

    Raises:
        TrainingError: if the model's vocabulary is smaller than the task's.
    """
    task = checked_task(config)
    if task is None or not isinstance(config.data, TaskConfig):
        return text_of(config)
    return TaskSubject(task, config.training, config.data)
