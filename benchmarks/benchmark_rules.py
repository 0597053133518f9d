"""All update rules that have a name, on recall of growing load, at equal state size: accuracy and cost.

python benchmarks/benchmark_rules.py --output-json runs/rules.json --output-png runs/rules.png    # hours of one core
python benchmarks/benchmark_rules.py --rules deltanet,titans,yaad --seeds 2 --steps 200           # minutes
python benchmarks/benchmark_rules.py --quick                                                      # seconds

Tasks: recall (multi-query associative recall, 4 to 64 pairs), needle (a number of 1 to 8 digits), copy (4 to 32
tokens).
One model per task, rule and seed: embedding, one NeuralMemory.preset and one feed-forward layer, each with a residual,
norm, logits. It is trained on all loads in turn, and tested on each load with held-out rows, the second time with
writing switched off. Every memory has the same causal convolution on queries, keys and values, so that a value meets
its key in all of them, and about as many fast weights (--state). The arm `none` is a memory that never writes, trained
like the others: what convolution and feed-forward do alone.

Cost: seconds of process time of a training step, the median over the run.

Every trained model's scores are kept in runs/unfinished, by settings and commit: the same command continues after an
interruption, and a command with more rules or seeds trains only those that are new.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from harness.arms import digest
from harness.environment import run_record
from harness.plots import new_figure, save_png, style
from harness.program import UNFINISHED, code_version, whole
from harness.statistics import spread
from harness.store import Finished
from harness.tables import percent, seconds, table
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch import NeuralMemory
from titans_pytorch.analysis.storing import stop_storing, storing_off
from titans_pytorch.common.files import write_json
from titans_pytorch.common.names import unknown
from titans_pytorch.memory.named.registry import NAMED
from titans_pytorch.tasks.registry import build_task
from titans_pytorch.tasks.task import IGNORE, Task
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.run import one_line

NONE = "none"
DIM = 64

#: Per task: the setting that grows, its values, and the settings of every row.
LOADS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "recall": ("pairs", (4, 8, 16, 32, 64), {"keys": 64, "values": 32, "length": 160}),
    "needle": ("digits", (1, 2, 4, 8), {"kind": "number", "length": 128}),
    "copy": ("payload", (4, 8, 16, 32), {"symbols": 16, "length": 128}),
}


def memory_of(rule: str, state: int) -> NeuralMemory:
    """Build a rule's memory of DIM features with about `state` fast weights."""
    changes: dict[str, Any] = {"qkv_conv_kernel": 4}
    polynomial = rule in ("omeganet", "atlas")
    if rule == "omeganet":  # one matrix on d features and their products
        changes["dim_head"] = min(range(1, 100), key=lambda d: abs(d * (1 + d + d * (d + 1) // 2) - state))
    elif rule in ("linear_attention", "deltanet", "gated_deltanet", "ttt_linear"):  # one matrix per head
        changes["dim_head"] = max(1, round(state**0.5))
    else:
        changes["dim_head"] = d = 16 if polynomial else 32
        inputs = 1 + d + d * (d + 1) // 2 if polynomial else d
        width = state / (inputs + d if rule != "lact" else 3 * d)
        changes["expansion_factor"] = max(1.0, round(width)) / d
    if rule == "lact":
        changes["chunk"] = 16
    return NeuralMemory.preset(rule, DIM, heads=1, **changes)


class Model(nn.Module):
    """ids [b n] -> logits [b n v]."""

    def __init__(self, vocab_size: int, rule: str, state: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, DIM)
        self.memory = memory_of("titans" if rule == NONE else rule, state)
        self.feed = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.out = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, vocab_size, bias=False))
        if rule == NONE:
            stop_storing(self)

    @property
    def state(self) -> int:
        """Number of fast weights."""
        return sum(w[0].numel() for w in self.memory.init_weights(1).values())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.memory(x)[0]
        return self.out(x + self.feed(x))


def tasks_of(name: str, loads: Sequence[int] | None = None) -> dict[int, Task]:
    setting, values, fixed = LOADS[name]
    found = {}
    for load in loads or values:
        asked = {"queries": min(load, 16)} if name == "recall" else {}
        found[load] = build_task(name, {**fixed, setting: load, **asked})
    return found


def trained(tasks: dict[int, Task], rule: str, seed: int, args: argparse.Namespace) -> tuple[Model, float]:
    """Train one model on all loads in turn: (model, median seconds of process time of a step)."""
    torch.manual_seed(seed)
    vocab = max(task.vocab_size for task in tasks.values())
    model, loads, times = Model(vocab, rule, args.state), list(tasks), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1)
    for step in range(args.steps):
        begun = time.process_time()
        rows = tasks[loads[step % len(loads)]].batch((seed * args.steps + step) * args.batch_size, args.batch_size)
        logits = model(rows.ids)
        loss = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.process_time() - begun)
    return model, statistics.median(times)


