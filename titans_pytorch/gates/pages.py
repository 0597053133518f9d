"""The stage that switches pages: when (limits), to which page (paging), and the effect on the rates.

Letters as in `stages`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_pytorch.gates.limits import FixedLimit, QuantileLimit
from titans_pytorch.gates.paging import Router, active_rows, first_of_window, turn_pages
from titans_pytorch.gates.stages import GateCarry, Gated, PageChoice, Span, Stage
from titans_pytorch.ops.positions import window_of


@dataclass(frozen=True)
class CallWindows:
    """At most one switch in a call, or in each mini-batch of it."""

    def chunks_of(self, span: Span) -> int | None:
        return span.mini_batch

    def spent(self, windows: Tensor, carry: GateCarry) -> Tensor | None:
        return None

    def mark(self, windows: Tensor, switched: Tensor, carry: GateCarry) -> GateCarry:
        return carry


@dataclass(frozen=True)
class FixedWindows:
    """At most one switch in each `chunks` chunks, counted from the start of the sequence, however it is cut."""

    chunks: int

    def chunks_of(self, span):
        return self.chunks

    def spent(self, windows, carry):
        return None if carry.last_switch is None else windows == carry.last_switch.unsqueeze(-1)

    def mark(self, windows, switched, carry):
        last = torch.where(switched, windows, -1).amax(dim=-1)
        earlier = carry.last_switch
        return carry._replace(last_switch=last if earlier is None else torch.maximum(last, earlier))


@dataclass(frozen=True)
class Pages(Stage):
    """The stage that selects the page to write. Inactive pages do not change."""

    pages: int
    heads: int  # of one page
    router: Router
    limit: FixedLimit | QuantileLimit
    windows: CallWindows | FixedWindows

    def start(self, carry, batch, device):
        if carry.active_page_indices is not None:
            return carry
        return carry._replace(active_page_indices=torch.zeros(batch, dtype=torch.long, device=device))

    def windows_of(self, span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the switch window of each chunk, and the window's first chunk in the span, both long [m]."""
        return window_of(span.first, len(span), self.windows.chunks_of(span), device)

    @torch.no_grad()
    def choose(self, gates, span: Span, gated: Gated) -> tuple[PageChoice, GateCarry]:
        carry, score, page = gated.carry, gated.score, gated.carry.active_page_indices
        assert score is not None  # pages need a gate
        assert page is not None  # `start` has set it
        complexity = score.chunk.detach()
        # thresholds are not rounded to half precision
        complexity = complexity.float() if complexity.dtype.itemsize < 4 else complexity
        windows, starts = self.windows_of(span, complexity.device)
        limit, carry = self.limit(gates, complexity, carry)
        switched = first_of_window(complexity > limit, starts, self.windows.spent(windows, carry))
        page = turn_pages(page, switched, complexity, score.angle, self.router, self.pages)
        carry = self.windows.mark(windows, switched, carry._replace(active_page_indices=page[:, -1].clone()))
        return PageChoice(page, switched, limit), carry

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        choice, carry = self.choose(gates, span, gated)
        active, rows = active_rows(choice.page, self.pages, self.heads)
        step = gated.rates.learning_rate.masked_fill(~active.unsqueeze(-1), 0.0)
        rates = replace(gated.rates, learning_rate=step, active=active, active_rows=rows)
        return gated._replace(rates=rates, carry=carry, choice=choice)
