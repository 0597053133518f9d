"""titans eval: measure a trained model again: bits per byte of a text, or accuracy on a task, at any length."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_pytorch.analysis.storing import memories_of, storing_off
from titans_pytorch.cli.inputs import held_out_text, need_bytes, opened
from titans_pytorch.common.files import write_json
from titans_pytorch.tasks.subject import TaskSubject, task_of
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.device import autocast_for
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.evaluate import bits_per_byte

__all__ = ["evaluate_command"]


def evaluate_command(options: Namespace) -> None:
    device, run, model = opened(options)
    lengths = options.length or [run.training.seq_len]
    with torch.no_grad():
        if options.text is None and isinstance(run.data, TaskConfig):
            found = on_task(run, run.data, model, lengths, options.rows, device)
        else:
            found = on_text(run, model, lengths, options, device)
    for row in found:
        print(", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in row.items() if value is not None))
    if options.json:
        write_json(Path(options.json), {"run": options.run, "results": found})


def shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def on_task(
    run: RunConfig, data: TaskConfig, model: nn.Module, lengths: list[int], rows: int, device: torch.device
) -> list[dict[str, Any]]:
    task = task_of(data, run.training)
    if wrong := [length for length in lengths if length < task.shortest]:
        raise TrainingError(f"length must be at least {task.shortest} for this task, got {wrong[0]}")
    subject = TaskSubject(task, run.training, replace(data, first_len=0, test_rows=rows))
    found: list[dict[str, Any]] = []
    for length in lengths:
        on, off = subject.scores(model, length, device, autocast_for(device, run.training))
        found.append({"length": length, "accuracy": on.accuracy, "exact": on.exact, "chance": task.chance})
        found[-1]["storing_off"] = None if off is None else off.accuracy
    return found


def on_text(run: RunConfig, model, lengths: list[int], options, device) -> list[dict[str, Any]]:
    need_bytes(run)
    limit = options.limit or (run.report.eval_limit if options.text is None else 0)
    text = held_out_text(run, options.text, max(lengths), limit)

    def bits(length: int) -> float:
        size = max(1, run.report.eval_batch_size * run.training.seq_len // length)
        stride = max(1, length // 2)
        autocast = autocast_for(device, run.training)
        return bits_per_byte(
            model, text, context=length, stride=stride, batch_size=size, device=device, autocast=autocast, progress=True
        )

    found = []
    for length in lengths:
        found.append({"length": length, "bits_per_byte": bits(length)})
        if memories_of(model):
            with storing_off(model):
                found[-1]["storing_off"] = bits(length)
    return found
