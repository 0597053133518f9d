"""Stages between the rates and the engine. Gates, kinetics and pages change the rates of the chunks that a call writes.

A stage is a small object without tensors of its own: `Gates` holds the learned parameters, and the memory's state
carries tensors between calls.

Letters: b batch, n tokens, m chunks, c tokens per chunk, h internal heads (page * heads + head), k earlier tokens,
w window.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops.positions import solve_windows
from titans_pytorch.rules.rates import WriteRates


class GateCarry(NamedTuple):
    """The tensors that stages carry from call to call: fields of NeuralMemState, None if no stage uses them.

    gate_tokens [b k d]: the last written tokens, normalised key view. active_page_indices [b]: the page being written.
    last_switch [b]: index of the switch window in which a row last switched, -1 for none. recent_complexity [b w]:
    complexities of the last chunks.
    """

    gate_tokens: Tensor | None = None
    active_page_indices: Tensor | None = None
    last_switch: Tensor | None = None
    recent_complexity: Tensor | None = None

    @classmethod
    def of(cls, state) -> "GateCarry":
        """Return the carry in a NeuralMemState."""
        return cls(*(getattr(state, name) for name in cls._fields))


@dataclass(frozen=True)
class Span:
    """Complete chunks that one call writes.

    tokens: the normalised key view [b m*c d]. chunk: tokens per chunk. first: the absolute index of the first chunk.
    mini_batch: chunks of a mini-batch; None for one mini-batch.
    """

    tokens: Tensor
    chunk: int
    first: int
    mini_batch: int | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1] // self.chunk

    def parts(self) -> list[tuple[int, int]]:
        """Return (start, stop) of the chunks of each mini-batch, counted from the first chunk."""
        return list(solve_windows(self.first, len(self), self.mini_batch, len(self)))


class Score(NamedTuple):
    """Complexity of every token [b m c] (or of every chunk [b m 1]), and the circular mean of each chunk's phase angles
    [b m]; None without a phase.
    """

    tokens: Tensor
    angle: Tensor | None = None

    @property
    def chunk(self) -> Tensor:
        """The largest complexity of each chunk: [b m]."""
        return self.tokens.amax(dim=-1)


class PageChoice(NamedTuple):
    """The pages of chunks. page: long [b m], the page each chunk is written to. switched: bool [b m]. limit: a number
    or [b m], the complexity above which a chunk switches.
    """

    page: Tensor
    switched: Tensor
    limit: Tensor | float


class Gated(NamedTuple):
    """The rates after the stages so far, the carry, and the decisions."""

    rates: WriteRates
    carry: GateCarry
    score: Score | None = None
    choice: PageChoice | None = None


class Stage:
    """One change of the rates, such as a gate."""

    def start(self, carry: GateCarry, batch: int, device: torch.device) -> GateCarry:
        """Return the carry with this stage's values before the first chunk."""
        return carry

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        """Return the rates after this stage, and the carry for the next span. Fields of the carry are None at the start
        of a sequence.
        """
        raise NotImplementedError
