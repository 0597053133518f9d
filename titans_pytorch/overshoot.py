"""Can a memory overshoot? By how much of its error one window of tokens moves it, where a text repeats itself.

The surprises of a window of C tokens (`batch_size`) are taken at the same weights and add up. Where all its tokens have
the key k, the value v and the step theta, a memory of one matrix changes its answer to k by 2 C theta |k|^2 / d of its
error (the gradient of eq. 12 of arXiv 2501.00663, as a mean over the d features of a head). Up to 1 the error shrinks,
at 2 it changes its sign, above 2 it grows with every such window. For deeper networks, and with momentum, which adds to
it, or decay, which takes from it, this gain is a guide.

Letters: b batch, h internal heads, m chunks, c tokens per chunk, u keys and values per token, d features of a head.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .engines.run import Carry, StoreChunks, Window
from .memory_models import ResidualNorm
from .neural_memory import NeuralMemory
from .storing import memories_of
from .switches import watched

__all__ = ["OVERSHOOTS", "overshoot_note", "watch_gains"]

OVERSHOOTS = 2.0


@contextmanager
def watch_gains(model: nn.Module) -> Iterator[dict[str, float]]:
    """Within this context, the largest gain of a token that each memory of a model has stored: memory's name -> gain.

    The gain of a token is 2 C theta |k|^2 / d, with C the `batch_size`, theta its learned step and k its key: what a
    window of such tokens would move the memory by, as a multiple of its error. Left out are memories without
    `batch_size` (surprises at the initial weights cannot run away), with `mem_model_norm_add_residual` (the LayerNorm
    bounds what they answer), `max_grad_norm`, `spectral_norm_surprises` or a loss of one's own. The mapping is filled
    when the context ends.
    """
    watchers = {name: _Watcher(memory) for name, memory in memories_of(model).items() if _plain(memory)}
    found: dict[str, float] = {}
    try:
        with watched({watcher.memory.engine: watcher for watcher in watchers.values()}):
            yield found
    finally:
        found |= {name: float(watcher.largest) for name, watcher in watchers.items() if watcher.largest is not None}


def overshoot_note(gains: Mapping[str, float]) -> str | None:
    """A line on the memories whose gain is above 2, None where there are none. gains: as `watch_gains` found them."""
    above = {name: gain for name, gain in gains.items() if gain > OVERSHOOTS}
    if not above:
        return None
    shown = ", ".join(f"{gain:.2g} in {name}" for name, gain in above.items())
    return f"on text that repeats itself memories may overshoot: 2 C theta is {shown}, above 2; lower max_step or C"


def _plain(memory: NeuralMemory) -> bool:
    rule = memory.engine.rule
    limited = rule.max_grad_norm is not None or rule.spectral_norm or isinstance(memory.engine.model, ResidualNorm)
    return memory.batch_size is not None and rule.loss_fn is None and not limited


class _Watcher:
    """The largest gain of what one memory's engine writes."""

    def __init__(self, memory: NeuralMemory):
        self.memory = memory
        self.largest: Tensor | None = None

    @torch.no_grad()
    def wrote(self, chunks: StoreChunks, carry: Carry, window: Window, batch_chunks, transition) -> None:
        """chunks: what was written; window: its way."""
        u = self.memory.kv_per_token
        gain = window.step * chunks.keys.square().mean(dim=-1)
        if chunks.rates.modulation is not None:
            gain = gain * chunks.rates.modulation.amax(-1, keepdim=True)
        gain = pad(gain, (0, -gain.shape[-1] % u)).unflatten(-1, (-1, u)).sum(dim=-1)
        largest = 2 * self.memory.batch_size * torch.where(gain.isfinite(), gain, 0.0).amax()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
