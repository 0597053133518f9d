"""What a training script calls: reads the settings, trains, evaluates, compares, samples, and writes it all down."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_pytorch.training.checkpoint import last_checkpoint, read_training, save_weights
from titans_pytorch.training.config import RunConfig, from_dict, settings_of, updated
from titans_pytorch.training.data import ByteData, load_data
from titans_pytorch.training.device import describe_device, resolve_device
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.evaluate import bits_per_byte, compressors, sample_text
from titans_pytorch.training.folder import claim_folder, write_text
from titans_pytorch.training.loop import Interrupted, Trainer
from titans_pytorch.training.options import parse_options
from titans_pytorch.training.plots import draw_loss_curve

__all__ = ["main"]

BuildModel = Callable[[Any, torch.device], nn.Module]
FIXED = (
    "seq_len",
    "batch_size",
    "grad_accum",
    "optimizer",
    "seed",
    "data_limit",
    "held_out",
)  # what a resumed run cannot change


@dataclass(frozen=True)
class Run:
    config: RunConfig
    out: Path
    resume: bool
    command: str


def main(
    presets: dict[str, RunConfig],
    build_model: BuildModel,
    description: str,
    *,
    default_preset: str,
    argv: list[str] | None = None,
    script: str | None = None,
) -> int:
    """Runs a script and returns its exit status: 0, 1 after an error in one line, 128 + signal where it was stopped."""
    script = script or sys.argv[0]
    name = Path(script).name
    arguments = sys.argv[1:] if argv is None else argv
    try:
        general, given = parse_options(presets, description, arguments, prog=name)
        command = shlex.join(["python", script, *arguments])
        train(configure(presets, general, given, default_preset, command), build_model)
    except (TrainingError, OSError, torch.OutOfMemoryError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        print(f"{name}: {stopped}; continue with --resume", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def configure(
    presets: dict[str, RunConfig], general: dict[str, Any], given: dict[str, Any], default_preset: str, command: str
) -> Run:
    preset = general.get("preset", default_preset)
    out = Path(general.get("out", f"runs/{preset}"))
    base = replace(presets[preset], preset=preset)
    if not general.get("resume"):
        return Run(updated(base, given), out, False, command)
    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint is None:
        raise TrainingError(f"{out} has no checkpoint to resume from")
    about = read_training(checkpoint)["about"]
    try:
        saved = from_dict(base, about["config"])
    except (ValueError, KeyError) as error:
        raise TrainingError(f"{checkpoint} is of another configuration: {error}") from error
    if "preset" in general and saved.preset != preset:
        raise TrainingError(f"preset: {checkpoint} is of {saved.preset!r}, got {preset!r}")
    config = updated(saved, given)
    report_changes(checkpoint, saved, config)
    return Run(config, out, True, command)


def report_changes(checkpoint: Path, saved: RunConfig, config: RunConfig) -> None:
    """Raises where a setting differs that the checkpoint depends on; says so where the losses will differ."""
    before, after = settings_of(saved), settings_of(config)
    for name, (group, _, _) in after.items():
        old = getattr(getattr(saved, before[name][0]), name)
        new = getattr(getattr(config, group), name)
        if old == new:
            continue
        if group == "model" or name in FIXED:
            raise TrainingError(f"{name}: {checkpoint} has {old!r}, got {new!r}; start a new run with another --out")
        if group == "train":
            print(f"{name} is {new!r} from here on; until now it was {old!r}")


def train(run: Run, build_model: BuildModel) -> None:
    config, settings = run.config, run.config.train
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = resolve_device(settings.device)
    data = load_data(config.data)
    torch.manual_seed(settings.seed)
    model = build_model(config.model, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"data: {data.name}, {len(data.train):,} bytes to train on, {len(data.held_out):,} held out")
    print(f"model: {parameters:,} parameters on {device}, {torch.get_num_threads()} CPU threads; writing to {run.out}")

    about = {"config": config.to_dict(), "data_sha256": data.sha256}
    trainer = Trainer(model, data, settings, run.out, device=device, about=about)
    if run.resume:
        check_data(run, data)
        trainer.resume()
        print(f"resuming from step {trainer.progress.step}")
    try:
        with claim_folder(run.out, run.resume):
            write_text(run.out / "config.json", config.to_json())
            trainer.on_step = lambda step: show_sample(trainer, config, step)
            try:
                trainer.fit()
            except (TrainingError, Interrupted):
                with contextlib.suppress(OSError):
                    draw(run, {})
                raise
            result = conclude(run, trainer, data)
            result |= {"parameters": parameters, "total_seconds": round(time.perf_counter() - began, 1)}
            write_text(run.out / "result.json", json.dumps(result, indent=2) + "\n")
            print(
                f"total {result['total_seconds']:.0f} s; {run.out}/ holds the weights, result.json and the loss curve"
            )
    except OSError as error:
        raise TrainingError(f"{run.out}: {error.strerror or error}; {trainer.kept()}") from error


def check_data(run: Run, data: ByteData) -> None:
    checkpoint = last_checkpoint(run.out / "checkpoints")
    expected = read_training(checkpoint)["about"]["data_sha256"]
    if data.sha256 != expected:
        raise TrainingError(f"data: {data.name} has sha256 {data.sha256}, the run was started on {expected}")


def show_sample(trainer: Trainer, config: RunConfig, step: int) -> None:
    every = config.report.sample_every
    if every and step % every == 0 and step < config.train.steps:
        print(f"\n{sample(trainer, config)[1]}\n")


def sample(trainer: Trainer, config: RunConfig) -> tuple[str, str]:
    report = config.report
    return sample_text(
        trainer.model,
        trainer.data.held_out[: report.prime_len],
        report.sample_len,
        temperature=report.temperature,
        seed=config.train.seed + trainer.progress.step,
        device=trainer.device,
        autocast=trainer.autocast,
    )


def conclude(run: Run, trainer: Trainer, data: ByteData) -> dict[str, Any]:
    """The final evaluation, printed and returned."""
    config, report = run.config, run.config.report
    save_weights(trainer.model, run.out / "model.safetensors")
    context = config.train.seq_len
    began = time.perf_counter()
    bits = bits_per_byte(
        trainer.model,
        data.held_out,
        context=context,
        stride=report.eval_stride or max(1, context // 2),
        batch_size=report.eval_batch_size,
        device=trainer.device,
        autocast=trainer.autocast,
        progress=True,
    )
    seconds = time.perf_counter() - began
    others = compressors(data.held_out)
    print(f"\nbits per byte on all {len(data.held_out):,} held-out bytes, each counted once")
    for name, value in {"this model": bits, **others}.items():
        print(f"  {name:<16} {value:.3f}")
    print("  (the model has learned from the other part of the data; gzip and xz see the held-out bytes alone)")
    draw(run, {name: value for name, value in others.items() if name != "order-0 entropy"})
    prime, written = sample(trainer, config)
    print(f"\nsampled text, after {prime[-60:]!r}:\n{written}\n")
    write_text(run.out / "sample.txt", f"{prime}\n--- written by the model ---\n{written}\n")
    return {
        "held_out_bits_per_byte": bits,
        "compared_with": others,
        "evaluation_seconds": round(seconds, 1),
        "training_seconds": round(trainer.progress.seconds, 1),
        "steps": trainer.progress.step,
        "trained_on_bytes": trainer.progress.position * config.train.seq_len,
        "data": data.describe(),
        "seed": config.train.seed,
        "command": run.command,
        "config": config.to_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        **describe_device(trainer.device),
    }


def draw(run: Run, levels: dict[str, float]) -> None:
    if not draw_loss_curve(run.out / "metrics.jsonl", run.out / "loss.png", str(run.out), levels):
        print("matplotlib is not installed: no loss curve drawn")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["titans-pytorch"] = importlib.metadata.version("titans-pytorch")
    except importlib.metadata.PackageNotFoundError:
        found["titans-pytorch"] = None
    return found


def git_commit() -> str | None:
    """Of this package's checkout, with '+' where files differ from it; None outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
