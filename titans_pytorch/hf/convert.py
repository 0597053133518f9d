"""Convert a run of `titans train` to a folder that AutoModelForCausalLM.from_pretrained reads, or such a folder to a
run.

python -m titans_pytorch.hf.convert runs/mac converted/
python -m titans_pytorch.hf.convert converted/ runs/again      # `titans sample`, `eval`, ... open it
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from titans_pytorch.common.files import read_json, replacing_folder, write_text
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.runs import load_run
from titans_pytorch.training.checkpoint import WEIGHTS, write_weights
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser
from titans_pytorch.training.run import in_a_line

__all__ = ["convert", "convert_back", "main"]

RUN = "run.json"  # in a converted folder: all settings of its run


def convert(run: Path, out: Path) -> None:
    """Write a run as a model of transformers: config.json, model.safetensors, and the run's settings in run.json.

    Args:
        run: the folder that `titans train` left.
        out: a new or an empty folder.

    Raises:
        TrainingError: if `run` holds no run of `titans train`, or `out` is not empty.
    """
    from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig

    check_new(out)
    saved, trained = load_run(run)
    if not isinstance(saved, TitansConfig):
        raise TrainingError(f"conversion needs a run of titans train, {run} is one of train_mac.py")
    model = TitansForCausalLM(TitansHFConfig.of(saved.model))
    model.model.load_state_dict(trained.state_dict())
    with replacing_folder(out) as part:
        model.save_pretrained(part)
        write_text(part / RUN, saved.to_json())


def convert_back(folder: Path, out: Path) -> None:
    """Write a model of transformers as a run: config.json and model.safetensors, in float32.

    Args:
        folder: what `save_pretrained` of a TitansForCausalLM left. Settings of data and training come from its run.json
            if `convert` wrote one; otherwise they are defaults.
        out: a new or an empty folder.

    Raises:
        TrainingError: if `folder` holds no such model, or `out` is not empty.
    """
    from titans_pytorch.hf import TitansForCausalLM

    check_new(out)
    try:
        loaded: Any = TitansForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        model, found = loaded
        if lacks := sorted(found["missing_keys"]):
            raise ValueError(f"it lacks {len(lacks)} tensors, {lacks[0]} first")
        config = TitansConfig(model.config.to_model())
        if (folder / RUN).is_file():
            config = dataclasses.replace(TitansConfig.from_dict(read_json(folder / RUN)), model=config.model)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{folder} holds no model of titans: {in_a_line(error)}") from error
    with replacing_folder(out) as part:
        write_text(part / "config.json", config.to_json())
        write_weights(model.model, part / WEIGHTS)


def check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"out must be a new or an empty folder, got {out}")


def is_model(folder: Path) -> bool:
    """Whether the folder's config.json is of transformers; False where it cannot be read."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def main(argv: list[str] | None = None) -> int:
    """The command line, `argv` or sys.argv; returns its exit status: 0, or 1 after an error in one line."""
    parser = OneLineParser("titans_pytorch.hf.convert", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, or of a converted one")
    parser.add_argument("out", type=Path, help="a new folder")
    options = parser.parse_args(argv)
    try:
        (convert_back if is_model(options.run) else convert)(options.run, options.out)
    except (TrainingError, OSError) as error:
        print(f"convert: {in_a_line(error)}", file=sys.stderr)
        return 1
    print(f"{options.out} holds config.json and model.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
