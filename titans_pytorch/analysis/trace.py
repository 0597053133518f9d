"""Traces of each memory along a text: inner loss, learning rate, forget gate, momentum, change of the fast weights.

Letters: b rows, n tokens, h heads, p pieces.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.analysis.overshoot import watch_gains
from titans_pytorch.analysis.storing import memories_of
from titans_pytorch.common.checks import positive_int
from titans_pytorch.common.switches import evaluating, watched
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.rules.rates import WriteRates

__all__ = ["MemoryTrace", "trace_memories"]

Tensors = dict[str, Tensor]


@dataclass
class MemoryTrace:
    """Means over rows and heads; one entry for each written token, or chunk of `tokens_per_entry` tokens.

    name: the memory's name in its model.
    tokens_per_entry: tokens of a chunk.
    piece: tokens of a piece.
    surprise: the inner loss before the write.
    step: learning rate theta.
    decay: forget gate alpha.
    momentum: momentum eta; empty without momentum.
    change: |M - M_0| / |M_0| after each piece, over all fast weights.
    moved: the same against the piece before.
    gain: the largest gain of any mini-batch; above 2 a memory can overshoot (see `overshoot`). None if nothing was
        written or the memory is not finite.
    lost: the first position whose memory is not finite, or None.
    """

    name: str
    tokens_per_entry: int
    piece: int
    surprise: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    decay: list[float] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    gain: float | None = None
    lost: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as a dict, for JSON."""
        return asdict(self)


@torch.no_grad()
def trace_memories(model: nn.Module, ids: Tensor, piece: int = 32) -> list[MemoryTrace]:
    """Read a text in pieces, carrying the state, and trace each memory.

    Args:
        model: called as `model(ids, cache=..., return_cache=True)`.
        ids: token ids [b n].
        piece: tokens of a piece. `change` and `moved` are measured at the end of each piece.

    Returns:
        A trace for each memory of the model.
    """
    positive_int(piece, "piece")
    watchers = [_Watcher(name, memory, piece, ids.shape[0]) for name, memory in memories_of(model).items()]
    told = watched({watcher.memory: watcher for watcher in watchers})
    with evaluating(model), told, watch_gains(model) as gains:
        cache = None
        for part in ids.split(piece, dim=1):
            _, cache = model(part, cache=cache, return_cache=True)
            for watcher in watchers:
                watcher.end_of_piece()
    for watcher in watchers:
        name = watcher.trace.name
        watcher.trace.gain, watcher.trace.lost = gains.finite().get(name), gains.lost.get(name)
    return [watcher.trace for watcher in watchers]


class _Watcher:
    """Collects one memory's trace from its events."""

    def __init__(self, name: str, memory: NeuralMemory, piece: int, batch: int):
        self.memory, self.rows = memory, batch * memory.internal_heads
        self.trace = MemoryTrace(name, memory.store_chunk_size, piece)
        self.start = {key: value.double() for key, value in memory.init_weights(batch).items()}
        self.before = self.now = self.start

    def rates(self, rates: WriteRates) -> None:
        trace = self.trace
        trace.step += _over_rows(rates.learning_rate.mean(dim=-1))
        trace.decay += _over_rows(1 - rates.retention)
        if rates.momentum is not None:
            trace.momentum += _over_rows(rates.momentum[..., -1])

    def stored(self, state: NeuralMemState, surprises: tuple[Tensor, ...]) -> None:
        loss = surprises[0].flatten(0, 1)
        pairs = self.memory.chunk_config.pairs
        of_chunks = loss.reshape(loss.shape[0], loss.shape[1] // pairs, pairs)  # none, where no chunk was completed
        self.trace.surprise += _over_rows(of_chunks.mean(dim=-1))
        assert state.states is not None  # a state after a write has fast weights
        weights, _ = state.states
        self.now = {key: weights[key].double() for key in self.start}

    def end_of_piece(self) -> None:
        size = _norm(self.start)
        self.trace.change.append(float((_norm(_minus(self.now, self.start)) / size).mean()))
        self.trace.moved.append(float((_norm(_minus(self.now, self.before)) / size).mean()))
        self.before = self.now


def _over_rows(values: Tensor) -> list[float]:
    """Average [(b h) m] over rows and heads: m numbers."""
    return values.double().mean(dim=0).tolist()


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name] - b[name] for name in a}


def _norm(weights: Tensors) -> Tensor:
    """Return the norm over all weights, for each row and head: [(b h)]."""
    return sum((w.flatten(1).square().sum(dim=1) for w in weights.values()), torch.zeros(())).sqrt()
