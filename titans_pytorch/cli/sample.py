"""titans sample: let a trained model go on with a text."""

from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.cli.inputs import opened, read_bytes
from titans_pytorch.decoding.sampling import min_p_filter, top_k_filter, top_p_filter
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.evaluate import readable

__all__ = ["sample_command"]


FILTERS = {"top_k": (top_k_filter, "k"), "top_p": (top_p_filter, "p"), "min_p": (min_p_filter, "min_p")}


def filtered(logits: Tensor, options: Namespace) -> Tensor:
    """The logits [b v] after the filters of the options, each on what the one before left; min_p = 0.1 where none is
    given.
    """
    given = {name: value for name in FILTERS if (value := getattr(options, name)) is not None} or {"min_p": 0.1}
    for name, value in given.items():
        keep, keyword = FILTERS[name]
        logits = keep(logits, **{keyword: value})
    return logits


def sample_command(options: Namespace) -> None:
    device, run, model = opened(options)
    if run.model.vocab_size < 256:
        raise TrainingError(
            f"sampling needs a model of bytes (256 tokens), that of {options.run} knows {run.model.vocab_size}"
        )
    if options.prompt is not None and options.prompt_file is not None:
        raise TrainingError("prompt: give --prompt or --prompt-file, not both")
    prompt = read_bytes(options.prompt_file) if options.prompt_file else (options.prompt or "\n").encode()
    if not prompt:
        raise TrainingError("prompt must have at least one byte, got none")
    ids = torch.tensor(list(prompt), device=device)[None]
    torch.manual_seed(options.seed)
    with torch.no_grad(), storing_off(model) if options.no_storing else nullcontext():
        written = model.sample(
            ids,
            seq_len=ids.shape[1] + options.new_bytes,
            temperature=options.temperature,
            filter_fn=partial(filtered, options=options),
            use_cache=True,
            show_progress=False,
        )
    print(readable(list(prompt[-200:])) + readable([code for code in written[0].tolist() if code < 256]))
