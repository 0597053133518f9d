"""titans analyze: what the memories of a trained model do along a text."""

from argparse import Namespace
from pathlib import Path

import torch

from titans_pytorch.analysis.overshoot import Gains, overshoot_note
from titans_pytorch.analysis.plot import ROWS, plot_traces
from titans_pytorch.analysis.trace import trace_memories
from titans_pytorch.cli.inputs import held_out_text, need_bytes, need_memory, opened
from titans_pytorch.common.files import write_json
from titans_pytorch.tasks.subject import task_of
from titans_pytorch.training.config import TaskConfig

__all__ = ["analyze_command"]


def analyze_command(options: Namespace) -> None:
    device, run, model = opened(options)
    need_memory(run, model, options.run)
    if options.text is None and isinstance(run.data, TaskConfig):
        ids, what = task_of(run.data, run.training).batch(0, 1, options.length, held_out=True).ids, run.data.task
    else:
        ids = held_out_text(run, options.text, options.length)[None, : options.length].long()
        what = options.text or "held-out text"
    need_bytes(run, int(ids.max()) + 1)
    traces = trace_memories(model, ids.to(device), options.piece)
    out = Path(options.out) if options.out else Path(options.run) / "analysis"
    result = {"run": options.run, "read": what, "tokens": options.length, "torch": torch.__version__}
    write_json(out / "memory.json", {**result, "memories": [trace.to_dict() for trace in traces]})
    drawn = plot_traces(traces, out / "memory.png", f"{options.run}: {options.length} tokens of {what}")
    for trace in traces:
        means = {label: sum(v) / len(v) for name, label in ROWS[:3] if (v := getattr(trace, name))}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        gain = "" if trace.gain is None else f"; largest gain {trace.gain:.2g}"
        print(f"{trace.name}: mean {shown}; weights changed by {trace.change[-1]:.1%} of their start{gain}")
    lost = {trace.name: trace.lost for trace in traces if trace.lost is not None}
    gains = Gains({trace.name: trace.gain for trace in traces if trace.gain is not None}, lost)
    if note := overshoot_note(gains):
        print(note)
    print(f"{out}/ holds memory.json" + (" and memory.png" if drawn else "; matplotlib is not installed: no picture"))
