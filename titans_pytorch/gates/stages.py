"""Between the rates and the engine: what gates, kinetics and pages do to the rates of the chunks that a call stores.

Each idea is a stage, a small object without tensors of its own: learned parameters are in `Gates`, what is carried
between calls is in the memory's state.

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
    """What stages carry from call to call, fields of NeuralMemState, None where no stage uses them.

    gate_tokens [b k d]: the last stored tokens, normalised key view. active_page_indices [b]: the page being written.
    last_switch [b]: index of the switch window in which a row last turned a page, -1 for none. recent_complexity [b w]:
    of the last chunks.
    """

    gate_tokens: Tensor | None = None
    active_page_indices: Tensor | None = None
    last_switch: Tensor | None = None
    recent_complexity: Tensor | None = None

    @classmethod
    def of(cls, state) -> "GateCarry":
        """That of a NeuralMemState."""
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
        """(start, stop) of the chunks that are in one mini-batch, counted from the first."""
        return list(solve_windows(self.first, len(self), self.mini_batch, len(self)))


class Score(NamedTuple):
    """Complexity of every token [b m c] (or [b m 1]: of the chunk), and the circular mean of each chunk's phase angles
    [b m], where there is a phase."""

    tokens: Tensor
    angle: Tensor | None = None

    @property
    def chunk(self) -> Tensor:
        """The most complex token of each chunk: [b m]."""
        return self.tokens.amax(dim=-1)


class PageChoice(NamedTuple):
    """page long [b m]: which page each chunk is written to. switched bool [b m]. limit: a number or [b m], what a
    chunk's complexity has to exceed."""

    page: Tensor
    switched: Tensor
    limit: Tensor | float


class Gated(NamedTuple):
    """Rates after the stages so far, what is carried on, and what was decided."""

    rates: WriteRates
    carry: GateCarry
    score: Score | None = None
    choice: PageChoice | None = None


class Stage:
    """One idea."""

    def start(self, carry: GateCarry, batch: int, device: torch.device) -> GateCarry:
        """What stands in the state before the first chunk."""
        return carry

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        """The rates as this stage leaves them, and the carry with what it will need; what it carries is None where a
        sequence begins."""
        raise NotImplementedError
