"""A whole training run: read the settings, train, evaluate, sample, write the record."""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_pytorch.analysis.overshoot import overshoot_note, watch_gains
from titans_pytorch.analysis.storing import page_switches
from titans_pytorch.common.checks import MissingPackage
from titans_pytorch.common.files import parse_json, read_json, replacing, write_json, write_text
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.again import started_as
from titans_pytorch.training.checkpoint import SUMS, WEIGHTS, Saved, read_last, remove, write_sums, write_weights
from titans_pytorch.training.config import RunConfig, from_dict, settings_of
from titans_pytorch.training.device import describe_device, resolve_device
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.folder import claimed, prepare_folder
from titans_pytorch.training.loop import Trainer
from titans_pytorch.training.options import read_arguments, script_options
from titans_pytorch.training.processes import first_process, processes_here
from titans_pytorch.training.start import check_start
from titans_pytorch.training.stopping import Interrupted, on_stop, signal_of, stop_now
from titans_pytorch.training.subjects import Subject
from titans_pytorch.training.text import text_of
from titans_pytorch.training.versions import git_commit, versions

__all__ = ["Run", "TrainProgram", "finished_run", "main", "one_line", "saved_run", "train", "train_claimed"]

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
)  # settings that a resumed run cannot change


@dataclass(frozen=True)
class Run:
    """The arguments of `train`.

    config: every setting.
    out: output folder.
    resume: the checkpoint to continue from; None: a new run.
    command: the command line, for the record.
    """

    config: RunConfig
    out: Path
    resume: Saved | None
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
        default_preset: name of the default preset.
        argv: the command line; None: sys.argv.
        script: the script's path, for the record.
        make_subject: the settings -> the subject to train on; by default text.

    Returns:
        The exit status: 0, 1 after an error in one line, 128 + signal where it was stopped.
    """
    script = script or sys.argv[0]
    arguments = sys.argv[1:] if argv is None else argv

    def start(options: argparse.Namespace) -> RunConfig:
        preset = options.preset or default_preset
        return replace(presets[preset], name=preset)

    def saved_config(options: argparse.Namespace, saved: Saved) -> RunConfig:
        config = from_dict(start(options), saved.state["about"]["config"])
        if options.preset and config.name != options.preset:
            raise TrainingError(f"preset must be {config.name}, that of {saved.path}, got {options.preset!r}")
        return config

    trainer = TrainProgram(
        prog=Path(script).name,
        description=description,
        add_options=partial(script_options, presets=presets),
        start=start,
        resume_from=lambda options: Path(options.out or f"runs/{options.preset or default_preset}"),
        saved_config=saved_config,
        build_model=build_model,
        make_subject=make_subject,
        named={"presets": presets},
        started_as=lambda: started_as(script),
    )
    return one_line(trainer.prog, lambda: trainer.run(arguments, shlex.join(["python", script, *arguments])))


def one_line(name: str, work: Callable[[], Any]) -> int:
    """Do the work and return an exit status: 0, 1 after an error in one line, or 128 + signal. name: the program's
    name, printed before the line.
    """
    try:
        with on_stop(stop_now):
            work()
    except (TrainingError, MissingPackage, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not of_memory(error):
            raise
        print(f"{name}: {in_a_line(error) or 'there is not enough memory'}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        if str(stopped):
            print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt as stop:
        if first_process():
            print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal_of(stop)
    return 0


def of_memory(error: RuntimeError) -> bool:
    """Return whether torch ran out of memory. On a CPU only the message tells."""
    words = ("can't allocate memory", "not enough memory", "calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words)


def in_a_line(error: Exception) -> str:
    """Return the message of an error in one line; for an OSError the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def saved_run(out: Path) -> Saved:
    """Read the last undamaged checkpoint of the run in `out`. TrainingError if there is none."""
    saved = read_last(out / "checkpoints", print if first_process() else lambda line: None)
    if saved is None:
        raise TrainingError(f"{out} has no checkpoint to resume from; leave out --resume to start")
    if not {"config", "fingerprint"} <= saved.state["about"].keys():
        raise TrainingError(f"{saved.path} is no checkpoint of a run: it does not say what was trained")
    return saved


