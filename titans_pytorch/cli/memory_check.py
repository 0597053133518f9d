"""titans memory-check: does the memory change while the model reads, and does that help?"""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from titans_pytorch.cli.inputs import held_out_text, need_bytes, need_memory, opened
from titans_pytorch.common.files import write_json
from titans_pytorch.tasks.benefit import benefit_on_task, benefit_on_text, memory_change
from titans_pytorch.tasks.subject import task_of
from titans_pytorch.training.config import TaskConfig

__all__ = ["memory_check_command"]


def memory_check_command(options: Namespace) -> None:
    device, run, model = opened(options)
    need_memory(run, model, options.run)
    length, rows, size = options.length or run.training.seq_len, options.rows, options.batch_size
    if options.text is None and isinstance(run.data, TaskConfig):
        task = task_of(run.data, run.training)
        ids = task.batch(0, 1, length, held_out=True).ids
        found = benefit_on_task(model, task, rows, length, size, device)
    else:
        need_bytes(run)
        text = held_out_text(run, options.text, length)
        starts = [round(i * (len(text) - length - 1) / max(1, rows - 1)) for i in range(rows)]
        windows = torch.stack([text[start : start + length + 1] for start in starts])
        ids = windows[:1, :-1].long()
        found = benefit_on_text(model, windows, 0, size, device)
    change = memory_change(model, ids.to(device))
    for name, value in change.items():
        print(f"{name}: after {length} tokens its weights differ from their start by {value:.1%} of their size")
    print(f"{found.measure} over {found.rows} rows: {found.on:.4f} with storing, {found.off:.4f} with it switched off")
    print(f"better by {found.gain:.4f}, 95 % interval {found.low:.4f} to {found.high:.4f}: {found.verdict}")
    if options.json:
        result = {"run": options.run, "length": length, "change": change, **asdict(found), "verdict": found.verdict}
        write_json(Path(options.json), result)
