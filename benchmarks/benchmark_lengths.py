"""Accuracy against length: all five models trained on one task at one length with one budget, tested at longer ones.

python benchmarks/benchmark_lengths.py --config configs/needle.yaml --output-json runs/lengths.json \
    --output-png runs/lengths.png
python benchmarks/benchmark_lengths.py --config configs/needle.yaml --models mac,baseline --seeds 5 --steps 500

Every model with a memory is tested twice, the second time with writing switched off. --test-times of the configuration
sets the lengths. Finished runs in --out are kept, so that the same command continues after an interruption.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.environment import run_record
from harness.plots import COLOURS, new_figure, plain, save_png, style
from harness.program import whole
from harness.statistics import spread
from harness.tables import percent, table
from harness.training_runs import kept_run

from titans_pytorch.common.files import write_json
from titans_pytorch.models.config import VARIANTS
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser

QUICK = {"steps": 2, "test_rows": 4, "validate_every": 0, "test_times": (1,)}


def parser() -> argparse.ArgumentParser:
    found = OneLineParser(description=__doc__, threads=True)
    found.add_argument("--config", required=True, help="a configuration with a task in its data section")
    found.add_argument("--models", default=",".join(VARIANTS), help="models, with commas [all]")
    found.add_argument("--seeds", type=whole(1), help="number of seeds [3, with --quick 1]")
    found.add_argument("--seed", type=int, default=0, help="the first seed [0]")
    found.add_argument("--steps", type=int, help="training steps [the configuration's]")
    found.add_argument("--test-rows", type=int, help="rows of each score [the configuration's]")
    found.add_argument("--device", help="auto, cpu, cuda [the configuration's]")
    found.add_argument("--quick", action="store_true", help="two steps, few rows: shows that it runs")
    found.add_argument("--out", help="folder of the runs [runs/lengths, with --quick runs/lengths-quick]")
    found.add_argument("--output-json", metavar="FILE", help="JSON file of the result")
    found.add_argument("--output-png", metavar="FILE", help="PNG file of the curves")
    return found


def base_of(args: argparse.Namespace) -> RunConfig:
    from titans_pytorch.cli.settings import config_from, replaced

    run = config_from(args.config, None)
    if not isinstance(run.data, TaskConfig):
        raise TrainingError(f"config: {args.config} trains on text, takes one with a task")
    names = ("steps", "test_rows", "device", "threads")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        return replaced(run, {**(QUICK if args.quick else {}), **given})
    except ValueError as error:
        raise TrainingError(str(error)) from error


def models_of(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise TrainingError(f"models must be some of {', '.join(VARIANTS)}, got {name}")
    return names


def result_of(base: RunConfig, variant: str, seed: int, out: Path) -> dict[str, Any]:
    """Return the result of one training run, or of an earlier one in this folder with the same settings."""
    from titans_pytorch.models.runs import model_of
    from titans_pytorch.tasks.subject import subject_of

    run = replace(base, model=replace(base.model, variant=variant), training=replace(base.training, seed=seed))
    folder, label = out / f"{variant}-{seed}", f"{variant}, seed {seed}"
    return kept_run(run, folder, label, "benchmark_lengths.py", model_of, subject_of)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the seeds of one model: accuracy at every length, with writing on and off."""
    curves = []
    for rows in zip(*(result["scores"] for result in results), strict=True):
        point: dict[str, Any] = {"length": rows[0]["length"]}
        for name in ("accuracy", "storing_off"):
            if all(name in row for row in rows):
                values = [row[name] for row in rows]
                point[name] = {**asdict(spread(values)), "seeds": values}
        curves.append(point)
    return {
        "parameters": results[0]["parameters"],
        "training_seconds": [result["training_seconds"] for result in results],
        "curve": curves,
    }


def shown(models: dict[str, dict[str, Any]], chance: float) -> str:
    lengths = [point["length"] for point in next(iter(models.values()))["curve"]]
    rows = []
    for name, found in models.items():
        for kind, label in (("accuracy", name), ("storing_off", f"{name}, storing off")):
            if kind in found["curve"][0]:
                rows.append([label, *(percent(point[kind]["mean"]) for point in found["curve"])])
    rows.append(["chance", *([percent(chance)] * len(lengths))])
    return table(["model", *map(str, lengths)], rows)


def draw(result: dict[str, Any], path: str) -> None:
    """Draw one line per model over length, with seeds as points, writing off dashed, and chance as a gray line."""
    names = {"mac": "MAC", "mag": "MAG", "mal": "MAL", "lmm": "LMM", "baseline": "plain transformer"}
    with style():
        figure = new_figure(7.2, 4.2)
        axes = figure.subplots()
        for colour, (name, found) in zip(COLOURS, result["models"].items(), strict=False):
            lengths = [point["length"] for point in found["curve"]]
            for kind, dashes in (("accuracy", "-"), ("storing_off", ":")):
                points = [point[kind] for point in found["curve"] if kind in point]
                if not points:
                    continue
                label = names[name] if kind == "accuracy" else None
                axes.plot(lengths, [p["mean"] for p in points], dashes, marker="o", color=colour, label=label)
                for length, p in zip(lengths, points, strict=True):
                    axes.plot([length] * len(p["seeds"]), p["seeds"], ".", color=colour, alpha=0.4, markersize=4)
        axes.axhline(result["chance"], color="#6b7280", linewidth=1, linestyle="--", label="chance")
        axes.plot([], [], ":", color="#1f2328", label="storing switched off")
        axes.axvline(lengths[0], color="#c9ccd1", linewidth=1)
        axes.set_xscale("log", base=2)
        plain(axes.xaxis)
        axes.set_xticks(lengths)
        axes.set(xlabel="tokens of a row", ylabel="accuracy", ylim=(-0.02, 1.03))
        axes.set_title(f"{result['task']}\ntrained at {lengths[0]} tokens; {result['seeds']} seeds", fontsize=8)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_png(figure, path)


def compare(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.out = args.out or ("runs/lengths-quick" if args.quick else "runs/lengths")
    args.seeds = args.seeds or (1 if args.quick else 3)
    base, names = base_of(args), models_of(args.models)
    seeds = list(range(args.seed, args.seed + args.seeds))
    found = {name: [result_of(base, name, seed, Path(args.out)) for seed in seeds] for name in names}
    first = found[names[0]][0]
    models = {name: summary(results) for name, results in found.items()}
    argv = ["benchmarks/benchmark_lengths.py", *(sys.argv[1:] if argv is None else argv)]
    record = run_record(base.to_dict(), seeds, first["device"], first["threads"], argv)
    result = {
        "benchmark": "lengths",
        "task": first["task"],
        "chance": first["chance"],
        "test_rows": first["test_rows"],
        "seeds": len(seeds),
        "models": models,
        "run": record,
    }
    print(f"\n{result['task']}\naccuracy, mean of {len(seeds)} seeds, {result['test_rows']} rows each\n")
    print(shown(models, result["chance"]))
    if args.output_json:
        write_json(args.output_json, result)
    if args.output_png:
        draw(result, args.output_png)


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes are answered before torch is imported
    from titans_pytorch.training.run import one_line

    sys.exit(one_line("benchmark_lengths.py", compare))
