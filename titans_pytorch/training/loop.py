"""The training loop: any module with `model(ids)` and `model(ids, return_loss=True)`, any subject (text, a task).

A run continued from a checkpoint repeats exactly the losses of an uninterrupted one (same machine, torch and threads):
the order of the data and the learning rate are functions of the position and the step, the checkpoint holds the rest.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch.analysis.diagnosis import diagnose
from titans_pytorch.analysis.storing import page_switches
from titans_pytorch.training.checkpoint import Progress, Saved, load_checkpoint, read_last, save_checkpoint
from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.device import autocast_for
from titans_pytorch.training.errors import Diverged, TrainingError
from titans_pytorch.training.metrics import MetricsLog, RunningMean
from titans_pytorch.training.optim import build_optimizer, learning_rate, set_learning_rate
from titans_pytorch.training.processes import Alone
from titans_pytorch.training.rows import Rows, answers_in, loss_on
from titans_pytorch.training.stages import Stages
from titans_pytorch.training.stopping import Interrupted, on_stop
from titans_pytorch.training.subjects import Subject

__all__ = ["Trainer"]


class Trainer:
    """Trains a model on a subject, with metrics and checkpoints. Of several processes the main one writes, measures
    and samples.

    Args:
        model: called as `model(ids)` and `model(ids, return_loss=True)`.
        subject: its training data and measurements.
        config: a TrainConfig.
        out: output folder.
        device: device of the model.
        about: stored in every checkpoint.
        on_step: called as `on_step(step)` after every step (to sample text, say); it must leave the random number
            generators as they were.
        processes: of `processes_here`; None: this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        subject: Subject,
        config: TrainConfig,
        out: Path,
        *,
        device: torch.device,
        about: dict[str, Any] | None = None,
        on_step: Callable[[int], None] = lambda step: None,
        processes: Alone | None = None,
    ):
        self.model, self.subject, self.config, self.out, self.device = model, subject, config, out, device
        self.processes = processes or Alone()
        self.processes.share(config.batch_size)
        self.about, self.on_step = about or {}, on_step
        self.autocast = autocast_for(device, config)
        self.optimizer = build_optimizer(model, config)
        self.stages = Stages(model, config)
        self.called = model  # wrapped for several processes
        self.progress = Progress()
        self.shown_loss, self.shown = RunningMean(), 0.0  # of one step the loss depends on its rows
        self.saved_step: int | None = None
        self.resumed = False

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.out / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics, a line of JSON for each step."""
        return self.out / "metrics.jsonl"

    def resume(self, saved: Saved | None = None) -> None:
        """Continue from the checkpoint `saved`, by default the last undamaged one under `out`."""
        saved = saved or read_last(self.checkpoints)
        if saved is None:
            raise TrainingError(f"{self.out} has no checkpoint to resume from")
        self.progress = load_checkpoint(saved, self.model, self.optimizer)
        self.saved_step = self.progress.step
        self.resumed = True

    def fit(self) -> Progress:
        """Train to the last step. Raises TrainingError (the last checkpoint stays) or Interrupted (after saving)."""
        if not self.processes.main:
            self.run(None)
            return self.progress
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            log = MetricsLog(self.metrics, self.progress.step if self.resumed else None)
            try:
                self.run(log)
            finally:
                log.close()
        except OSError as error:
            raise TrainingError(
                f"step {self.progress.step}: {self.out}: {error.strerror or error}; {self.kept()}"
            ) from error
        return self.progress

    def run(self, log: MetricsLog | None) -> None:
        """Train from the current step to the last. log: None in all processes but the main one."""
        progress, config = self.progress, self.config
        self.model.train()
        self.save()  # a full disk is noticed before any work is lost, and a run can be resumed from its first step
        silent = None if log else True
        bar = tqdm(total=config.steps, initial=progress.step, unit="step", disable=silent, dynamic_ncols=True)
        try:
            with bar, stop_requests() as stop:
                while progress.step < config.steps:
                    if self.stages.enter(progress.step):
                        self.called = self.processes.wrap(self.model)
                    record = self.step()
                    if log:
                        log.write(record)
                        self.report(record, bar, log)
                    asked = self.processes.any(bool(stop))
                    if progress.step == config.steps or asked or due(progress.step, config.checkpoint_every):
                        self.save()
                    if asked:
                        message = f"stopped at step {progress.step} of {config.steps}; {self.kept()}"
                        # one line for all processes
                        raise Interrupted(stop[0] if stop else signal.SIGTERM, message if self.processes.main else "")
        finally:
            self.stages.leave()
            self.called = self.model

    def report(self, record: dict[str, Any], bar: tqdm, log: MetricsLog) -> None:
        """Log, validate and call `on_step` after a step, in the main process. record: of the step; bar,
        log: where it is shown and written.
        """
        config, step = self.config, self.progress.step
        bar.update()
        self.shown = self.shown_loss.add(record["loss"]) / math.log(2)
        bar.set_postfix_str(f"{self.shown:.3f} bits/{self.subject.unit}, {record['tokens_per_second']:.0f} tokens/s")
        try:
            if config.validate_every and (due(step, config.validate_every) or step == config.steps):
                log.write(self.validate(bar))
            self.on_step(step)
        except Diverged as error:
            raise Diverged(f"step {step}: {error}; {self.kept()}") from error

    def step(self) -> dict[str, Any]:
        """Take one optimizer step over `grad_accum` batches; return its record."""
        config, progress, processes = self.config, self.progress, self.processes
        began = time.perf_counter()
        lr = learning_rate(progress.step, config)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        first, rows = processes.share(config.batch_size)
        tokens, taken, random = 0, [], random_state(self.device)
        for i in range(config.grad_accum):
            try:
                batch = self.subject.batch(progress.position + first, rows)
            except TrainingError as error:
                raise TrainingError(f"step {progress.step + 1}: {error}; {self.kept()}") from error
            answers = float(processes.mean(torch.tensor(float(answers_in(batch)), device=self.device)))
            taken.append((batch, answers))
            last = i == config.grad_accum - 1
            with nullcontext() if last else processes.accumulating(self.called):
                with self.autocast():
                    loss = loss_on(self.called, batch.to(self.device), answers)
                (loss / config.grad_accum).backward()
            total += loss.detach().float() / config.grad_accum
            tokens += self.subject.tokens(progress.position, config.batch_size)
            progress.position += config.batch_size
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        mean = float(processes.mean(total))
        for name, value in (("loss", mean), ("gradient norm", float(norm))):
            if not math.isfinite(value):
                found = f"step {progress.step + 1}: the {name} is {value}; {self.kept()}"
                raise Diverged(found + self.cause(taken, random))
        self.optimizer.step()
        progress.step += 1
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        record = {
            "step": progress.step,
            "loss": mean,
            "grad_norm": float(norm),
            "lr": lr,
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(progress.seconds, 3),
        }
        return record | {"stage": self.stages.now} if config.core_steps else record

    def validate(self, bar: tqdm) -> dict[str, Any]:
        """Measure on held-out rows, and show the result on the `bar` beside the running mean of the training loss."""
        found = self.subject.measure(self.model, self.device, self.autocast)
        for name, value in found.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value}")
        steps = self.config.steps
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        if switches := page_switches(self.model):
            shown += f", page switches {list(switches.values())}"
        where = f"step {self.progress.step:>{len(str(steps))}}/{steps}"
        bar.write(
            f"{where}: training {self.shown:.3f} bits per {self.subject.unit}, {shown}, {self.progress.seconds:.0f} s"
        )
        return {"step": self.progress.step, **found} | ({"page_switches": switches} if switches else {})

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_step != self.progress.step and self.processes.main:
            try:
                save_checkpoint(self.checkpoints, self.model, self.optimizer, self.progress, self.about)
            except Diverged as error:
                raise Diverged(f"step {self.progress.step}: {error}; {self.kept()}") from error
            self.saved_step = self.progress.step

    def cause(self, taken: list[tuple[Tensor | Rows, float]], random: list[Tensor]) -> str:
        """Repeat the passes of a step and say where the first value appeared that is not finite, as a further part of
        a message. taken: its micro-batches, each with its number of answers; random: `random_state` before the step.
        """
        set_random_state(self.device, random)

        def loss_of(batch: Tensor | Rows, answers: float) -> Tensor:
            with self.autocast():
                return loss_on(self.model, batch.to(self.device), answers)

        for number, (batch, answers) in enumerate(taken, start=1):
            found = diagnose(self.model, partial(loss_of, batch, answers))
            if not found.finite:
                where = f"micro-batch {number} of {len(taken)}: " if len(taken) > 1 else ""
                return f"; {where}{found}"
        return "; repeated, every value is finite"

    def kept(self) -> str:
        """Describe the last checkpoint, for a message."""
        if self.saved_step is None:
            return "no checkpoint was written"
        return f"the checkpoint of step {self.saved_step} is kept in {self.checkpoints}"


def random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the random number generators that a pass on the device uses."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Restore the states that `random_state` returned for the `device`."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Within this context, SIGINT and SIGTERM are added to a list; a second SIGINT ends the process at once."""
    asked: list[int] = []
    with on_stop(asked.append):
        yield asked