def finished_run(out: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the record of a finished run in `out` with the settings `config`; None if there is none."""
    try:
        result = read_json(out / "result.json")
        return result if result["config"] == parse_json(config.to_json()) else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, incomplete, or of another program
        return None


@dataclass(frozen=True)
class TrainProgram:
    """The parts of a training program in which `titans train` and a script differ.

    prog: its name. description: text for --help. add_options(parser): adds its own options, --out and --resume among
    them. start(options): the configuration of a new run.
    resume_from(options): the folder of the run to continue.
    saved_config(options, saved): the configuration in a checkpoint; ValueError if another program wrote it.
    build_model, make_subject: as in `train`.
    named: how `read_arguments` names settings.
    check(run, out): replaces training under --check, if the program has that option.
    started_as(): returns the command that starts the program again, without its options.
    """

    prog: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    start: Callable[[argparse.Namespace], RunConfig]
    resume_from: Callable[[argparse.Namespace], Path]
    saved_config: Callable[[argparse.Namespace, Saved], RunConfig]
    build_model: BuildModel
    make_subject: MakeSubject
    named: dict[str, Any]
    check: Callable[[RunConfig, Path], None] | None = None
    started_as: Callable[[], str] = started_as

    def run(self, argv: list[str], command: str) -> None:
        """Train as the command line `argv` says. command: for the record."""
        with ExitStack() as claim:
            saved: Saved | None = None

            def begin(options: argparse.Namespace) -> RunConfig:
                nonlocal saved
                if not options.resume:
                    return self.start(options)
                out = self.resume_from(options)
                claim.enter_context(claimed(out))
                saved = saved_run(out)
                return self.config_of(options, saved)

            given = read_arguments(self.prog, self.description, argv, self.add_options, begin, **self.named)
            run, options = given.run, given.options
            if saved is None:
                out = Path(options.out or f"runs/{run.name or 'titans'}")
            else:
                out = self.resume_from(options)
                report_changes(saved.path, self.config_of(options, saved), run)
            if self.check is not None and options.check:
                self.check(run, out)
                return
            if saved is None:
                claim.enter_context(claimed(out))
            try:
                train_claimed(Run(run, out, saved, command), self.build_model, self.make_subject)
            except Interrupted as stopped:
                again = f"{self.started_as()} --out {shlex.quote(str(out))} --resume"
                raise Interrupted(stopped.signum, str(stopped) and f"{stopped}; continue with: {again}") from stopped

    def config_of(self, options: argparse.Namespace, saved: Saved) -> RunConfig:
        """Return the configuration of the checkpoint `saved`. TrainingError if another program wrote it. options: as
        for `start`.
        """
        try:
            return self.saved_config(options, saved)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"{saved.path} is of another configuration: {error}") from error


def report_changes(checkpoint: Path, saved: RunConfig, config: RunConfig) -> None:
    """Raise if a setting differs that the checkpoint depends on; print a line if losses will differ."""
    before, after = settings_of(saved), settings_of(config)
    for name, (group, _, _) in after.items():
        old = getattr(getattr(saved, before[name][0]), name)
        new = getattr(getattr(config, group), name)
        if old == new:
            continue
        if group == "model" or name in FIXED:
            raise TrainingError(f"{name}: {checkpoint} has {old!r}, got {new!r}; start a new run with another --out")
        if group == "training":
            print(f"{name} is {new!r} from here on; until now it was {old!r}")


def train(run: Run, build_model: BuildModel, make_subject: MakeSubject) -> dict[str, Any]:
    """Train, evaluate, sample and write the record; the folder is locked meanwhile.

    Args:
        run: its settings and folder.
        build_model: (the model's settings, device) -> module.
        make_subject: the settings -> the subject to train on.

    Returns:
        The record of the run, as in result.json; empty in all processes but the main one.

    Raises:
        TrainingError: with a message of one line; saved files stay.
    """
    with claimed(run.out):
        return train_claimed(run, build_model, make_subject)


def train_claimed(run: Run, build_model: BuildModel, make_subject: MakeSubject) -> dict[str, Any]:
    """Train as `train` does, for a caller that has locked the folder.

    Args:
        run: its settings and folder.
        build_model: (the model's settings, device) -> module.
        make_subject: the settings -> the subject to train on.

    Returns:
        As `train`.
    """
    config, settings = run.config, run.config.training
    began = time.perf_counter()
    choose_threads(settings.threads, getattr(config.model, "width", None))
    processes = processes_here(check_start(config, run.out))
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
        expected = run.resume.state["about"]["fingerprint"]
        if subject.fingerprint != expected:
            raise TrainingError(
                f"data must be what the run was started on ({expected}), got what has {subject.fingerprint}"
            )
        trainer.resume(run.resume)
        say(f"resuming from step {trainer.progress.step}")
    processes.wait()  # until all have read the checkpoint that the main one will replace
    if not processes.main:
        trainer.fit()
        return {}
    try:
        prepare_folder(run.out, run.resume is not None, say)
        set_aside(run.resume.damaged if run.resume else ())
        write_text(run.out / "config.json", config.to_json())
        trainer.on_step = lambda step: subject.on_step(model, step, device, trainer.autocast)
        fit(run, trainer)
        result = concluded(run, trainer)
        result |= {"parameters": parameters, "total_seconds": round(time.perf_counter() - began, 1)}
        write_json(run.out / "result.json", result)
        holds = ", ".join(("the weights", "result.json", *result["pictures"]))
        say(f"total {result['total_seconds']:.0f} s; {run.out}/ holds {holds}")
        return result
    except OSError as error:
        raise TrainingError(f"{run.out}: {error.strerror or error}; {trainer.kept()}") from error


def set_aside(damaged: tuple[Path, ...]) -> None:
    """Rename damaged checkpoints, so that new ones of their steps can be written."""
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        remove(aside)
        os.replace(path, aside)


def fit(run: Run, trainer: Trainer) -> None:
    """Train. A run that ends early also leaves its loss curve."""
    try:
        trainer.fit()
    except (TrainingError, Interrupted):
        with contextlib.suppress(OSError, TrainingError):
            trainer.subject.draw(run.out, {})
        raise


def concluded(run: Run, trainer: Trainer) -> dict[str, Any]:
    """Call `conclude`; its errors also name the last checkpoint."""
    try:
        return conclude(run, trainer)
    except KeyboardInterrupt as stop:
        raise Interrupted(signal_of(stop), f"stopped in the final measurements; {trainer.kept()}") from stop
    except TrainingError as error:
        raise type(error)(f"{error}; {trainer.kept()}") from error


def conclude(run: Run, trainer: Trainer) -> dict[str, Any]:
    """Take the final measurements, write the weights and the loss curve, and return the record of the run. Diverged if
    a measurement is not finite.
    """
    switches = page_switches(trainer.model)
    with replacing(run.out / WEIGHTS) as part, watch_gains(trainer.model) as gains:
        write_weights(trainer.model, part)  # counted before the measurements below, which also switch pages
        found = trainer.subject.conclude(trainer.model, run.out, trainer.device, trainer.autocast)
        for name, value in numbers_in(found):
            if not math.isfinite(value):
                raise Diverged(f"the final measurements are not finite: {name} is {value}")
        remove(run.out / SUMS)  # an older file would not belong to these weights
    write_sums(run.out, (WEIGHTS,))
    if note := overshoot_note(gains):
        print(note)
    pictures = trainer.subject.draw(run.out, found)
    if not pictures:
        print("matplotlib is not installed: nothing was drawn")
    return found | {
        "pictures": pictures,
        "training_seconds": round(trainer.progress.seconds, 1),
        "steps": trainer.progress.step,
        "memory_gains": gains.finite(),
        "page_switches": switches,
        f"trained_on_{trainer.subject.counted}": tokens_seen(trainer),
        "seed": run.config.training.seed,
        "processes": trainer.processes.count,
        "command": run.command,
        "config": run.config.to_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        **describe_device(trainer.device),
    }


def numbers_in(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, number) for every number in nested mappings and lists."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from numbers_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, (list, tuple)):
        for i, value in enumerate(found):
            yield from numbers_in(value, f"{name}[{i}]")
    elif isinstance(found, float):
        yield name, found


def tokens_seen(trainer: Trainer) -> int:
    size = trainer.config.batch_size
    return sum(trainer.subject.tokens(at, size) for at in range(0, trainer.progress.position, size))
