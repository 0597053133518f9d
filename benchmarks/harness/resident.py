"""Memory of this process, and on CUDA of its allocator: now, and the peak since a reset. Units: bytes."""

from __future__ import annotations

import resource
import sys

from .later import torch

STATUS = "/proc/self/status"


def resident() -> int:
    """Return the resident set; if the system does not report it, its high-water mark."""
    return _status("VmRSS") or high_water()


def high_water() -> int:
    """Return the largest resident set of this process so far, or since `reset_high_water`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def reset_high_water() -> bool:
    """Reset the mark to the present resident set. Returns False if the system cannot: an earlier mark then still
    counts."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        with open(STATUS) as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def available_memory() -> int | None:
    """Return the bytes available to new processes, or None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def limit_memory(limit: int | None) -> None:
    """This process is the first to go where memory runs out, and may not ask for more than `limit` bytes beyond what it
    holds (PyTorch's libraries alone hold 0.2 to 0.8 GB, depending on the build)."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not Linux
    if limit is not None:
        limit += _status("VmData") or 0
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


class Watermark:
    """Peak memory over idle: create it while idle, read it after the work.

    On CPU the resident set and its high-water mark, on CUDA what torch has allocated and the most it had.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated()
        else:
            reset_high_water()
            self.idle = resident()

    def read(self) -> dict[str, int]:
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = high_water()
        return {"idle": self.idle, "peak": peak, "over_idle": peak - self.idle}
