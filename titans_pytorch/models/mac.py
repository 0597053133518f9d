"""MAC: memory as context, in the paper's order and causal (Titans, eq. 21 to 25).

S is a segment, M the memory at its start, P the persistent tokens:

    h = M(S W_q)                  read the memory, before the segment is written
    y = attention(P || h || S)    causal
    M_i = M_{i-1} + ...(y_i)      write attention's output to the memory, token by token
    o_i = y_i (x) M_i(y_i)        gate it with the memory's output

Taken literally, the paper's equations let a token see later ones in two places. Both are closed here:
- h has one token for each token of the segment, and h_j depends on x_j. So token i attends to h_j for j <= i only.
- A read after the whole segment was written, M*_t(y), depends on later tokens. So o_i reads the memory after y_1 ..
  y_i; at the segment's last token this is the paper's M_t. The rates are per token, so these states exist in any case.

Reads and writes share the memory's projections. Only y at the segment's own tokens is written.

Letters: b batch, n tokens, d features, k earlier tokens that the convolution of queries needs
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.common.identity import identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.decoding.steps import STEPS
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.attention import SegmentAttention, SegmentCache
from titans_pytorch.models.gates import Gate
from titans_pytorch.models.memory import Layer, PersistentTokens, Remember, check_memory, layer_step
from titans_pytorch.neural_memory import NeuralMemory


class MACState(NamedTuple):
    """What a layer carries between calls.

    filled: tokens of the segment read so far.
    context: name -> [b h ...], the fast weights at the segment's start; None for the initial ones.
    memory: the memory's state.
    attention: the segment's keys and values; None at its start.
    asked: [b k d], the last tokens that queried the memory.
    configuration: JSON, the layer's settings without the memory's; a layer of other settings refuses the state.
    """

    filled: int
    context: Mapping[str, Tensor] | None
    memory: NeuralMemState | None
    attention: SegmentCache | None
    asked: Tensor
    configuration: str | None = None


@known_keywords
class MACLayer(Layer):
    """Memory as context, [b n d] -> [b n d], segment by segment (arXiv 2501.00663, eq. 21 to 25).

    S is a segment, M the memory at its start, P the persistent tokens. h = M(S W_q) is read; y is causal attention over
    P || h || S; y is written to the memory; the output is gate(y, M(y)). The head of `models/mac.py` says how this is
    made causal.

    Args:
        dim: features of a token.
        heads: heads of attention, and of the default memory.
        segment: tokens of a segment.
        n_persistent: persistent tokens (eq. 19).
        gate: "normalised" (the paper's), "silu", "sigmoid" or "convex"; see `Gate`.
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.
        init_gate_bias: initial bias of the convex gate (None: 0); attention's share starts about its sigmoid.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    state_type = MACState

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        segment: int = 128,
        n_persistent: int = 4,
        gate: str = "normalised",
        memory: NeuralMemory | None = None,
        init_gate_bias: float | None = None,
    ):
        given = dict(locals())
        super().__init__()
        self.norm = RMSNorm(positive_int(dim, "dim"))
        self.persistent = PersistentTokens(n_persistent, dim)
        self.attention = SegmentAttention(dim, heads, segment)
        self.remember = Remember(check_memory(memory, dim, heads))
        self.gate = Gate(dim, gate, init_gate_bias)
        if self.remember.memory.reads_one_page:
            raise ValueError("MAC cannot be combined with read_active_page_only: it reads before its page is known")
        self.configuration = identity(MACLayer.__init__, given, ("memory", "init_gate_bias"))
        self.looks_back = self.remember.memory.projections.looks_back

    def _run(self, x: Tensor, state: MACState | None, run: Callable) -> tuple[Tensor, MACState, tuple[Tensor, ...]]:
        x = run(self.norm, x)
        if state is None:
            state = MACState(0, None, None, None, x[:, :0])
        self._check_segment(state)
        memory = self.remember.memory
        first = state.context
        context: Mapping[str, Tensor] = memory.init_weights(x.shape[0]) if first is None else _flat(first)
        outs, surprises = [], []
        start, n = 0, x.shape[1]
        while start < n:
            piece = x[:, start : start + self.attention.segment - state.filled]
            out, state, surprise = self._within_segment(piece, state, context, run)
            outs.append(out)
            surprises.append(surprise)
            start += piece.shape[1]
            if state.filled == self.attention.segment:
                assert state.memory is not None  # a segment was written
                assert state.memory.states is not None
                context = state.memory.states[0]
                state = state._replace(filled=0, context=_rows_first(context, x.shape[0]), attention=None)
        joined = tuple(torch.cat(parts, dim=-1) for parts in zip(*surprises, strict=True))
        return torch.cat(outs, dim=1), state, joined

    def _within_segment(
        self, x: Tensor, state: MACState, context: Mapping[str, Tensor], run: Callable
    ) -> tuple[Tensor, MACState, tuple[Tensor, ...]]:
        """Run the next tokens of one segment, x [b n d], normalised. context: the fast weights at its start."""
        asked = torch.cat((state.asked, x), dim=1)
        retrieved = self.remember.recall(asked, context, run)[:, -x.shape[1] :]
        y, cache = run(self.attention, x, retrieved, self.persistent(), state.attention)
        read, _, memory, surprises = run(self.remember, y, state.memory)
        asked = asked[:, max(asked.shape[1] - self.looks_back, 0) :].clone()
        filled = state.filled + x.shape[1]
        after = MACState(filled, state.context, memory, cache, asked, self.configuration)
        return run(self.gate, y, read, x), after, surprises

    def _check_segment(self, state: MACState) -> None:
        """Refuse a state made by hand that counts other tokens than its attention holds."""
        held = 0 if state.attention is None else state.attention.keys.shape[-2]
        if state.filled != held or not 0 <= held < self.attention.segment:
            takes = f"the {held} tokens in state.attention, fewer than a segment of {self.attention.segment}"
            raise wrong("state.filled", state.filled, takes)


STEPS[MACLayer] = layer_step


def _rows_first(weights: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: w.unflatten(0, (batch, -1)) for name, w in weights.items()}


def _flat(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.flatten(0, 1) for name, w in weights.items()}
