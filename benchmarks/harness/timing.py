"""Timing in one process: synchronised, every call on record. Seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from .later import torch

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # process: CPU time, of all threads together
DTYPES = ("float32", "float64", "bfloat16")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str, clock: str = "wall") -> float:
    """Time one call."""
    now = CLOCKS[clock]
    synchronise(device)
    began = now()
    work()
    synchronise(device)
    return now() - began


def cpu_seconds(work: Callable[[], object], device: str) -> float:
    """Time one call in CPU seconds, which exclude other processes; on CUDA in wall-clock seconds."""
    return timed(work, device, "wall" if device.startswith("cuda") else "process")


def timed_calls(work: Callable[[], object], device: str, min_seconds: float = 0.0, clock: str = "wall") -> list[float]:
    """Return every call's seconds: one call, then as many as it takes to fill `min_seconds`."""
    calls, total = [], 0.0
    while not calls or total < min_seconds:
        calls.append(timed(work, device, clock))
        total += calls[-1]
    return calls


def matmul_rate(device: str, dtype: str, side: int = 2048, min_seconds: float = 0.5, clock: str = "wall") -> float:
    """Measure operations per second of a product of two square matrices, 2 side^3 operations: the best of several
    calls.
    """
    a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    out = torch.empty_like(a)

    def work():
        torch.mm(a, b, out=out)

    timed(work, device)
    return 2 * side**3 / min(timed_calls(work, device, min_seconds, clock))
