"""Measures a case: gate, then memory in fresh processes, then times, the arms taking turns so that a noisy machine hits
all of them. A failure is a result, too: {"status": "out of memory", "message": ...} in place of {"status": "ok", ...}.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.environment import REPOSITORY
from harness.workers import Budget, Worker, WorkerFailure

from .cases import Case, as_attention, operations, operations_by_form

WORKER = Path(__file__).resolve().parents[1] / "speed_worker.py"
MATMUL_SIDE = 2048
# Rounding alone: ten times or more what two plain implementations differ by. Spectral norm amplifies it. The residual
# streams compute in float32 whatever they are given, so that a transformer in float64 rounds as in float32.
FLOAT64 = {"output": 1e-8, "gradient": 1e-7}
FLOAT32 = {"output": 1e-5, "gradient": 1e-4}
FLOAT32_SPECTRAL = {"output": 2e-4, "gradient": 1e-3}


@dataclass(frozen=True)
class Options:
    """Options of a measurement. timeout: seconds that an arm may take for one case; min_seconds: shortest time of one
    repeat, filled with further calls; memory_limit: bytes that an arm may ask for."""

    setup: Mapping[str, Any]
    threads: int | None = None
    repeats: int = 5
    timeout: float = 600.0
    min_seconds: float = 0.2
    memory_limit: int | None = None
    quantities: tuple[str, ...] = ("forward", "train", "memory", "decode")


@dataclass
class Arm:
    """name: "ours", "peer" or "attention"; python: the interpreter of its environment."""

    name: str
    python: str
    description: dict[str, Any] = field(default_factory=dict)

    def worker(self, threads: int | None) -> Worker:
        hidden = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME"}
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        if self.name != "peer":
            env["PYTHONPATH"] = str(REPOSITORY)
        if threads is not None:
            env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        return Worker([self.python, str(WORKER)], env=env, cwd=tempfile.gettempdir())


class Measurement:
    """One arm at one case: its process, started when needed and again after a failure, and the time it has left."""

    def __init__(self, arm: Arm, case: Case, options: Options):
        self.arm, self.options = arm, options
        self.case = as_attention(case) if arm.name == "attention" else case
        self.setup = dict(options.setup)
        if arm.name == "peer":
            self.setup["engine"] = None
        self.budget = Budget(options.timeout)
        self.worker: Worker | None = None

    def start(self) -> None:
        self.close()
        self.worker = self.arm.worker(self.options.threads)
        limits = {"threads": self.options.threads, "memory_limit": self.options.memory_limit}
        request = {"do": "start", "case": self.case.as_dict(), "setup": self.setup, **limits}
        self.arm.description = self.budget.ask(self.worker, request)

    def ask(self, do: str, **fields) -> Any:
        if self.worker is None or not self.worker.alive:
            self.start()
        return self.budget.ask(self.worker, {"do": do, **fields})

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def describe(arm: Arm, case: Case, options: Options) -> None:
    """Start the arm once and fill its description; WorkerFailure if its environment is unusable."""
    with Measurement(arm, case, options) as measurement:
        measurement.start()


def measure_case(
    case: Case, arms: list[Arm], options: Options, step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure one case. `step` is called with the next step, at most `steps(case, arms, options)` times."""
    measurements = {arm.name: Measurement(arm, case, options) for arm in arms}
    quantities = [q for q in options.quantities if q in case.quantities]
    try:
        step("gate")
        gate = gate_case(case, measurements)
        refused = refusals(gate)
        results = {name: {q: refused[name] for q in quantities if name in refused} for name in measurements}
        running = {name: m for name, m in measurements.items() if name not in refused}
        if "memory" in quantities:
            for name, m in running.items():
                step(f"{name} memory")
                m.close()  # measured in a process that has done nothing yet
                results[name]["memory"] = attempt(lambda m=m: {"status": "ok", **m.ask("memory")})
        rates = [matmul_rate(measurements["ours"], step)]
        for quantity in (q for q in quantities if q != "memory"):
            time_quantity(quantity, running, results, options.repeats, step)
        rates.append(matmul_rate(measurements["ours"], step))
        engines = attempt(lambda: {"status": "ok", "names": measurements["ours"].ask("engines")})
    finally:
        for m in measurements.values():
            m.close()
    return {
        "name": case.name,
        "title": case.title,
        "case": case.as_dict(),
        "gate": gate,
        "engines": engines.get("names"),
        "arms": results,
        "matmul_operations_per_second": max((rate for rate in rates if rate is not None), default=None),
        "operations": operations(case),
        "store_and_read_by_form": operations_by_form(case),
    }


def steps(case: Case, arms: list[Arm], options: Options) -> int:
    timed = sum(q in case.quantities and q != "memory" for q in options.quantities)
    memory = "memory" in options.quantities and "memory" in case.quantities
    return 3 + len(arms) * (memory + timed * (1 + options.repeats))


