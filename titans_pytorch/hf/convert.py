"""Convert a run of `titans train` to a folder that AutoModelForCausalLM.from_pretrained reads.

python -m titans_pytorch.hf.convert runs/mac converted/
"""

import argparse
import sys
from pathlib import Path

import torch

from titans_pytorch.cli.runs import load_run
from titans_pytorch.common.files import replacing_folder
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.run import in_a_line

__all__ = ["convert", "main"]


def convert(run: Path, out: Path) -> None:
    """Write a run as a model of transformers: config.json and model.safetensors.

    Args:
        run: the folder that `titans train` left.
        out: a new or an empty folder.

    Raises:
        TrainingError: if `run` holds no run, or `out` is not empty.
    """
    from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} is there already, takes a new or an empty folder")
    saved, trained = load_run(run, torch.device("cpu"))
    model = TitansForCausalLM(TitansHFConfig.of(saved.model))
    model.model.load_state_dict(trained.state_dict())
    with replacing_folder(out) as part:
        model.save_pretrained(part)


def main(argv: list[str] | None = None) -> int:
    """The command line, `argv` or sys.argv; returns its exit status: 0, or 1 after an error in one line."""
    parser = argparse.ArgumentParser("titans_pytorch.hf.convert", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("out", type=Path, help="a new folder")
    options = parser.parse_args(argv)
    try:
        convert(options.run, options.out)
    except (TrainingError, OSError) as error:
        print(f"convert: {in_a_line(error)}", file=sys.stderr)
        return 1
    print(f"{options.out} holds config.json and model.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
