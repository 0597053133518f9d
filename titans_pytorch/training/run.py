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

from titans_pytorch.checks import MissingPackage
from titans_pytorch.overshoot import overshoot_note, watch_gains
from titans_pytorch.storing import page_switches
from titans_pytorch.training.checkpoint import last_checkpoint, read_training, save_weights
from titans_pytorch.training.config import RunConfig, from_dict, settings_of, updated
from titans_pytorch.training.device import describe_device, resolve_device
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.folder import claim_folder, write_text
from titans_pytorch.training.loop import Interrupted, Trainer
from titans_pytorch.training.options import parse_options
from titans_pytorch.training.plots import draw_loss_curve
from titans_pytorch.training.processes import processes_here
from titans_pytorch.training.subjects import Subject
from titans_pytorch.training.text import text_of

__all__ = ["Run", "main", "one_line", "train"]

BuildModel = Callable[[Any, torch.device], nn.Module]
MakeSubject = Callable[[RunConfig], Subject]
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
    """What `train` is called with.

    config: every setting.
    out: the folder that is written to.
    resume: go on from its last checkpoint.
    command: the command line, for the record.
    """

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
    make_subject: MakeSubject = text_of,
) -> int:
    """A whole training script.

    Args:
        presets: name -> settings to start from.
        build_model: (the model's settings, device) -> module, called as `model(ids)` and `model(ids,
            return_loss=True)`.
        description: for --help.
        default_preset: its name.
        argv: the command line; None: sys.argv.
        script: the script's path, for the record.
        make_subject: the settings -> what is trained on; by default text.

    Returns:
        The exit status: 0, 1 after an error in one line, 128 + signal where it was stopped.
    """
    script = script or sys.argv[0]
    name = Path(script).name
    arguments = sys.argv[1:] if argv is None else argv

    def whole() -> None:
        general, given = parse_options(presets, description, arguments, prog=name)
        command = shlex.join(["python", script, *arguments])
        train(configure(presets, general, given, default_preset, command), build_model, make_subject)

    return one_line(name, whole)


def one_line(name: str, work: Callable[[], Any]) -> int:
    """Does the work and returns an exit status: 0, or 1 after an error in one line, or 128 + signal. name: of the
    program, before the line.
    """
    try:
        work()
    except (TrainingError, MissingPackage, OSError, torch.OutOfMemoryError) as error:
        print(f"{name}: {in_a_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        print(f"{name}: {stopped}; continue with --resume", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def in_a_line(error: Exception) -> str:
    """What an error says; of one of the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return " ".join(str(error).split())


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


def train(run: Run, build_model: BuildModel, make_subject: MakeSubject) -> dict[str, Any]:
    """A whole run: trains, evaluates, samples, and writes it all down.

    Args:
        run: its settings and folder.
        build_model: (the model's settings, device) -> module.
        make_subject: the settings -> what is trained on.

    Returns:
        The record of the run, as in result.json; empty in all processes but the main one.

    Raises:
        TrainingError: in one line; what was saved stays.
    """
    config, settings = run.config, run.config.train
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = processes_here(resolve_device(settings.device))
    device = processes.device or resolve_device(settings.device)
    say = print if processes.main else lambda line: None
    subject = make_subject(config)
    torch.manual_seed(settings.seed)
    model = build_model(config.model, device)
    parameters = sum(p.numel() for p in model.parameters())
    say(subject.introduce())
    where = f"{device}" if processes.count == 1 else f"{processes.count} processes on {device}"
    say(f"model: {parameters:,} parameters on {where}, {torch.get_num_threads()} CPU threads; writing to {run.out}")

    about = {"config": config.to_dict(), "fingerprint": subject.fingerprint}
    trainer = Trainer(model, subject, settings, run.out, device=device, about=about, processes=processes)
    if run.resume:
        check_subject(run, subject)
        trainer.resume()
        say(f"resuming from step {trainer.progress.step}")
    processes.wait()  # for all to have read the checkpoint that the main one will replace
    if not processes.main:
        trainer.fit()
        return {}
    try:
        with claim_folder(run.out, run.resume):
            write_text(run.out / "config.json", config.to_json())
            trainer.on_step = lambda step: subject.on_step(model, step, device, trainer.autocast)
            try:
                trainer.fit()
            except (TrainingError, Interrupted):
                with contextlib.suppress(OSError):
                    draw(run, {})
                raise
            result = conclude(run, trainer)
            result |= {"parameters": parameters, "total_seconds": round(time.perf_counter() - began, 1)}
            write_text(run.out / "result.json", json.dumps(result, indent=2) + "\n")
            say(f"total {result['total_seconds']:.0f} s; {run.out}/ holds the weights, result.json and the loss curve")
            return result
    except OSError as error:
        raise TrainingError(f"{run.out}: {error.strerror or error}; {trainer.kept()}") from error


def check_subject(run: Run, subject: Subject) -> None:
    checkpoint = last_checkpoint(run.out / "checkpoints")
    expected = read_training(checkpoint)["about"]["fingerprint"]
    if subject.fingerprint != expected:
        raise TrainingError(
            f"data must be what the run was started on ({expected}), got what has {subject.fingerprint}"
        )


def conclude(run: Run, trainer: Trainer) -> dict[str, Any]:
    """The weights, the final measurements, the loss curve; returns the record of the run."""
    save_weights(trainer.model, run.out / "model.safetensors")
    switches = page_switches(trainer.model)
    with watch_gains(trainer.model) as gains:
        found = trainer.subject.conclude(trainer.model, run.out, trainer.device, trainer.autocast)
    if note := overshoot_note(gains):
        print(note)
    draw(run, trainer.subject.levels(found))
    return found | {
        "training_seconds": round(trainer.progress.seconds, 1),
        "steps": trainer.progress.step,
        "memory_gains": gains,
        "page_switches": switches,
        f"trained_on_{trainer.subject.counted}": tokens_seen(trainer),
        "seed": run.config.train.seed,
        "processes": trainer.processes.count,
        "command": run.command,
        "config": run.config.to_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        **describe_device(trainer.device),
    }


def tokens_seen(trainer: Trainer) -> int:
    size = trainer.config.batch_size
    return sum(trainer.subject.tokens(at, size) for at in range(0, trainer.progress.position, size))


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
