"""Training runs of a benchmark, kept in a folder, so that an interrupted benchmark goes on where it was."""

from pathlib import Path
from typing import Any

from titans_pytorch.files import parse_json, read_json
from titans_pytorch.training.config import RunConfig
from titans_pytorch.training.run import BuildModel, MakeSubject, Run, train


def kept_run(
    run: RunConfig,
    folder: Path,
    label: str,
    command: str,
    build_model: BuildModel,
    make_subject: MakeSubject,
) -> dict[str, Any]:
    """The result of a training run, or of an earlier one in this folder with the same settings."""
    path = folder / "result.json"
    if path.is_file():
        found = read_json(path)
        if found["config"] == parse_json(run.to_json()):
            return found
    print(f"\n== {label}")
    return train(Run(run, folder, False, command), build_model, make_subject)
