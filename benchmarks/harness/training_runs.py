"""Training runs of a benchmark, kept in a folder, so that an interrupted benchmark continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from titans_pytorch.training.config import RunConfig


def kept_run(
    run: RunConfig,
    folder: Path,
    label: str,
    command: str,
    build_model: Callable,
    make_subject: Callable,
) -> dict[str, Any]:
    """Return the result of a training run, or of an earlier one in this folder with the same settings."""
    from titans_pytorch.training.folder import claimed
    from titans_pytorch.training.run import Run, finished_run, train_claimed
    from titans_pytorch.training.stopping import Interrupted

    with claimed(folder):
        found = finished_run(folder, run)
        if found is not None:
            return found
        print(f"\n== {label}")
        try:
            return train_claimed(Run(run, folder, None, command), build_model, make_subject)
        except Interrupted as stopped:
            message = f"{stopped}; the same command begins this run again and keeps those that are finished"
            raise Interrupted(stopped.signum, message) from stopped
