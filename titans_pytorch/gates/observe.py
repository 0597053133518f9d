"""Trace of gates and pages along a sequence, its plot, and the threshold for a wanted switch rate.

Letters: b batch, n tokens, m chunks, h internal heads (page * heads + head), p pages.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, flags, missing, of_kind, wrong
from titans_pytorch.common.files import replacing
from titans_pytorch.gates import checks
from titans_pytorch.gates.gates import gates_of
from titans_pytorch.gates.limits import FixedLimit
from titans_pytorch.gates.pages import Pages
from titans_pytorch.gates.stages import GateCarry, Span
from titans_pytorch.memory.arguments import as_views, checked_state
from titans_pytorch.memory.state import NeuralMemState


@dataclass(frozen=True)
class GateTrace:
    """Values of gates and pages for the m = floor(tokens / chunk) complete chunks of a call.

    complexity_tokens: [b n], complexity of each token; None with kinetics alone. With DMD a token has its chunk's
        score; with both gates, the mean of that and its own.
    complexity: [b m], the largest complexity of each chunk; None with kinetics alone.
    decay_before: [b h m], forget gate of each chunk before gates and kinetics.
    decay_after: [b h m], forget gate after them.
    page: long [b m], the page that each chunk is written to.
    switched: bool [b m], whether the row switched pages at the chunk.
    limit: [b m], the complexity above which a chunk switches.
    windows: long [m], the switch window of each chunk.
    pages: number of pages.
    chunk: tokens per chunk.
    """

    complexity_tokens: Tensor | None
    complexity: Tensor | None
    decay_before: Tensor
    decay_after: Tensor
    page: Tensor
    switched: Tensor
    limit: Tensor
    windows: Tensor
    pages: int
    chunk: int

    @property
    def occupancy(self) -> Tensor:
        """Share of the chunks that each page was written with: [b p]."""
        return torch.nn.functional.one_hot(self.page, self.pages).double().mean(dim=1)

    @property
    def switch_rate(self) -> float:
        """Switches per switch window, over all rows: in [0, 1]."""
        return self.switched.sum().item() / (len(self.page) * len(self.windows.unique()))


@torch.no_grad()
def gate_trace(memory, seq: Tensor, state: NeuralMemState | None = None) -> GateTrace:
    """Trace gates, kinetics and pages of a memory for a call, without writing or counting anything. Tokens of an
    incomplete chunk are left out.

    Args:
        memory: a NeuralMemory with gates or kinetics.
        seq: as for its forward.
        state: as for its forward.

    Returns:
        A GateTrace.

    Raises:
        ValueError: for a memory without gates, or too few tokens for a chunk.
    """
    gates = gates_of(memory)
    if gates is None or not gates.stages:
        takes = "a NeuralMemory with use_symplectic_gating, use_dmd_gating or kinetics_coupling"
        raise wrong("memory", Words(f"{type(memory).__name__} without gates"), takes)
    _, tokens = as_views(seq, None, memory.dim, memory.diff_views)
    state = checked_state(memory, state, memory._expected(tokens))
    if state.cache_store_segment is not None:
        tokens = torch.cat((state.cache_store_segment, tokens), dim=-2)
    b, n, chunk = *tokens.shape[-3:-1], memory.store_chunk_size
    if n < chunk:
        raise wrong("seq", Words(f"{n} tokens"), f"at least one complete chunk, {chunk}")
    chunks = memory.chunk_views(tokens[..., : n // chunk * chunk, :])
    span = Span(chunks.keys, chunk, state.seq_index // chunk, memory.mini_batch)
    before = memory.rates_of(span.tokens, with_residual=False)
    gated = gates.decide(span, before, gates.start(GateCarry.of(state), b, tokens.device))

    pages, choice, score = _pages(memory), gated.choice, gated.score
    m, device = len(span), tokens.device
    page = torch.zeros(b, m, dtype=torch.long, device=device) if choice is None else choice.page
    limit = torch.as_tensor(math.inf if choice is None else choice.limit, device=device)
    of_tokens = None if score is None else score.tokens.expand(b, m, chunk).flatten(1)
    return GateTrace(
        complexity_tokens=of_tokens,
        complexity=None if score is None else score.chunk,
        decay_before=(1.0 - before.retention).unflatten(0, (b, -1)),
        decay_after=(1.0 - gated.rates.retention).unflatten(0, (b, -1)),
        page=page,
        switched=torch.zeros_like(page, dtype=torch.bool) if choice is None else choice.switched,
        limit=limit.expand(b, m),
        windows=torch.arange(m, device=device) * 0 if pages is None else pages.windows_of(span, device)[0],
        pages=memory.num_pages,
        chunk=chunk,
    )


def calibrate_page_threshold(memory, tokens: Tensor, target_switch_rate: float, set_threshold: bool = False) -> float:
    """Return the page threshold with which a memory switches pages in a given share of its switch windows.

    A switch window allows one switch: `page_switch_every` tokens, or a call (or a mini-batch of it). The windows of the
    sample are ranked by their largest complexity. The threshold lies between two of them, where the share above comes
    closest to the target. With few windows, or many of equal complexity, it may miss the target;
    `gate_trace(...).switch_rate` tells the rate reached. It holds for data like the sample, and for the present
    weights.

    Args:
        memory: a NeuralMemory with pages and a fixed threshold.
        tokens: a sample, as NeuralMemory's forward takes it.
        target_switch_rate: switches per window and row, in [0, 1].
        set_threshold: also make it the memory's `symplectic_page_threshold`.

    Raises:
        ValueError: for another memory, or a rate outside [0, 1].
    """
    checks.fraction("target_switch_rate", target_switch_rate)
    flags(set_threshold=set_threshold)
    pages = _pages(memory)
    if pages is None or not isinstance(pages.limit, FixedLimit):
        got = Words(f"{type(memory).__name__} {'without pages' if pages is None else 'with page_threshold_quantile'}")
        raise wrong("memory", got, "a NeuralMemory with num_pages > 1 and a fixed threshold")
    trace = gate_trace(memory, tokens)
    assert trace.complexity is not None  # pages need a gate
    highest = torch.stack(
        [trace.complexity[:, trace.windows == window].amax(dim=-1) for window in trace.windows.unique()], dim=1
    )
    threshold = threshold_for_rate(highest, target_switch_rate)
    if set_threshold:
        memory.symplectic_page_threshold = threshold
    return threshold


def threshold_for_rate(highest: Tensor, rate: float) -> float:
    """Return the threshold for which the share of entries above it is closest to `rate`. highest, of any shape: the
    largest complexity of each switch window. The threshold lies halfway between two of them, or at the largest.
    """
    values, counts = highest.double().flatten().unique(return_counts=True)
    below = values.new_zeros(1) if values[0] > 0 else values[:1] - 1.0
    # between neighbours, and at the highest, which nothing exceeds
    thresholds = torch.cat(((torch.cat((below, values[:-1])) + values) / 2, values[-1:]))
    rates = torch.cat((counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1))) / highest.numel()
    best = (rates - rate).abs().argmin()
    return thresholds[best].item()


def plot_gate_trace(trace: GateTrace, path, row: int = 0) -> Path:
    """Draw one row of a trace to a PNG file: complexity and its limit, forget gate before and after, pages and the
    share of chunks written to each. Needs matplotlib (the extra `bench`).

    Args:
        trace: the result of `gate_trace`.
        path: the file; its folder is made.
        row: index of the row in the batch.

    Returns:
        The path.

    Raises:
        ValueError: for a row that the trace does not have.
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("plot_gate_trace", "matplotlib", "bench") from error

    of_kind(trace, GateTrace, "trace", "the GateTrace of a memory")
    path = Path(of_kind(path, (str, os.PathLike), "path", "the path of a PNG file"))
    if trace.complexity is None or trace.complexity_tokens is None:
        raise wrong("trace", Words("one without complexity"), "the trace of a memory with a gate")
    if not isinstance(row, int) or not -len(trace.page) <= row < len(trace.page):
        raise wrong("row", row, f"a row of the trace, {len(trace.page)}")
    m, chunk = trace.page.shape[1], trace.chunk
    edges = [i * chunk for i in range(m + 1)]

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(6, 1))
    top, middle, bottom = (figure.add_subplot(grid[i, 0]) for i in range(3))
    side = figure.add_subplot(grid[2, 1], sharey=bottom)

    def steps(axes, values, **style):
        values = values.detach().double().cpu()
        axes.stairs(values.tolist(), edges, baseline=None, **style)

    top.plot(
        [i + 0.5 for i in range(m * chunk)],
        trace.complexity_tokens[row].double().cpu().tolist(),
        color="tab:blue",
        alpha=0.35,
        linewidth=0.8,
        label="token",
    )
    steps(top, trace.complexity[row], color="tab:blue", label="chunk")
    if trace.pages > 1:
        limit = trace.limit[row]
        steps(top, limit.masked_fill(limit.isinf(), math.nan), color="tab:red", linestyle="--", label="limit")
    switches = (trace.switched[row].nonzero().flatten() * chunk).tolist()
    for axes in (top, middle, bottom):
        for i, at in enumerate(switches):
            axes.axvline(at, color="gray", linewidth=0.7, label="switch" if i == 0 and axes is top else None)
        axes.set_xlim(0, m * chunk)
        axes.grid(alpha=0.3)
    top.set_ylabel("complexity")
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)

    steps(middle, trace.decay_before[row].mean(dim=0), color="gray", label="before")
    steps(middle, trace.decay_after[row].mean(dim=0), color="tab:green", label="after")
    middle.set_ylabel("forget gate (mean of heads)")
    middle.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)

    steps(bottom, trace.page[row], color="tab:purple")
    bottom.set(ylabel="page", xlabel="token", yticks=range(trace.pages), ylim=(-0.5, trace.pages - 0.5))
    shares = trace.occupancy[row].tolist()
    side.barh(range(trace.pages), shares, color="tab:purple", alpha=0.5)
    side.set(xlabel="share of chunks", xlim=(0, 1))
    side.tick_params(labelleft=False)
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    return path


def _pages(memory) -> Pages | None:
    gates = gates_of(memory)
    return next((stage for stage in gates.stages if isinstance(stage, Pages)), None) if gates else None
