"""What pages did in an evaluation: switches per opportunity, and how much each page was written.

Letters: b batch, m chunks, p pages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from titans_pytorch import NeuralMemory
from titans_pytorch.gating.pages import FixedWindows, Pages
from titans_pytorch.gating.stages import Gated, Span, Stage, Stages


@dataclass
class Switches:
    """events: switches; opportunities: switch windows x rows; written: chunks that each page was written with."""

    events: int = 0
    opportunities: int = 0
    written: list[int] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        total = sum(self.written)
        return {
            "events": self.events,
            "opportunities": self.opportunities,
            "switch_rate": self.events / self.opportunities if self.opportunities else 0.0,
            "occupancy": [count / total for count in self.written] if total else [],
        }


@dataclass(frozen=True)
class Watch(Stage):
    """A last stage that changes nothing and counts what the one before it chose."""

    pages: Pages
    seen: Switches

    def __call__(self, host: nn.Module, span: Span, gated: Gated) -> Gated:
        page, switched = gated.choice.page, gated.choice.switched
        opportunities = len(self.pages.windows_of(span, page.device)[0].unique())
        if isinstance(self.pages.windows, FixedWindows):
            opportunities -= bool(span.first % self.pages.windows.chunks)  # an earlier call has counted that window
        self.seen.events += int(switched.sum())
        self.seen.opportunities += len(page) * opportunities
        counts = torch.bincount(page.flatten(), minlength=self.pages.pages).tolist()
        before = self.seen.written + [0] * (len(counts) - len(self.seen.written))
        self.seen.written = [a + b for a, b in zip(before, counts, strict=True)]
        return gated


@contextmanager
def watched(model: nn.Module) -> Iterator[Switches]:
    """Counts what the paged memories of the model do while it is called."""
    seen, kept = Switches(), {}
    for module in model.modules():
        stages = module.gating.stages if isinstance(module, NeuralMemory) else ()
        pages = next((stage for stage in stages if isinstance(stage, Pages)), None)
        if pages is not None:
            kept[module] = module.gating
            module.gating = Stages(*stages, Watch(pages, seen))
    try:
        yield seen
    finally:
        for module, gating in kept.items():
            module.gating = gating


def warning(name: str, record: dict[str, object] | None) -> str | None:
    """One line where paging was not exercised."""
    if not record or not record["opportunities"] or record["switch_rate"] not in (0.0, 1.0):
        return None
    how = "never turned" if record["switch_rate"] == 0.0 else "turned at every opportunity"
    return f"{name}: pages were {how} (switch rate {record['switch_rate']:.0%}), so paging by choice was not exercised"
