"""From tokens to what an engine stores: complete chunks of keys and values, and their rates after all that changes
them.

Letters: b batch, m chunks, c tokens per chunk, h internal heads, u keys and values per token, d features, p pairs.
"""

from dataclasses import replace
from typing import NamedTuple

from einops import repeat
from torch import Tensor

from titans_pytorch.common.switches import stores, tell
from titans_pytorch.engines.written import ResidualSource, StoreChunks
from titans_pytorch.gates.stages import GateCarry, Gated, Span
from titans_pytorch.memory.config import batch_chunks
from titans_pytorch.memory.parts import MemoryParts
from titans_pytorch.memory.projections import keys_and_values
from titans_pytorch.memory.rates import StoreRates
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.memory.surprise import admit, of_pairs


class ChunkCarry(NamedTuple):
    """What chunks look back on, fields of NeuralMemState: see there."""

    store_conv: Tensor | None = None
    last_token: Tensor | None = None

    @classmethod
    def of(cls, state: NeuralMemState) -> "ChunkCarry":
        return cls(*(getattr(state, name) for name in cls._fields))


class MemoryChunks(MemoryParts):
    """The part of NeuralMemory that prepares what is stored."""

    stopped = False  # True in a replica of a memory whose storing was off

    def span(self, tokens: Tensor, first: int, anchor_chunks: int | None = None) -> Span:
        """Complete chunks, tokens [(2) b m*c d], normalised; `first` is the absolute index of the first chunk.
        anchor_chunks: chunks that share an anchor, None for those of `batch_size`.
        """
        tokens = self.store_norm(tokens)
        key_view, value_view = tokens if self.diff_views else (tokens, tokens)
        anchor_chunks = anchor_chunks or batch_chunks(self.batch_size, self.store_chunk_size)
        return Span(key_view, value_view, self.store_chunk_size, first, anchor_chunks)

    def _replicate_for_data_parallel(self):  # computes in a thread of its own, for the caller of this one
        replica = super()._replicate_for_data_parallel()
        replica.stopped = not stores(self)
        return replica

    def learned_rates(self, span: Span, with_residual: bool) -> StoreRates:
        """The rates of a span before gates, kinetics and pages; where storing is off, those that change nothing.
        with_residual: also the mixture with an earlier layer's weights.
        """
        rates = self.rates(span.tokens, span.chunk, with_residual)
        return rates if stores(self) and not self.stopped else rates.still()

    def gated_rates(self, span: Span, carry: GateCarry, with_residual: bool = False) -> Gated:
        """The rates of a span, after what gates, kinetics and pages do to them. carry: what these carry from span to
        span; with_residual: also the mixture with an earlier layer's weights.
        """
        rates = self.learned_rates(span, with_residual)
        tell(self, "rates", rates)
        if self.lookahead:
            rates = replace(rates, step=rates.step[:, :, :-1])
        return self.gating(self, span, rates, carry)

    def chunks(
        self,
        span: Span,
        gated: Gated,
        mask: Tensor | None,
        residual: ResidualSource | None,
        carry: ChunkCarry,
    ) -> tuple[StoreChunks, ChunkCarry, Tensor | None]:
        """What an engine stores of a span.

        Args:
            span: of complete chunks.
            gated: its rates, from `gated_rates`.
            mask: bool [b m*c], or None.
            residual: an earlier layer's updates, or None.
            carry: what chunks look back on.

        Returns:
            The chunks; what the next span looks back on; and the predictor's error [b m*c], where there is one.
        """
        c, h, u = span.chunk, self.internal_heads, self.kv_per_token
        keys, values, tail = keys_and_values(self, span.tokens, span.values, c, carry.store_conv)
        keys, values, rates = keys.flatten(0, 1), values.flatten(0, 1), gated.rates
        if self.lookahead:
            keys, values = keys[:, :, :-1], values[:, :, 1:]
        if mask is not None:
            allowed = repeat(mask, "b (m c) -> (b h) m (c u)", c=c, h=h, u=u)
            rates = replace(rates, step=rates.step.masked_fill(~allowed[:, :, : keys.shape[2]], 0.0))
        if self.predictor is None:  # the engine compares the loss, which it alone knows, with the threshold
            chunks = StoreChunks(keys, values, rates, span.first, residual, self.surprise_threshold)
            return chunks, ChunkCarry(tail), None
        error, last = self.predictor(span.tokens, carry.last_token)
        rates = admit(rates, of_pairs(error, c, h, u, keys.shape[2]), self.surprise_threshold)
        return StoreChunks(keys, values, rates, span.first, residual), ChunkCarry(tail, last), error
