"""MAC: memory as context, in the paper's order and causal (Titans, eq. 21 to 25).

For each segment S of a sequence, with M the memory at its start and P the persistent tokens:

    h = M(S W_q)                  retrieve, before anything of the segment is stored
    y = attention(P || h || S)    causal
    M_i = M_{i-1} + ...(y_i)      the memory is updated with attention's output, token by token
    o_i = y_i (x) M_i(y_i)        and gates it

Taken literally the paper's equations see the future in two places, both closed here:
- h has one retrieved token for every token of the segment, and h_j depends on x_j. Token i sees h_j for j <= i only.
- M*_t(y) read after the update with the whole segment has seen later tokens. Here o_i reads the memory as it is after
  y_1 .. y_i, which at the segment's last token is the paper's M_t. The rates are per token, so that the memory passes
  through these states in any case.

Retrieval and update share the memory's projections. What enters the memory is y at the segment's own tokens.

Letters: b batch, n tokens, d features, k tokens that the convolution of queries looks back on
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.checks import positive_int, wrong
from titans_pytorch.identity import identity
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.norms import RMSNorm

from .attention import SegmentAttention, SegmentCache
from .gates import Gate
from .memory import Layer, PersistentTokens, Remember, check_memory


class MACState(NamedTuple):
    """filled: tokens of the segment read so far. context: name -> [b h ...], the memory at its start, None where that
    is the initial one. memory: as it is now. attention: the segment's keys and values, None at its start.
    asked: [b k d], the last tokens that retrieved. configuration: JSON, the layer's settings but for the memory's; a
    layer of other settings refuses the state."""

    filled: int
    context: Mapping[str, Tensor] | None
    memory: NeuralMemState | None
    attention: SegmentCache | None
    asked: Tensor
    configuration: str | None = None


class MACLayer(Layer):
    """[b n d] -> [b n d], segment by segment: memory as context (arXiv 2501.00663, eq. 21 to 25).

    Of each segment S, with M the memory at its start and P the persistent tokens: h = M(S W_q) is retrieved, y is
    causal attention over P || h || S, the memory learns y, and answers o = gate(y, M(y)). How this is made causal
    stands at the file's head.

    Args:
        dim: features of a token.
        heads: of attention, and of the memory where none is given.
        segment: tokens of a segment.
        n_persistent: persistent tokens (eq. 19).
        gate: "normalised" (the paper's), "silu" or "sigmoid"; see `Gate`.
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        segment: int = 128,
        n_persistent: int = 4,
        gate: str = "normalised",
        memory: NeuralMemory | None = None,
    ):
        given = dict(locals())
        super().__init__()
        self.norm = RMSNorm(positive_int(dim, "dim"))
        self.persistent = PersistentTokens(n_persistent, dim)
        self.attention = SegmentAttention(dim, heads, segment)
        self.remember = Remember(check_memory(memory, dim, heads))
        self.gate = Gate(dim, gate)
        if self.remember.memory.reads_one_page:
            raise ValueError("MAC cannot be combined with read_active_page_only: it reads before its page is known")
        self.configuration = identity(MACLayer.__init__, given, ("memory",))
        self.looks_back = (self.remember.memory.conv_kernel or 1) - 1

    def forward(self, x: Tensor, state: MACState | None = None, return_surprises: bool = False):
        """Reads the tokens that follow those in the state.

        Args:
            x: tokens [b n d].
            state: what the call before returned; None where a sequence begins.
            return_surprises: also return (loss, step), each [b h n], as NeuralMemory does.

        Returns:
            (out [b n d], state), and (loss, step) if asked for. The residual is the caller's.
        """
        self._check_call(x, state, MACState, return_surprises)
        x = self.norm(x)
        if state is None:
            state = MACState(0, None, None, None, x[:, :0])
        self._check_segment(state)
        memory = self.remember.memory
        context = memory.init_weights(x.shape[0]) if state.context is None else _flat(state.context)
        outs, surprises = [], []
        start, n = 0, x.shape[1]
        while start < n:
            piece = x[:, start : start + self.attention.segment - state.filled]
            out, state, surprise = self._within_segment(piece, state, context)
            outs.append(out), surprises.append(surprise)
            start += piece.shape[1]
            if state.filled == self.attention.segment:
                context = state.memory.states[0]
                state = state._replace(filled=0, context=_rows_first(context, x.shape[0]), attention=None)
        out = torch.cat(outs, dim=1)
        if not return_surprises:
            return out, state
        return out, state, tuple(torch.cat(parts, dim=-1) for parts in zip(*surprises, strict=True))

    def _within_segment(self, x: Tensor, state: MACState, context: Mapping[str, Tensor]):
        """x [b n d], normalised: the next tokens of one segment, whose memory at the start is context."""
        asked = torch.cat((state.asked, x), dim=1)
        retrieved = self.remember.memory.retrieve_memories(asked, context)[:, -x.shape[1] :]
        y, cache = self.attention(x, retrieved, self.persistent(), state.attention)
        read, _, memory, surprises = self.remember(y, state.memory)
        asked = asked[:, max(asked.shape[1] - self.looks_back, 0) :].clone()
        filled = state.filled + x.shape[1]
        return self.gate(y, read), MACState(filled, state.context, memory, cache, asked, self.configuration), surprises

    def _check_segment(self, state: MACState) -> None:
        """Of a state made by hand: the tokens of its segment are those that attention holds."""
        held = 0 if state.attention is None else state.attention.keys.shape[-2]
        if state.filled != held or not 0 <= held < self.attention.segment:
            takes = f"the {held} tokens in state.attention, fewer than a segment of {self.attention.segment}"
            raise wrong("state.filled", state.filled, takes)


def _rows_first(weights: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: w.unflatten(0, (batch, -1)) for name, w in weights.items()}


def _flat(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.flatten(0, 1) for name, w in weights.items()}