def result_of(tasks: dict[int, Task], rule: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test one model."""
    model, step_time = trained(tasks, rule, seed, args)
    scores: dict[str, list[float]] = {"accuracy": [], "storing_off": []}
    for task in tasks.values():
        scores["accuracy"].append(task.score(model, args.test_rows).accuracy)
        with storing_off(model):
            scores["storing_off"].append(task.score(model, args.test_rows).accuracy)
    return {
        **scores,
        "step_seconds": step_time,
        "state": model.state,
        "parameters": sum(map(Tensor.numel, model.parameters())),
    }


def summary(results: Sequence[dict[str, Any]], loads: Sequence[int]) -> dict[str, Any]:
    """Summarise the seeds of one rule on one task."""
    points = []
    for i, load in enumerate(loads):
        kinds = {kind: [result[kind][i] for result in results] for kind in ("accuracy", "storing_off")}
        points.append({"load": load} | {k: {**asdict(spread(v)), "seeds": v} for k, v in kinds.items()})
    step_seconds = statistics.median(result["step_seconds"] for result in results)
    return {"curve": points, "step_seconds": step_seconds, **{k: results[0][k] for k in ("state", "parameters")}}


def shown(rules: dict[str, Any]) -> str:
    loads = [str(point["load"]) for point in next(iter(rules.values()))["curve"]]
    rows = []
    for rule, found in rules.items():
        accuracy = [percent(point["accuracy"]["mean"]) for point in found["curve"]]
        off = percent(statistics.fmean(point["storing_off"]["mean"] for point in found["curve"]))
        rows.append([rule, *accuracy, off, str(found["state"]), seconds(found["step_seconds"])])
    return table(["rule", *loads, "writing off", "state", "step"], rows)


def draw(result: dict[str, Any], path: str) -> None:
    """Draw accuracy over load for each task, and mean accuracy over the cost of a step."""
    with style():
        figure = new_figure(4.2 * len(result["tasks"]), 7.6)
        axes = figure.subplots(2, len(result["tasks"]), squeeze=False)
        for column, (name, found) in enumerate(result["tasks"].items()):
            top, bottom = axes[:, column]
            for i, (rule, one) in enumerate(found["rules"].items()):
                loads, means = zip(*((p["load"], p["accuracy"]["mean"]) for p in one["curve"]), strict=True)
                look = {"color": f"C{i % 10}", "marker": "os^Dvx"[i // 3 % 6], "label": rule}
                top.plot(loads, means, "--" if rule == NONE else "-", **look)
                bottom.plot([1e3 * one["step_seconds"]], [statistics.fmean(means)], linestyle="", **look)
            top.axhline(found["chance"], color="#6b7280", linewidth=1, linestyle=":")
            top.set_xscale("log", base=2)
            top.set(xlabel=found["load"], ylabel="accuracy", ylim=(-0.02, 1.03), title=name)
            bottom.set_xscale("log")
            bottom.set(xlabel="ms of process time per step", ylabel="mean accuracy", ylim=(-0.02, 1.03))
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_png(figure, path)


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise TrainingError(str(unknown(f"{what} ", name, known)))
    if not names:
        raise TrainingError(f"{what}s must be some of {', '.join(known)}, got none")
    return names


def parser() -> argparse.ArgumentParser:
    rules = [NONE, *NAMED]
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rules", default=",".join(rules), help="rules, with commas [all]")
    found.add_argument("--tasks", default=",".join(LOADS), help="tasks, with commas [all]")
    found.add_argument("--state", type=whole(256), default=4096, help="fast weights of a memory, about [4096]")
    found.add_argument("--seeds", type=whole(1), default=5, help="number of seeds [5]")
    found.add_argument("--seed", type=int, default=0, help="the first seed [0]")
    found.add_argument("--steps", type=whole(1), default=1000, help="training steps [1000]")
    found.add_argument("--batch-size", type=whole(1), default=16, help="rows of a step [16]")
    found.add_argument("--lr", type=float, default=1e-2, help="largest learning rate [0.01]")
    found.add_argument("--test-rows", type=whole(1), default=128, help="rows of each score [128]")
    found.add_argument("--quick", action="store_true", help="two rules, two loads, two steps: does it run?")
    found.add_argument("--output-json", metavar="FILE", help="JSON file of the result")
    found.add_argument("--output-png", metavar="FILE", help="PNG file of the curves")
    return found


def compare(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.quick:
        args.rules, args.seeds, args.steps, args.batch_size, args.test_rows = "none,deltanet,moneta", 2, 2, 2, 2
    rules = chosen(args.rules, [NONE, *NAMED], "rule")
    names = chosen(args.tasks, list(LOADS), "task")
    seeds = list(range(args.seed, args.seed + args.seeds))
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("state", "steps", "batch_size", "lr", "test_rows", "quick")}
    kept = Finished(UNFINISHED / f"rules-{digest({**settings, 'code': code_version()})}.jsonl")
    result: dict[str, Any] = {"benchmark": "rules", "seeds": args.seeds, "test_rows": args.test_rows, "tasks": {}}
    for name in names:
        tasks = tasks_of(name, LOADS[name][1][:2] if args.quick else None)
        found = {}
        for rule in rules:
            results = []
            for seed in seeds:
                key = f"{name}/{rule}/{seed}"
                results.append(kept[key] if key in kept else kept.add(key, result_of(tasks, rule, seed, args)))
                print(f"{key}: done", file=sys.stderr, flush=True)
            found[rule] = summary(results, list(tasks))
        chance = next(iter(tasks.values())).chance
        result["tasks"][name] = {"load": LOADS[name][0], "chance": chance, "rules": found}
        print(f"\n{name}: accuracy by {LOADS[name][0]}, mean of {args.seeds} seeds; chance {percent(chance)}\n")
        print(shown(found))
    argv = ["benchmarks/benchmark_rules.py", *(sys.argv[1:] if argv is None else argv)]
    result["run"] = run_record(vars(args), seeds, "cpu", torch.get_num_threads(), argv)
    if args.output_json:
        write_json(args.output_json, result)
    if args.output_png:
        draw(result, args.output_png)


if __name__ == "__main__":
    sys.exit(one_line("benchmark_rules.py", compare))