def matmul_rate(ours: Measurement, step: Callable[[str], None]) -> float | None:
    step("matrix product rate")
    return attempt(lambda: {"status": "ok", "rate": ours.ask("matmul", side=MATMUL_SIDE)}).get("rate")


class Clock:
    """An arm's calls of one quantity. After a failure no more calls are made; earlier times stay."""

    def __init__(self, measurement: Measurement, quantity: str, failure: dict[str, Any] | None = None):
        self.measurement, self.quantity, self.failure = measurement, quantity, failure
        self.calls: list[float] = []
        self.tokens: int | None = None

    def prepare(self) -> None:
        self._ask("prepare", what=self.quantity)

    def repeat(self) -> None:
        timed = self._ask("time", what=self.quantity, min_seconds=self.measurement.options.min_seconds)
        if timed is not None:
            self.calls += timed["calls"]
            self.tokens = timed["tokens"]

    def _ask(self, do: str, **fields) -> Any:
        if self.failure is not None:
            return None
        try:
            return self.measurement.ask(do, **fields)
        except WorkerFailure as failure:
            self.failure = failed(failure.kind, failure.message)
            return None

    def result(self) -> dict[str, Any]:
        if not self.calls:
            return self.failure
        out = {"status": "ok", "best": min(self.calls), "median": statistics.median(self.calls), "calls": self.calls}
        if self.tokens is not None:
            out |= {"tokens": self.tokens, "tokens_per_second": self.tokens / out["best"]}
        return out if self.failure is None else {**out, "stopped": self.failure}


def time_quantity(quantity: str, running: Mapping[str, Measurement], results: dict, repeats: int, step) -> None:
    """Warm up every arm, then time the repeats in turns: ours, peer, attention, ours, peer ..."""
    clocks = {}
    for name, m in running.items():
        step(f"{name} {quantity}")
        memory = results[name].get("memory", {"status": "ok"})
        lacks = quantity == "train" and memory["status"] != "ok"  # the same step again would fail the same way
        clocks[name] = Clock(m, quantity, memory if lacks else None)
        clocks[name].prepare()
    for _ in range(repeats):
        for name, clock in clocks.items():
            step(f"{name} {quantity}")
            clock.repeat()
    for name, clock in clocks.items():
        results[name][quantity] = clock.result()


def attempt(work: Callable[[], dict]) -> dict[str, Any]:
    try:
        return work()
    except WorkerFailure as failure:
        return failed(failure.kind, failure.message)


def failed(kind: str, message: str) -> dict[str, Any]:
    return {"status": kind, "message": message}


def gate_case(case: Case, measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Compare our output with our sequential engine's in float64, and with the peer's in float32 with its weights."""
    size = {"batch": min(case.batch, 2), "tokens": case.gate_tokens()}
    ours = measurements["ours"]
    float32 = FLOAT32_SPECTRAL if "spectral_norm_surprises" in json.dumps(case.kwargs) else FLOAT32
    float64 = FLOAT64 if case.kind == "memory" else FLOAT32
    gate: dict[str, Any] = dict(size)
    gate["reference"] = attempt(lambda: judged(ours.ask("compare_with_reference", **size), float64))
    if "peer" not in measurements:
        return gate
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "answer.pt")
        try:
            measurements["peer"].ask("write_answer", path=path, **size)
        except WorkerFailure as failure:
            gate["peer"] = failed("no answer", str(failure))
        else:
            gate["peer"] = attempt(lambda: judged(ours.ask("compare_with_peer", path=path), float32))
    return gate


def judged(errors: Mapping[str, float], tolerance: Mapping[str, float]) -> dict[str, Any]:
    """Compare errors with tolerances; NaN is within none."""
    right = all(errors[name] <= tolerance[name] for name in tolerance)
    return {"status": "ok" if right else "wrong", "errors": dict(errors), "tolerance": dict(tolerance)}


def refusals(gate: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arms that are not timed, with the reason: ours unless it is shown to be right, and the peer if the two
    disagree. A peer without an output is no evidence against ours."""
    reference, peer = gate["reference"], gate.get("peer", {"status": "ok"})
    if peer["status"] not in ("ok", "no answer"):
        why = failed("refused", f"ours and the peer's answers differ, or cannot be compared: {_reason(peer)}")
        return {"ours": why, "peer": why}
    if reference["status"] != "ok":
        return {"ours": failed("refused", f"not shown to be right: {_reason(reference)}")}
    return {}


def _reason(verdict: Mapping[str, Any]) -> str:
    if "errors" not in verdict:
        return f"{verdict['status']}, {verdict['message']}"
    return ", ".join(f"relative error of the {name} {error:.1e}" for name, error in verdict["errors"].items())


def default_arms(peer: str | None) -> list[Arm]:
    ours = Arm("ours", sys.executable)
    return [ours, *([Arm("peer", peer)] if peer is not None else []), Arm("attention", sys.executable)]
