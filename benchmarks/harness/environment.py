"""The `run` record of every result file: where it was measured, and the command that reproduces it."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from titans_pytorch.training.versions import git_commit, versions

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("einops", "hyper-connections", "rotary-embedding-torch", "x-transformers")


def run_record(
    configuration: Mapping[str, Any],
    seeds: Sequence[int],
    device: str,
    threads: int,
    argv: Sequence[str] | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return command, full configuration, seeds, versions, commit, device, threads.

    placeholders: values of the command line that are valid on this machine alone -> their names in the record.
    """
    shown = placeholders or {}
    command = [_shown(word, shown) for word in (sys.argv if argv is None else argv)]
    return {
        "command": shlex.join(["python", _relative(command[0]), *command[1:]]),
        "configuration": {k: shown.get(v, v) if isinstance(v, str) else v for k, v in configuration.items()},
        "seeds": list(seeds),
        "versions": versions(PACKAGES),
        "commit": commit(),
        "device": device_record(device),
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _shown(word: str, shown: Mapping[str, str]) -> str:
    """Return a word of the command line with placeholders, also within --option=value."""
    option, equals, value = word.partition("=")
    return f"{option}={shown[value]}" if equals and value in shown else shown.get(word, word)


def commit() -> str | None:
    """Return the commit of the repository, with "+changes" where tracked files differ from it; None outside a
    checkout.
    """
    return git_commit("+changes")


def device_record(device: str) -> dict[str, Any]:
    """Describe the device. `class` names the kind of machine: times of two classes are not compared."""
    from titans_pytorch.training.start import machine_memory

    cores = os.cpu_count()
    record: dict[str, Any] = {"type": device.partition(":")[0], "cores": cores, "memory": machine_memory()}
    if record["type"] == "cuda":
        import torch

        record["name"] = torch.cuda.get_device_name(device)
    else:
        record["name"] = _processor()
    record["class"] = f"{record['type']}: {record['name']}, {cores} cores"
    return record


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _relative(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name
