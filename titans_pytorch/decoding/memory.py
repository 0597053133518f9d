"""NeuralMemory for one token: every token reads; the token that completes a chunk writes the chunk.

Letters: b batch, h heads, B rows (b h), d and e the sides of a weight
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.decoding.norm import norm_step
from titans_pytorch.engines.chunkwise import ChunkwiseEngine
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory


class HeldWeights:
    """`Weights` of the current fast weights: x [B 1 d], weights [B d e], vectors [B d]."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = {name: w if w.ndim == 3 else w.unsqueeze(1) for name, w in weights.items()}

    def matmul(self, x, name):
        return torch.bmm(x, self.weights[name])

    def mul(self, x, name):
        return x * self.weights[name]


class MemoryStep:
    """Reads views [b 1 d], or [3 b 1 d], one after the other, starting from a state; `state()` returns the next
    state.
    """

    def __init__(self, memory: NeuralMemory, state: NeuralMemState):
        self.memory, self.norm = memory, norm_step(memory.projections.retrieve_norm)
        self.network: Any = memory.engine.model
        self._hold(state)

    def _hold(self, state: NeuralMemState) -> None:
        """Continue from a state that a call returned."""
        waiting = state.cache_store_segment
        assert waiting is not None
        assert state.states is not None
        self.waiting, self.count = [waiting], waiting.shape[-2]
        self.stored = state._replace(cache_store_segment=None, updates=None)
        self.weights = HeldWeights(state.states[0])

    def step(self, views: Tensor, prev_weights) -> tuple[Tensor, Mapping[str, Tensor] | None]:
        """Return the output [b 1 d], and the memory's `updates` if a chunk was written."""
        memory, updates = self.memory, None
        query, store = (views[0], views[1:]) if memory.diff_views else (views, views)
        self.waiting.append(store)
        self.count += 1
        if self.count == memory.store_chunk_size:
            chunk = torch.cat(self.waiting, dim=-2)
            _, state, _, _ = memory._write(chunk, self.stored, prev_weights, None, None)
            updates = state.updates
            self._hold(state)
        tokens = self.norm(query)
        asked = memory.projections.queries(tokens, None)[0]
        read = self.network.with_weights(asked.flatten(0, 1), self.weights)
        return memory.projections.output(read.view(asked.shape), tokens), updates

    def state(self) -> NeuralMemState:
        return self.stored._replace(cache_store_segment=torch.cat(self.waiting, dim=-2))


class AnyMemoryStep:
    """`MemoryStep` for any memory, by its own call."""

    def __init__(self, memory: NeuralMemory, state: NeuralMemState):
        self.memory, self.next_state = memory, state

    def step(self, views, prev_weights):
        out, state = self.memory(views, state=self.next_state, prev_weights=prev_weights)
        self.next_state = state._replace(updates=None)
        return out, state.updates

    def state(self):
        return self.next_state


def memory_step(memory: NeuralMemory, state: NeuralMemState) -> MemoryStep | AnyMemoryStep:
    memory.check_made_by_this(state)
    plain = (
        memory.retrieve_chunk_size == memory.store_chunk_size
        and memory.tokenwise
        and not memory.projections.looks_back
        and not memory.reads_one_page
        and isinstance(memory.engine, ChunkwiseEngine)
        and state.cache_store_mask is None
    )
    return (MemoryStep if plain else AnyMemoryStep)(memory, state)
