"""Between the rates and the engine: what gates, kinetics and pages do to the rates of the chunks that a call stores.

Each idea is a stage, a small object without tensors of its own: learned parts stand in the memory (`host`), what must
be carried stands in its state. A memory without gates has no stages, and nothing is computed.

Letters: b batch, n tokens, m chunks, c tokens per chunk, h internal heads (page * heads + head), k earlier tokens,
w window.
"""

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.memory.rates import StoreRates

_counting = threading.Lock()


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
    """Complete chunks that one call stores: tokens [b m*c d], the normalised key view, and values, the value view;
    `chunk` tokens per chunk; the absolute index of the first; how many share an anchor (None: all)."""

    tokens: Tensor
    values: Tensor
    chunk: int
    first: int
    anchor_chunks: int | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1] // self.chunk

    def parts(self) -> list[tuple[int, int]]:
        """From which chunk to which those go that share an anchor, counted from the first."""
        size = self.anchor_chunks or len(self)
        inner = range(size - self.first % size, len(self), size) if self.anchor_chunks else ()
        return list(pairwise((0, *inner, len(self))))


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

    rates: StoreRates
    carry: GateCarry
    score: Score | None = None
    choice: PageChoice | None = None


class Stage:
    """One idea."""

    def start(self, carry: GateCarry, batch: int, device: torch.device) -> GateCarry:
        """What stands in the state before the first chunk."""
        return carry

    def __call__(self, host: nn.Module, span: Span, gated: Gated) -> Gated:
        """The rates as this stage leaves them, and the carry with what it will need; what it carries is None where a
        sequence begins."""
        raise NotImplementedError


class Stages:
    """Stages in order; without any, rates and carry are handed on as they are."""

    def __init__(self, *stages: Stage):
        self.stages = stages

    def start(self, carry: GateCarry, batch: int, device: torch.device) -> GateCarry:
        for stage in self.stages:
            carry = stage.start(carry, batch, device)
        return carry

    def __call__(self, host: nn.Module, span: Span, rates: StoreRates, carry: GateCarry) -> Gated:
        gated = Gated(rates, carry)
        for stage in self.stages:
            gated = stage(host, span, gated)
        return gated

    def count(self, host: nn.Module, gated: Gated) -> None:
        """Adds the switches to `host.page_switch_events`, unless a backward pass computes a forward pass again.
        torch.func takes a pure function: within its transforms nothing is counted."""
        if gated.choice is None or torch._C._are_functorch_transforms_active():
            return
        switches = gated.choice.switched.sum()
        if torch.compiler.is_compiling():
            host.page_switch_events += switches
        elif torch._C._current_graph_task_id() == -1:
            with _counting:
                host.page_switch_events += switches
