"""Does the memory help a language model on text? train_mac.py's small preset with it, without it, and as large without.

python benchmarks/benchmark_text.py --data data/enwik8 --output-json runs/text.json --output-png runs/text.png
python benchmarks/benchmark_text.py --data my.txt --seeds 1 --steps 200      # a few minutes

Arms, paired by seed (the same initial draws, the same order of the data, the same steps):
  memory   the preset
  none     the same layers without the memory
  wider    without the memory, its feed-forwards widened until it has as many parameters as `memory`
Every arm predicts all held-out bytes; `memory` a second time with writing switched off, which separates the effect of
the writes from that of the extra layer. Finished runs in --out are kept: the same command continues.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.compare import between
from harness.environment import REPOSITORY, run_record
from harness.later import torch
from harness.plots import COLOURS, INK, new_figure, save_png, style
from harness.statistics import spread
from harness.tables import seconds, table
from harness.training_runs import kept_run

from titans_pytorch.common.files import write_json
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.mac import MacConfig, build_mac
from titans_pytorch.training.options import OneLineParser

LABELS = {
    "memory": "with memory",
    "storing_off": "the same, storing off at test",
    "none": "without memory",
    "wider": "without, as many parameters",
}
QUICK = {"steps": 2, "seq_len": 64, "data_limit": 20_000, "sample_len": 16}


def parser() -> argparse.ArgumentParser:
    found = OneLineParser(description=__doc__, threads=True)
    found.add_argument("--data", help="data, as for train_mac.py [auto]")
    found.add_argument("--seeds", type=int, help="number of seeds [3, with --quick 1]")
    found.add_argument("--seed", type=int, default=0, help="the first seed [0]")
    found.add_argument("--steps", type=int, help="training steps [the preset's]")
    found.add_argument("--seq-len", type=int, help="bytes of a sequence [the preset's]")
    found.add_argument("--device", help="auto, cpu, cuda [auto]")
    found.add_argument("--quick", action="store_true", help="two steps on little data: shows that it runs")
    found.add_argument("--out", help="folder of the runs [runs/text, with --quick runs/text-quick]")
    found.add_argument("--output-json", metavar="FILE", help="JSON file of the result")
    found.add_argument("--output-png", metavar="FILE", help="PNG file of the figure")
    return found


def preset() -> RunConfig:
    sys.path.insert(0, str(REPOSITORY))
    from train_mac import PRESETS

    return replace(PRESETS["small"], name="small").replace(eval_limit=0)  # scored on all held-out bytes


def arms_of(base: RunConfig) -> dict[str, RunConfig]:
    without = replace(base.model, memory=False)
    wider = replace(without, ff_mult=matching_ff_mult(without, parameters(base.model)))
    return {name: replace(base, model=m) for name, m in (("memory", base.model), ("none", without), ("wider", wider))}


def parameters(config: MacConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_mac(config, torch.device("meta")).parameters())


def matching_ff_mult(config: MacConfig, wanted: int) -> float:
    """Return the smallest multiple of 1/16 with which the model has at least `wanted` parameters."""
    here = parameters(config)
    grown = parameters(replace(config, ff_mult=config.ff_mult + 1)) - here  # in proportion, but for rounding
    ff_mult = math.ceil(16 * (config.ff_mult + max(wanted - here, 0) / grown)) / 16
    while parameters(replace(config, ff_mult=ff_mult)) < wanted:
        ff_mult += 1 / 16
    return ff_mult


def measured(name: str, run: RunConfig, seed: int, out: Path) -> dict[str, Any]:
    """Return the results of a run, also with writing switched off if it has a memory."""
    from titans_pytorch.training.text import text_of

    run = replace(run, training=replace(run.training, seed=seed))
    folder = out / f"{name}-{seed}"
    found = kept_run(run, folder, f"{name}, seed {seed}", "benchmark_text.py", build_mac, text_of)
    if run.model.memory and "storing_off" not in found:
        found["storing_off"] = bits_with_storing_off(run, folder, torch.device(found["device"]))
        write_json(folder / "result.json", found)
    return found


def bits_with_storing_off(run: RunConfig, folder: Path, device: torch.device) -> float:
    from titans_pytorch.analysis.storing import storing_off
    from titans_pytorch.training.checkpoint import load_weights
    from titans_pytorch.training.data import load_data
    from titans_pytorch.training.device import autocast_for
    from titans_pytorch.training.evaluate import bits_per_byte

    model = build_mac(run.model, device)
    load_weights(model, folder / "model.safetensors")
    context = run.training.seq_len
    with storing_off(model):
        return bits_per_byte(
            model,
            load_data(run.data).held_out,
            context=context,
            stride=run.report.eval_stride or max(1, context // 2),
            batch_size=run.report.eval_batch_size,
            device=device,
            autocast=autocast_for(device, run.training),
            progress=True,
        )


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summarise bits per byte of every arm over the seeds, and the paired differences of the memory."""
    bits = {name: [run["held_out_bits_per_byte"] for run in runs] for name, runs in found.items()}
    bits["storing_off"] = [run["storing_off"] for run in found["memory"]]
    arms = {name: {**asdict(spread(values)), "values": values} for name, values in bits.items()}
    for name, runs in found.items():
        arms[name]["parameters"] = runs[0]["parameters"]
        arms[name]["training_seconds"] = [run["training_seconds"] for run in runs]
    others = ("none", "wider", "storing_off")
    versus = [between("bits per byte", "memory", other, bits["memory"], bits[other]) for other in others]
    return {"arms": arms, "versus": versus, "compressors": found["memory"][0]["compared_with"]}


