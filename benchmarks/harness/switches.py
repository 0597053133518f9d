"""Observes page switches while a model is called, counts them, and sets thresholds for a target rate.

Letters: b batch, m chunks, p pages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titans_pytorch import NeuralMemory
from titans_pytorch.gates.gates import gates_of
from titans_pytorch.gates.observe import threshold_for_rate
from titans_pytorch.gates.pages import FixedWindows, Pages
from titans_pytorch.gates.stages import Gated, Span, Stage


@dataclass(frozen=True)
class Call:
    """One call of one paged memory (calls that write no complete chunk are left out).

    complexity [b m]: of each chunk, with the gate's gradient. page long, switched bool [b m]. windows long [m]: in
    which switch window each chunk lies. opportunities: switch windows that began in this call, for each row.
    """

    memory: NeuralMemory
    complexity: Tensor
    page: Tensor
    switched: Tensor
    windows: Tensor
    opportunities: int


@dataclass(frozen=True)
class Listen(Stage):
    """A last stage that changes nothing and reports the choice of the stage before it."""

    memory: NeuralMemory
    pages: Pages
    tell: Callable[[Call], object]

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        page, switched = gated.choice.page, gated.choice.switched
        windows = self.pages.windows_of(span, page.device)[0]
        begun = len(windows.unique())
        if isinstance(self.pages.windows, FixedWindows):
            begun -= bool(span.first % self.pages.windows.chunks)  # that window began in an earlier call
        complexity = gated.score.chunk.expand_as(page)
        self.tell(Call(self.memory, complexity, page, switched, windows, begun))
        return gated


@contextmanager
def heard(model: nn.Module, tell: Callable[[Call], object]) -> Iterator[None]:
    """Within this context, `tell` receives every Call of the model's paged memories."""
    kept = {}
    for module in model.modules():
        gates = gates_of(module) if isinstance(module, NeuralMemory) else None
        pages = next((stage for stage in gates.stages if isinstance(stage, Pages)), None) if gates else None
        if pages is not None:
            kept[gates] = gates.stages
            gates.stages = (*gates.stages, Listen(module, pages, tell))
    try:
        yield
    finally:
        for gates, stages in kept.items():
            gates.stages = stages


@dataclass
class Switches:
    """events: switches; by_memory: those of each memory; opportunities: switch windows x rows; written: chunks
    written to each page."""

    events: int = 0
    by_memory: dict[NeuralMemory, int] = field(default_factory=dict)
    opportunities: int = 0
    written: list[int] = field(default_factory=list)

    def add(self, call: Call) -> None:
        events = int(call.switched.sum())
        self.events += events
        self.by_memory[call.memory] = self.by_memory.get(call.memory, 0) + events
        self.opportunities += len(call.page) * call.opportunities
        counts = torch.bincount(call.page.flatten(), minlength=call.memory.num_pages).tolist()
        before = self.written + [0] * (len(counts) - len(self.written))
        self.written = [a + b for a, b in zip(before, counts, strict=True)]

    def record(self) -> dict[str, object]:
        total = sum(self.written)
        return {
            "events": self.events,
            "layers": list(self.by_memory.values()),
            "opportunities": self.opportunities,
            "switch_rate": self.events / self.opportunities if self.opportunities else 0.0,
            "occupancy": [count / total for count in self.written] if total else [],
        }


@contextmanager
def watched(model: nn.Module) -> Iterator[Switches]:
    """Within this context, count the switches of the model's paged memories."""
    seen = Switches()
    with heard(model, seen.add):
        yield seen


@torch.no_grad()
def set_thresholds(model: nn.Module, run: Callable[[], object], rate: float) -> None:
    """Set each paged memory's threshold so that it switches at this share of the opportunities in run()."""
    highest: dict[NeuralMemory, list[Tensor]] = {}

    def note(call: Call) -> None:
        of_windows = [call.complexity[:, call.windows == w].amax(dim=-1) for w in call.windows.unique()]
        highest.setdefault(call.memory, []).extend(of_windows)

    with heard(model, note):
        run()
    for memory, found in highest.items():
        memory.symplectic_page_threshold = threshold_for_rate(torch.cat(found), rate)


def warning(name: str, record: dict[str, object] | None) -> str | None:
    """Return a line if pages never or always switched."""
    if not record or not record["opportunities"]:
        return None
    if record["switch_rate"] > 0.0 and max(record["occupancy"], default=0.0) > 0.99:
        return (
            f"{name}: pages were turned, but all to one that holds {max(record['occupancy']):.1%} of what was written"
        )
    if record["switch_rate"] not in (0.0, 1.0):
        return None
    how = "never turned" if record["switch_rate"] == 0.0 else "turned at every opportunity"
    return f"{name}: pages were {how} (switch rate {record['switch_rate']:.0%}), so paging by choice was not exercised"
