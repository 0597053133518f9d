"""titans sample: let a trained model go on with a text.

titans sample runs/mac --prompt "The memory" --length 200
titans sample runs/mac --prompt-file start.txt --temperature 0 --no-storing
"""

from argparse import ArgumentParser
from contextlib import nullcontext

import torch

from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.cli.inputs import opened, parser_for, read_bytes, seed_number, temperature, whole
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.evaluate import readable

__all__ = ["sample_command"]


def parser() -> ArgumentParser:
    found = parser_for("titans sample", __doc__)
    found.add_argument("--prompt", metavar="TEXT", help="what to continue (a line's end where neither is given)")
    found.add_argument("--prompt-file", metavar="FILE", help="or a file that holds it, of any length")
    found.add_argument("--length", type=whole, default=256, metavar="N", help="bytes to write [256]")
    found.add_argument(
        "--temperature", type=temperature, default=0.8, metavar="X", help="0: the likeliest each time [0.8]"
    )
    found.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of the random choices [0]")
    found.add_argument("--no-storing", action="store_true", help="with storing in memory switched off")
    return found


def sample_command(argv: list[str]) -> None:
    options = parser().parse_args(argv)
    device, run, model = opened(options)
    if run.model.vocab_size < 256:
        raise TrainingError(
            f"titans sample needs a model of bytes (256 tokens), that of {options.run} knows {run.model.vocab_size}"
        )
    if options.prompt is not None and options.prompt_file is not None:
        raise TrainingError("prompt: give --prompt or --prompt-file, not both")
    prompt = read_bytes(options.prompt_file) if options.prompt_file else (options.prompt or "\n").encode()
    if not prompt:
        raise TrainingError("prompt must have at least one byte, got none")
    ids = torch.tensor(list(prompt), device=device)[None]
    torch.manual_seed(options.seed)
    with torch.no_grad(), storing_off(model) if options.no_storing else nullcontext():
        written = model.sample(ids, ids.shape[1] + options.length, temperature=options.temperature, use_cache=True)
    print(readable(list(prompt[-200:])) + readable([code for code in written[0].tolist() if code < 256]))