def shown(result: dict[str, Any]) -> str:
    rows = []
    for name, label in LABELS.items():
        arm = result["arms"][name]
        size = f"{arm['parameters']:,}" if "parameters" in arm else ""
        took = seconds(min(arm["training_seconds"])) if "training_seconds" in arm else ""
        rows.append([label, interval(arm), size, took])
    rows += [[name, f"{value:.3f}", "", ""] for name, value in result["compressors"].items()]
    lines = [table(["held-out bytes", "bits per byte", "parameters", "training"], rows), ""]
    for pair in result["versus"]:
        low_high = "" if pair["low"] is None else f" (95 % interval {pair['low']:+.3f} to {pair['high']:+.3f})"
        lines.append(f"memory against {pair['other']}: {pair['mean']:+.3f}{low_high}: {pair['verdict']}")
    return "\n".join(lines)


def interval(arm: dict[str, Any]) -> str:
    half = "" if arm["low"] is None else f" ± {arm['high'] - arm['mean']:.3f}"
    return f"{arm['mean']:.3f}{half}"


def draw(result: dict[str, Any], path: str) -> None:
    """Draw means as bars from xz down, seeds as points."""
    with style():
        figure = new_figure(7.2, 2.8)
        axes = figure.subplots()
        draw_bars(axes, result)
        axes.set_title(f"bits per byte on held-out text (lower is better), {len(result['run']['seeds'])} seeds")
    save_png(figure, path)


def draw_bars(axes, result: dict[str, Any]) -> None:
    places = range(len(LABELS))[::-1]
    means = [result["arms"][name]["mean"] for name in LABELS]
    for place, (name, colour) in zip(places, zip(LABELS, COLOURS, strict=False), strict=True):
        arm = result["arms"][name]
        axes.barh(place, arm["mean"], height=0.6, color=colour, alpha=0.85)
        axes.plot(arm["values"], [place] * len(arm["values"]), ".", color=INK, markersize=4)
        place_of = (arm["low"] or arm["mean"], place)
        look = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 8, "color": "#ffffff"}
        axes.annotate(f"{arm['mean']:.3f}", place_of, (-8, 0), **look)
    axes.set_yticks(list(places), list(LABELS.values()))
    lines = ("xz", "gzip -9")
    for name in lines:
        axes.axvline(result["compressors"][name], color=INK, linewidth=0.8, linestyle="--")
        axes.annotate(
            name, (result["compressors"][name], 1), (2, -8), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="bits per byte", xlim=(0, 1.15 * max([*means, *(result["compressors"][n] for n in lines)])))
    axes.grid(visible=False, axis="y")


def compare(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    base = preset()
    names = ("data", "steps", "seq_len", "device", "threads")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    args.out = args.out or ("runs/text-quick" if args.quick else "runs/text")
    args.seeds = (1 if args.quick else 3) if args.seeds is None else args.seeds
    try:
        base = base.replace(**{**(QUICK if args.quick else {}), **given})
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if args.seeds < 1:
        raise TrainingError(f"seeds must be at least 1, got {args.seeds}")
    seeds = list(range(args.seed, args.seed + args.seeds))
    arms = arms_of(base)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in seeds:  # seed by seed: after an interruption the results are still paired
        for name, run in arms.items():
            found[name].append(measured(name, run, seed, Path(args.out)))
    first = found["memory"][0]
    words = ["benchmarks/benchmark_text.py", *(sys.argv[1:] if argv is None else argv)]
    record = run_record(base.to_dict(), seeds, first["device"], first["threads"], words)
    result = {"benchmark": "text", "data": first["data"], **summary(found), "run": record}
    print(f"\n{shown(result)}")
    if args.output_json:
        write_json(args.output_json, result)
    if args.output_png:
        draw(result, args.output_png)


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes are answered before torch is imported
    from titans_pytorch.training.run import one_line

    sys.exit(one_line("benchmark_text.py", compare))
