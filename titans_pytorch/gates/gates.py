"""Gates: the one object through which a NeuralMemory reaches gates, kinetics and pages.

Letters: b batch, m chunks, c tokens per chunk, d features.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.rules.rates import WriteRates

from .options import GateConfig
from .reading import EntryPages, given_page, hidden_heads
from .stages import GateCarry, Gated, Span

_counting = threading.Lock()


class Gates(nn.Module):
    """Changes the rates of the chunks that a call writes, and selects the page that each is written to.

    Args:
        config: the constructor's keywords.
    """

    def __init__(self, config: GateConfig):
        super().__init__()
        self.stages = config.stages()
        self.heads, self.pages, self.store_chunk = config.heads, config.num_pages, config.store_chunk
        self.reads_one_page = config.read_active_page_only and config.num_pages > 1
        self.symplectic_gate = config.gate()
        self.symplectic_complexity_scale = config.scale(config.use_symplectic_gating)
        self.dmd_complexity_scale = config.scale(config.use_dmd_gating)
        self.symplectic_page_threshold = config.threshold
        if config.num_pages > 1:
            self.register_buffer("page_switch_events", torch.tensor(0), persistent=False)
        else:
            self.page_switch_events = torch.tensor(0, device="cpu")  # constant: no buffer for DDP to broadcast

    @property
    def internal_heads(self) -> int:
        """Heads of all pages."""
        return self.heads * self.pages

    def start(self, carry: GateCarry, batch: int, device: torch.device) -> GateCarry:
        """Return the carry before the first chunk."""
        for stage in self.stages:
            carry = stage.start(carry, batch, device)
        return carry

    def decide(self, span: Span, rates: WriteRates, carry: GateCarry) -> Gated:
        """Return the result of all stages for a span, without counting switches."""
        gated = Gated(rates, carry)
        for stage in self.stages:
            gated = stage(self, span, gated)
        return gated

    def forward(self, tokens: Tensor, rates: WriteRates | None, state, first: int, mini_batch: int | None):
        """Gate one call.

        Args:
            tokens: the normalised key view of its complete chunks [b m*c d].
            rates: rates of these chunks; None without chunks.
            state: the NeuralMemState given to the call.
            first: the absolute index of the first chunk.
            mini_batch: chunks of a mini-batch; None for one mini-batch.

        Returns:
            The gated rates, the fields of the next state, and the pages of its entries (`read_active_page_only`, else
            None).
        """
        carry = self.start(GateCarry.of(state), tokens.shape[0], tokens.device)
        page, written = carry.active_page_indices, None
        if rates is not None:
            gated = self.decide(Span(tokens, self.store_chunk, first, mini_batch), rates, carry)
            self._count(gated)
            rates, carry = gated.rates, gated.carry
            written = None if gated.choice is None else gated.choice.page
        pages = None if page is None or not self.reads_one_page else self._entry_pages(first, page, written)
        return rates, carry._asdict(), pages

    def hidden(self, page, batch: int, n: int) -> Tensor | None:
        """Return the heads that n tokens do not read if they read the caller's page alone: bool [b h n]; else None."""
        if not self.reads_one_page:
            return None
        return hidden_heads(given_page(page, self.pages, batch, n), self.heads, self.pages)

    def _entry_pages(self, first: int, before: Tensor, written: Tensor | None) -> EntryPages:
        page = before.unsqueeze(-1)
        page = page if written is None else torch.cat((page, written), dim=1)
        return EntryPages(first, page, self.heads, self.pages)

    def _count(self, gated: Gated) -> None:
        """Add the switches to `page_switch_events`, unless a backward pass recomputes a forward pass.

        torch.func takes pure functions: within its transforms nothing is counted.
        """
        if gated.choice is None or torch._C._are_functorch_transforms_active():
            return
        switches = gated.choice.switched.sum()
        if torch.compiler.is_compiling():
            self.page_switch_events += switches
        elif torch._C._current_graph_task_id() == -1:
            with _counting:
                self.page_switch_events += switches


def gates_of(memory: Any) -> Gates | None:
    """Return the gates of a NeuralMemory; None if it has none, or is not a memory."""
    gates = getattr(memory, "gates", None)
    return gates if isinstance(gates, Gates) else None
