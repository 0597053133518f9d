"""Bits per byte of a language model on bytes, and of compressors on the same bytes."""

import gzip
import lzma
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch.common.switches import evaluating

__all__ = ["bits_per_byte", "compressors", "estimate_bits_per_byte", "sample_text"]

Context = Callable[[], AbstractContextManager]


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, inputs, scored) for every window over `length` bytes.

    A window reads `inputs` bytes from `start` and predicts the byte after each; of these predictions the last `scored`
    count. Together they predict bytes 1 to length - 1 once each, every one from as much context as the windows allow.
    """
    inputs = min(context, length - 1)
    spans = [(0, inputs, inputs)]
    done = inputs  # bytes 1 .. done have been predicted
    while done < length - 1:
        scored = min(stride, length - 1 - done)
        done += scored
        spans.append((done - inputs, inputs, scored))
    return spans


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    data: Tensor,
    *,
    context: int,
    stride: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    autocast: Context = nullcontext,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Return the mean bits per byte of a text, each byte counted once.

    Windows of `context` bytes move by `stride`, so that all but the first predictions have at least context - stride
    bytes before them. The very first byte has nothing before it and counts as 8 bits.

    Args:
        model: ids [b n] -> logits [b n 256].
        data: uint8 [bytes], at least 2.
        context: bytes of a window.
        stride: step from window to window, 1 to context.
        batch_size: windows in one forward pass.
        device: device of the model.
        autocast: returns the autocast context of each forward pass.
        progress: show a progress bar.
        say: called with a line that estimates the seconds, if there are more than two forward passes.

    Raises:
        ValueError: for a stride out of range, or fewer than two bytes.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be 1 to context = {context}, got {stride!r}")
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 bytes, got {len(data)}")
    spans = windows(len(data), context, stride)
    bits, began = torch.tensor(8.0, dtype=torch.float64), 0.0
    with evaluating(model):
        for begin in tqdm(range(0, len(spans), batch_size), desc="evaluation", disable=None if progress else True):
            group = spans[begin : begin + batch_size]
            if begin == 2 * batch_size:  # the first pass is slower than the others
                left = (time.perf_counter() - began) * (len(spans) - begin) / batch_size
                say(f"evaluation of {len(data):,} bytes in {len(spans):,} windows, about {math.ceil(left)} s")
            began = time.perf_counter()
            rows = torch.stack([data[start : start + inputs + 1] for start, inputs, _ in group]).long().to(device)
            with autocast():
                logits = model(rows[:, :-1])
            nats = F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").double().cpu()
            for row, (_, inputs, scored) in zip(nats, group, strict=True):
                bits += row[inputs - scored :].sum() / math.log(2)
    return float(bits) / len(data)


@torch.no_grad()
def estimate_bits_per_byte(
    model: nn.Module,
    data: Tensor,
    *,
    seq_len: int,
    sequences: int,
    batch_size: int,
    device: torch.device | str,
    autocast: Context,
) -> float:
    """Return the mean bits per byte over windows spread evenly over a text: the same ones at every call.

    Args:
        model: called as `model(ids, return_loss=True)`.
        data: uint8 [bytes].
        seq_len: bytes predicted in a window.
        sequences: number of windows.
        batch_size: windows in one forward pass.
        device: device of the model.
        autocast: returns the autocast context of each forward pass.
    """
    span = min(seq_len + 1, len(data))
    starts = sorted({round(i * (len(data) - span) / max(1, sequences - 1)) for i in range(sequences)})
    total = 0.0
    with evaluating(model):
        for begin in range(0, len(starts), batch_size):
            group = starts[begin : begin + batch_size]
            rows = torch.stack([data[start : start + span] for start in group]).long().to(device)
            with autocast():
                total += float(model(rows, return_loss=True)) * len(group)
    return total / len(starts) / math.log(2)


def compressors(data: Tensor) -> dict[str, float]:
    """Return bits per byte of `data` (uint8 [bytes]) by its order-0 entropy, gzip -9 and xz, each seeing only these
    bytes.
    """
    counts = torch.bincount(data.long(), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    raw = bytes(data.tolist())
    return {
        "order-0 entropy": float(-(share * share.log2()).sum()),
        "gzip -9": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz": 8 * len(lzma.compress(raw)) / len(raw),
    }


@torch.no_grad()
def sample_text(
    model: nn.Module,
    prime: Tensor,
    length: int,
    *,
    temperature: float,
    seed: int,
    device: torch.device,
    autocast: Context,
) -> tuple[str, str]:
    """Let a model continue a text; the global random number generators stay as they were.

    Args:
        model: has `sample(prompt, seq_len, ...)`. If it takes a `generator`, several threads may sample at a time.
        prime: uint8 [bytes], the text to continue.
        length: bytes to write.
        temperature: sampling temperature; 0 always takes the likeliest byte.
        seed: seed of the sampling.
        device: device of the model.
        autocast: returns the autocast context of each forward pass.

    Returns:
        (the prime, the text that the model writes after it), as text for a terminal.
    """
    prompt = prime.long()[None].to(device)
    sample: Any = model.sample
    own: dict[str, torch.Generator] = {}
    general: AbstractContextManager = nullcontext()
    if "generator" in signature(sample).parameters:
        own = {"generator": torch.Generator(device).manual_seed(seed)}
    else:  # torch's own generator, which all threads share
        general = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with evaluating(model), general, autocast():
        if not own:
            torch.manual_seed(seed)
        written = sample(
            prompt, prompt.shape[1] + length, temperature=temperature, use_cache=True, show_progress=False, **own
        )
    return readable(prime.tolist()), readable(written[0].tolist())


def readable(codes: list[int]) -> str:
    """Return bytes as text for a terminal; control characters but newline and tab become a replacement character."""
    text = bytes(codes).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
