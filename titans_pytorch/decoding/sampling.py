"""Sampling: filters of logits [... v], Gumbel sampling, and the loop around a language model.

Letters: b batch, n tokens, v tokens of the vocabulary
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch.common.checks import Words, callable_or_none, flags, number_at_least_0, of_kind, positive_int, wrong
from titans_pytorch.common.switches import evaluating
from titans_pytorch.decoding.steps import decoder_by_calls
from titans_pytorch.ops.modes import plain_only


def min_p_filter(logits: Tensor, min_p: float = 0.1) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest (arXiv 2407.01082).

    Args:
        logits: [.. v].
        min_p: in [0, 1]; else ValueError.

    Returns:
        [.. v], -inf where dropped.
    """
    if not isinstance(min_p, (int, float)) or not 0 <= min_p <= 1:
        raise wrong("min_p", min_p, "a number in [0, 1]")
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)


def top_k_filter(logits: Tensor, k: int = 50) -> Tensor:
    """Keep the k likeliest tokens.

    Args:
        logits: [.. v].
        k: at least 1; else ValueError.

    Returns:
        [.. v], -inf where dropped.
    """
    positive_int(k, "k")
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p_filter(logits: Tensor, p: float = 0.9) -> Tensor:
    """Keep the smallest set of likeliest tokens with a total probability of at least p (arXiv 1904.09751).

    Args:
        logits: [.. v].
        p: in (0, 1]; else ValueError.

    Returns:
        [.. v], -inf where dropped.
    """
    if not isinstance(p, (int, float)) or not 0 < p <= 1:
        raise wrong("p", p, "a number in (0, 1]")
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    values = values.masked_fill((before >= p).scatter(-1, torch.zeros_like(indices[..., :1]), False), -torch.inf)
    return torch.empty_like(logits).scatter(-1, indices, values)


def gumbel_sample(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw token ids from softmax(logits / temperature).

    Args:
        logits: [.. v].
        temperature: 0 takes the likeliest; ValueError below.
        generator: random number generator; None: torch's default, which all threads share.

    Returns:
        Token ids, long [..].
    """
    number_at_least_0(temperature, "temperature")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    # minus the log of an exponential variable is a Gumbel variable
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min(torch.finfo(logits.dtype).tiny).log()
    return (logits / temperature - noise).argmax(dim=-1)


def check_ids(name: str, ids: Tensor, num_tokens: int | None = None) -> None:
    """Check token ids: integers [b n], n >= 1, below num_tokens. The range is checked on CPU, where it needs no
    sync.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else Words(type(ids).__name__)
        raise wrong(name, got, "token ids of shape [b n], n >= 1")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise wrong(name, ids.dtype, "integer token ids")
    if num_tokens is not None and ids.device.type == "cpu" and not plain_only():
        low, high = (int(t) for t in ids.aminmax())
        if low < 0 or high >= num_tokens:
            raise wrong(name, Words(f"token id {low if low < 0 else high}"), f"ids from 0 to {num_tokens - 1}")


def cached_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function of ids [b n], one longer in each call, that returns logits [b v] of the last. It reads only the
    new ids."""
    decoder: Any = None

    def next_logits(ids: Tensor) -> Tensor:
        nonlocal decoder
        if decoder is not None:
            return decoder.step(ids[:, -1:])
        logits, cache = model(ids, cache=None, return_cache=True)
        new = getattr(model, "decoder", None)
        if callable(new) and not isinstance(new, nn.Module):  # a submodule may have this name
            decoder = new(cache)
        if decoder is None:
            decoder = decoder_by_calls(model, cache)
        return logits[:, -1]

    return next_logits


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Tensor,
    seq_len: int,
    temperature: float = 1.5,
    filter_fn: Callable | None = min_p_filter,
    filter_kwargs: dict | None = None,
    show_progress: bool = True,
    use_cache: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each prompt of a batch, [b n] -> the ids after it [b seq_len - n] (none if the prompt is that long).

    Args:
        model: called as `model(ids)` -> logits [b n v]; with the cache as `model(ids, cache=..., return_cache=True)` ->
            (logits, cache), on the prompt and then on one new token at a time. If `model.decoder(cache)` returns an
            object, its `step(ids [b 1])` -> logits [b v] reads the new tokens in place of the model. The model is in
            eval mode meanwhile.
        prompt: token ids [b n], n >= 1.
        seq_len: tokens of prompt and continuation together.
        temperature: temperature of the softmax after the filter; 0 takes the likeliest token.
        filter_fn, filter_kwargs: called as `filter_fn(logits, **filter_kwargs)` on logits [b v]; None: no filter.
            Without filter_kwargs the filter's defaults are used (min_p = 0.1).
        show_progress: show a progress bar.
        use_cache: carry the state instead of reading earlier tokens again.
        generator: random number generator on the prompt's device; None: torch's default, which all threads share.
    """
    check_ids("prompt", prompt)
    positive_int(seq_len, "seq_len")
    callable_or_none(filter_fn, "filter_fn")
    of_kind(filter_kwargs, (Mapping, type(None)), "filter_kwargs", "a mapping of the filter's keywords, or None")
    flags(show_progress=show_progress, use_cache=use_cache)
    number_at_least_0(temperature, "temperature")

    start = prompt.shape[1]
    ids = torch.nn.functional.pad(prompt.long(), (0, max(seq_len - start, 0)))
    with evaluating(model):
        next_logits = cached_logits(model) if use_cache else lambda ids: model(ids)[:, -1]
        for n in tqdm(range(start, seq_len), disable=not show_progress):
            logits = next_logits(ids[:, :n])
            if filter_fn is not None:
                logits = filter_fn(logits, **(filter_kwargs or {}))
            ids[:, n] = gumbel_sample(logits, temperature, generator)
    return ids[:, start:]
