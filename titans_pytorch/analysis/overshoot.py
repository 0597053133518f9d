"""Overshoot: how far one mini-batch moves the predictions of a memory, as a multiple of their error.

All gradients of a mini-batch (C = `batch_size` tokens) are taken at the same fast weights and add up. The gain of a
mini-batch is |M(k) - A(k)| / |v - A(k)| over its keys k and values v, with A the memory at its start and M the memory
after it. At 1 the error can vanish, at 2 it changes its sign, above 2 it grows. (Of a memory of one matrix, A in the
numerator is what the forget gate leaves of it, so that the gain is that of the writes.)

Where all tokens have the key k, the value v and the learning rate theta, the gain of a memory of one matrix is
2 C theta |k|^2 / d (the gradient of eq. 12 of arXiv 2501.00663, as a mean over the d features of a head): the gain on
repetitive text, whatever the present text is. It is a guide only for deeper networks, with momentum (which increases
it) and with a forget gate (which decreases it).

Letters: B rows (batch and internal heads), m chunks, p pairs of a chunk, u keys and values per token, d features of a
head.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from titans_pytorch.analysis.storing import memories_of
from titans_pytorch.common.switches import watched
from titans_pytorch.engines.base import Carry, Chunks, Tensors, Window
from titans_pytorch.memory_models import ResidualNorm
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.positions import chunks_of_first, ends_mini_batch, mini_batch_entries
from titans_pytorch.rules.losses import Loss
from titans_pytorch.rules.titans import TitansRule

__all__ = ["OVERSHOOTS", "Gains", "overshoot_note", "watch_gains"]

OVERSHOOTS = 2.0
KNOWN = 1e-2  # smaller errors count as this share of the values: rounding changes values that are already learned


class Gains(dict[str, float]):
    """Memory's name -> its largest gain, infinite once it is not finite.

    Args:
        gains: name -> gain.
        lost: memory's name -> the first position that reads a memory which is not finite.
    """

    def __init__(self, gains: Mapping[str, float] | None = None, lost: Mapping[str, int] | None = None):
        super().__init__(gains or {})
        self.lost: dict[str, int] = dict(lost or {})

    def finite(self) -> dict[str, float | None]:
        """Return the gains for JSON, which has no infinity: None for a memory that is not finite."""
        return {name: gain if math.isfinite(gain) else None for name, gain in self.items()}


@contextmanager
def watch_gains(model: nn.Module) -> Iterator[Gains]:
    """Within this context, measure the largest gain of each memory of `model` that writes: name -> gain.

    Measured on every mini-batch that is written; without `batch_size` on all chunks that a call writes in one go,
    against the initial fast weights. A memory whose loss has no least value (the dot product) has no gain. For a memory
    that nothing limits (with `batch_size`, and without `mem_model_norm_add_residual`, `max_grad_norm`,
    `spectral_norm_surprises` or a loss of one's own) the gain is at least 2 C theta |k|^2 / d of each token. It costs
    two more reads, and on an accelerator one synchronisation,
    for each mini-batch. The mapping is filled when the context ends.
    """
    watchers = {name: _Watcher(memory) for name, memory in memories_of(model).items()}
    found = Gains()
    try:
        with watched({watcher.memory.engine: watcher for watcher in watchers.values()}):
            yield found
    finally:
        for name, watcher in watchers.items():
            if watcher.lost is not None:
                found[name], found.lost[name] = math.inf, watcher.lost
            elif watcher.largest is not None:
                found[name] = float(watcher.largest)


def overshoot_note(gains: Mapping[str, float]) -> str | None:
    """Return a line on the memories with a gain above 2, and on those that are not finite; None if there are none.

    gains: result of `watch_gains`.
    """
    lost = gains.lost if isinstance(gains, Gains) else {}
    above = {name: gain for name, gain in gains.items() if gain > OVERSHOOTS and name not in lost}
    notes = []
    if lost:
        notes.append("not finite: " + ", ".join(f"{_shown(name)} from token {at} on" for name, at in lost.items()))
    if above:
        shown = ", ".join(f"{gain:.2g} in {_shown(name)}" for name, gain in above.items())
        notes.append(f"memories may overshoot: the gain of a mini-batch is {shown}, above 2")
    return "; ".join(notes) + f"; {REMEDY}" if notes else None


REMEDY = "lower the largest step (default_step_transform_max_lr; max_step) or the mini-batch (batch_size; chunk_size)"


def _shown(name: str) -> str:
    return name or "the memory"


def _finite(weights: Tensors) -> Tensor:
    return torch.stack([weights[name].isfinite().all() for name in weights]).all()


class _Watcher:
    """Watches every solve window that one memory's engine writes."""

    def __init__(self, memory: NeuralMemory):
        self.memory = memory
        rule = memory.engine.rule
        plain = isinstance(rule, TitansRule) and not rule.spectral_norm
        limited = rule.max_grad_norm is not None or rule.loss_fn is not None
        self.unlimited = plain and not limited and not isinstance(memory.engine.model, ResidualNorm)
        # a loss without a least value has no error that a step could overshoot
        self.measured = not isinstance(rule.loss_fn, Loss) or rule.loss_fn.has_least
        self.forgets = plain and rule.has_closed_form and getattr(memory.engine.model, "matrix", None) is not None
        self.largest: Tensor | None = None
        self.lost: int | None = None

    @torch.no_grad()
    def wrote(self, chunks: Chunks, carry: Carry, window: Window, batch_chunks: int | None, share) -> None:
        """chunks: the chunks written; carry: fast weights before them; window: fast weights after them; batch_chunks:
        chunks of a mini-batch; share: the share of the memory that a gated transition passes on, or None."""
        if self.lost is not None:
            return
        end = {name: path.entry(len(chunks)) for name, path in window.paths.items()}
        if not _finite(end):
            self.lost = self._position(chunks, window)
            return
        if not self.measured:
            return
        if window.solved and batch_chunks is not None:
            gain = self._solved(chunks, carry.start, window, batch_chunks, share)
        else:
            gain = self._measured(chunks, carry.start, end, share)
        if self.unlimited and batch_chunks is not None and window.learning_rate is not None:
            gain = torch.maximum(gain, self._of_repeats(chunks, window.learning_rate, batch_chunks))
        gain = gain.nan_to_num(nan=math.inf)
        self.largest = gain if self.largest is None else torch.maximum(self.largest, gain)

    def _position(self, chunks: Chunks, window: Window) -> int:
        """Return the first token that reads a memory which is not finite. A memory stays so."""
        low, high = 0, len(chunks)
        while low < high:
            middle = (low + high) // 2
            if _finite({name: path.entry(middle) for name, path in window.paths.items()}):
                low = middle + 1
            else:
                high = middle
        return max((chunks.first + low) * self.memory.store_chunk_size - 1, 0)

    def _measured(self, chunks: Chunks, anchor: Tensors, end: Tensors, share: Tensor | None) -> Tensor:
        if share is not None:
            end = {name: torch.lerp(anchor[name], end[name], share.to(end[name].dtype)) for name in end}
        read = partial(_read, self.memory.engine, chunks.keys, self.memory.tokenwise)
        retained = self._retained(chunks, torch.zeros(len(chunks), dtype=torch.long, device=chunks.keys.device), share)
        return _largest(chunks, read(anchor), read(end), retained)

    def _solved(self, chunks: Chunks, anchor: Tensors, window: Window, batch_chunks: int, share) -> Tensor:
        """Return the largest gain of the mini-batches in a window of several."""
        keys, m, first = chunks.keys, len(chunks), chunks.first
        batch, starts, ends = mini_batch_entries(first, m, batch_chunks, keys.device)
        read = partial(self.memory.engine.read, window.paths, keys)
        own = chunks_of_first(first, m, batch_chunks)
        began = _read(self.memory.engine, keys[:, :own], self.memory.tokenwise, anchor)
        before, after = torch.cat((began, read(starts)[:, own:]), dim=1), read(ends)
        if (resets := chunks.rates.resets) is not None and chunks.initial is not None:  # those chunks began anew
            anew = _read(self.memory.engine, keys, self.memory.tokenwise, chunks.initial)
            before = torch.where(resets[:, :, None, None], anew, before)
        if share is not None:  # an unfinished mini-batch has not been blended yet
            unfinished = (batch == batch[-1]) & (not ends_mini_batch(first + m, batch_chunks))
            after = torch.where(unfinished[:, None, None], torch.lerp(before, after, share.to(after.dtype)), after)
        return _largest(chunks, before, after, self._retained(chunks, batch, share), batch)

    def _retained(self, chunks: Chunks, batch: Tensor, share: Tensor | None) -> Tensor | float:
        """Return the share of the predictions at a mini-batch's start that the forget gate keeps, of each chunk
        [B m 1 1]: forgetting is no overshoot. 1 unless the network is one matrix: others' predictions shrink in other
        ways."""
        if not self.forgets:
            return 1.0
        logs, active = chunks.rates.retention.double().log(), chunks.rates.active
        logs = logs if active is None else logs.masked_fill(~active, 0.0)
        left = torch.zeros_like(logs).index_add(1, batch, logs).exp()[:, batch, None, None]
        return left if share is None else share * left + (1.0 - share)

    def _of_repeats(self, chunks: Chunks, learning_rate: Tensor, batch_chunks: int) -> Tensor:
        """Return 2 C theta |k|^2 / d of the token where it is largest."""
        rates, u = chunks.rates, self.memory.kv_per_token
        gain = learning_rate * chunks.keys.square().mean(dim=-1)
        if rates.modulation is not None:
            gain = gain * rates.modulation.amax(dim=-1, keepdim=True)
        if rates.active is not None:
            gain = gain * rates.active.unsqueeze(-1)
        chunk = self.memory.store_chunk_size
        if self.memory.earlier_pairs:  # a token is written once for each place that it has in a window
            return 2 * batch_chunks * gain.sum(dim=-1).amax()
        gain = pad(gain, (0, -gain.shape[-1] % u)).unflatten(-1, (-1, u)).sum(dim=-1)
        return 2 * batch_chunks * chunk * gain.amax()


def _read(engine, keys: Tensor, tokenwise: bool, weights: Tensors) -> Tensor:
    """Return predictions of the memory network with these weights for keys [B m p d]."""
    paths = engine.still(0, weights).paths
    if tokenwise:
        return engine.read(paths, keys.flatten(1, 2).unsqueeze(1), slice(0, 1)).view_as(keys)
    return engine.read(paths, keys, torch.zeros(keys.shape[1], dtype=torch.long, device=keys.device))


def _largest(chunks: Chunks, before: Tensor, after: Tensor, retained: Tensor | float, batch=None) -> Tensor:
    """Return the largest gain of predictions [B m p d] of all keys; batch: the mini-batch of each chunk, long
    [m] from 0 on, None for one."""
    values = chunks.values
    scale = chunks.rates.start_scale if isinstance(retained, Tensor) else None  # of one matrix
    start = before if scale is None else scale[:, :, None, None] * before
    moved, error, size = (_norms(x, batch) for x in (after - retained * before, values - start, values))
    return torch.where(moved > 0, moved / torch.maximum(error, KNOWN * size), 0.0).amax()


def _norms(x: Tensor, batch: Tensor | None) -> Tensor:
    """Return the norms of x [B m p d] for each row and mini-batch, in double: squares of large numbers overflow."""
    squares = x.double().square().sum(dim=(2, 3))
    if batch is None:
        return squares.sum(dim=1).sqrt()
    return squares.new_zeros(len(squares), len(batch)).index_add(1, batch, squares).sqrt()
