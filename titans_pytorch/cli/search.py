"""titans search: train every combination of some settings, choose the best, and train it again on other seeds."""

import itertools
import math
import shutil
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from titans_pytorch.cli.commands import SEARCH, search_options
from titans_pytorch.cli.settings import NAMED, listed, replaced, start_of
from titans_pytorch.common.files import write_json
from titans_pytorch.models.runs import model_of
from titans_pytorch.tasks.subject import checked_task, subject_of
from titans_pytorch.training.checkpoint import Saved, read_last
from titans_pytorch.training.config import RunConfig, TaskConfig
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.folder import claimed
from titans_pytorch.training.options import option_for, read_arguments
from titans_pytorch.training.run import Run, finished_run, train_claimed
from titans_pytorch.training.start import check_start
from titans_pytorch.training.stopping import Interrupted

__all__ = ["search_command"]

LOWER_IS_BETTER = ("held_out_bits_per_byte", "loss")


def search_command(argv: list[str]) -> None:
    given = read_arguments("titans search", SEARCH, argv, search_options, start_of, **NAMED)
    options, out = given.options, Path(given.options.out or "runs/search")
    if not options.grid:
        raise TrainingError("grid: give one or more --grid NAME=VALUE,VALUE,...")
    points = combinations(given.run, options.grid)
    seeds, report = options.seeds or (0,), options.report_seeds or (100,)
    if shared := set(seeds) & set(report):
        raise TrainingError(f"report_seeds must be others than the seeds to choose by, got {min(shared)}")
    for values, seed in itertools.product(points, (*seeds, *report)):
        run = replaced_or_error(given.run, {**values, "seed": seed})
        check_start(run, out)
        checked_task(run)
    with claimed(out):
        try:
            searched(given.run, points, seeds, report, out)
        except Interrupted as stopped:
            message = f"{stopped}; the same command goes on from there"
            raise Interrupted(stopped.signum, str(stopped) and message) from stopped


def searched(run: RunConfig, points: list[dict[str, Any]], seeds: tuple, report: tuple, out: Path) -> None:
    """Trains what is not yet in `out`, writes and shows what was found. TrainingError where every point diverged."""
    lower = not isinstance(run.data, TaskConfig)
    tried = []
    for number, values in enumerate(points):
        tried.append(point(run, values, seeds, out, f"{number:03d}"))
        print(f"{number + 1}/{len(points)}: {named(values)}: {shown(tried[-1])}")
    tried.sort(key=lambda one: math.inf if one["mean"] is None else one["mean"] * (1 if lower else -1))
    best = tried[0]
    if best["mean"] is None:
        raise TrainingError(f"grid: every run diverged; {named(best['settings'])}: {best['diverged']}")
    found = point(run, best["settings"], report, out, "best")
    metric = "held_out_bits_per_byte" if lower else "accuracy"
    of_best = {name: value for name, value in found.items() if name != "settings"}
    write_json(
        out / "search.json", {"metric": metric, "seeds": seeds, "tried": tried, "report_seeds": report, **of_best}
    )
    print(f"\n{metric}, best first")
    for one in tried:
        print(f"  {shown(one)}  {named(one['settings'])}")
    if found["mean"] is None:
        raise TrainingError(f"best: {named(best['settings'])}: {shown(found)}; {out}/search.json")
    print(f"best: {named(best['settings'])}: {shown(found)} on {len(report)} other seed(s); {out}/search.json")


def point(run: RunConfig, values: dict[str, Any], seeds: tuple, out: Path, name: str) -> dict[str, Any]:
    """The scores of some settings, one for each seed, and their mean; no mean, and why, where a run diverged."""
    try:
        scores = [score(run, values, seed, out / f"{name}-seed{seed}") for seed in seeds]
    except Diverged as error:
        return {"settings": values, "scores": [], "mean": None, "diverged": str(error)}
    return {"settings": values, "scores": scores, "mean": sum(scores) / len(scores)}


def shown(one: dict[str, Any]) -> str:
    return f"diverged ({one['diverged']})" if one["mean"] is None else f"{one['mean']:.4f}"


def combinations(run: RunConfig, grid: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """Every combination of the values, each read as its setting's type and checked at once."""
    types = {name: hint for name, (_, _, hint, _) in listed(run).items()}
    axes = []
    for name, texts in grid:
        if name not in types:
            replaced_or_error(run, {name: None})
        axes.append([(name, read_value(name, text, types[name])) for text in texts])
    points = [dict(point) for point in itertools.product(*axes)]
    for point in points:
        replaced_or_error(run, point)
    return points


def read_value(name: str, text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise TrainingError(f"grid: {name} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return option_for(hint).get("type", str)(text)
    except ArgumentTypeError as error:
        raise TrainingError(f"grid: {name} {error}") from error


def replaced_or_error(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    try:
        return replaced(run, values)
    except ValueError as error:
        raise TrainingError(f"grid: {error}") from error


def score(run: RunConfig, values: dict[str, Any], seed: int, out: Path) -> float:
    """The score of a training run; an earlier run here with the same settings is used or continued. A run that
    diverges leaves no folder.
    """
    run = replaced_or_error(run, {**values, "seed": seed})
    with claimed(out):
        result = finished_run(out, run)
        if result is None:
            try:
                result = train_claimed(Run(run, out, unfinished(out, run), "titans search"), model_of, subject_of)
            except Diverged:
                shutil.rmtree(out, ignore_errors=True)
                raise
    return result["held_out_bits_per_byte"] if "scores" not in result else result["scores"][-1]["accuracy"]


def unfinished(out: Path, run: RunConfig) -> Saved | None:
    """The checkpoint of a search's run that was stopped. A run of other settings is removed: it has no result."""
    if not out.is_dir() or (out / "result.json").exists():
        return None
    try:
        saved = read_last(out / "checkpoints")
    except TrainingError:
        saved = None
    if saved is not None and saved.state["about"].get("config") == run.to_dict():
        return saved
    if (out / "config.json").is_file():
        print(f"{out} held an unfinished run, which is removed")
        shutil.rmtree(out)
    return None


def named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
