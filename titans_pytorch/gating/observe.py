"""What gates and pages do to a sequence: a trace of it, its picture, and the threshold that gives a wanted switch rate.

Letters: b batch, n tokens, m chunks, h internal heads (page * heads + head), p pages.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checks import Words, flags, missing, of_kind, wrong
from ..files import replacing
from ..memory_inputs import as_views, checked_state
from ..memory_state import NeuralMemState
from . import checks
from .limits import FixedLimit
from .pages import Pages
from .stages import GateCarry, Stages


@dataclass(frozen=True)
class GateTrace:
    """What gates and pages did in one call, of the chunks that it would store, m = floor(tokens / chunk).

    complexity_tokens: [b n], of each token; None with kinetics alone. With DMD a token has its chunk's score (or the
    mean of that and its own, with both gates).
    complexity: [b m], the largest of each chunk; None with kinetics alone.
    decay_before: [b h m], of each chunk, without gates and kinetics.
    decay_after: [b h m], with them.
    page: long [b m], which one a chunk is written to.
    switched: bool [b m], whether it turned to it.
    limit: [b m], what its complexity had to exceed.
    windows: long [m], in which switch window it lies.
    pages: how many there are.
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
    """What the gates, kinetics and pages of a memory would do if it were called, of which nothing is written or
    counted. Only complete chunks are seen.

    Args:
        memory: a NeuralMemory with gates or kinetics.
        seq: as in its forward.
        state: what it carries, as in its forward.

    Returns:
        A GateTrace.

    Raises:
        ValueError: for a memory without gates, or too few tokens for a chunk.
    """
    if not isinstance(getattr(memory, "gating", None), Stages) or not memory.gating.stages:
        takes = "a NeuralMemory with use_symplectic_gating, use_dmd_gating or kinetics_coupling"
        raise wrong("memory", Words(f"{type(memory).__name__} without gates"), takes)
    state = checked_state(memory, state)
    tokens = as_views(seq, None, memory.dim, memory.diff_views).store
    memory._expected(tokens).check(state)
    if state.cache_store_segment is not None:
        tokens = torch.cat((state.cache_store_segment, tokens), dim=-2)
    b, n, chunk = *tokens.shape[-3:-1], memory.store_chunk_size
    if n < chunk:
        raise wrong("seq", Words(f"{n} tokens"), f"at least one complete chunk, {chunk}")
    span = memory.span(tokens[..., : n // chunk * chunk, :], state.seq_index // chunk)
    before = memory.learned_rates(span, False)
    carry = memory.gating.start(GateCarry.of(state), b, tokens.device)
    gated = memory.gated_rates(span, carry)

    pages, choice, score = _pages(memory), gated.choice, gated.score
    m, device = len(span), tokens.device
    page = torch.zeros(b, m, dtype=torch.long, device=device) if choice is None else choice.page
    limit = torch.as_tensor(math.inf if choice is None else choice.limit, device=device)
    of_tokens = None if score is None else score.tokens.expand(b, m, chunk).flatten(1)
    return GateTrace(
        complexity_tokens=of_tokens,
        complexity=None if score is None else score.chunk,
        decay_before=(1.0 - before.keep).unflatten(0, (b, -1)),
        decay_after=(1.0 - gated.rates.keep).unflatten(0, (b, -1)),
        page=page,
        switched=torch.zeros_like(page, dtype=torch.bool) if choice is None else choice.switched,
        limit=limit.expand(b, m),
        windows=torch.arange(m, device=device) * 0 if pages is None else pages.windows_of(span, device)[0],
        pages=memory.num_pages,
        chunk=chunk,
    )


def calibrate_page_threshold(memory, tokens: Tensor, target_switch_rate: float, set_threshold: bool = False) -> float:
    """The page threshold with which a memory would turn a page in a given share of its switch windows.

    A switch window is what allows one switch: `page_switch_every` tokens, or a call (or a `batch_size` window of it).
    The sample's windows are ranked by their largest complexity, and the threshold is laid between two of them so that
    the share above comes closest to the target: with few windows, or many of equal complexity, that may be some way off
    (`gate_trace(...).switch_rate` says what is reached). It holds for data like the sample and the present weights.

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
    highest = torch.stack(
        [trace.complexity[:, trace.windows == window].amax(dim=-1) for window in trace.windows.unique()], dim=1
    )
    threshold = threshold_for_rate(highest, target_switch_rate)
    if set_threshold:
        memory.symplectic_page_threshold = threshold
    return threshold


def threshold_for_rate(highest: Tensor, rate: float) -> float:
    """The threshold that comes closest to this share of entries above it. highest, of any shape: the largest complexity
    of each switch window. The threshold lies halfway between two of them, or at the largest."""
    values, counts = highest.double().flatten().unique(return_counts=True)
    below = values.new_zeros(1) if values[0] > 0 else values[:1] - 1.0
    # between neighbours; at the highest itself nothing exceeds
    thresholds = torch.cat(((torch.cat((below, values[:-1])) + values) / 2, values[-1:]))
    rates = torch.cat((counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1))) / highest.numel()
    best = (rates - rate).abs().argmin()
    return thresholds[best].item()


def plot_gate_trace(trace: GateTrace, path, row: int = 0) -> Path:
    """Draws one row of a trace to a PNG file: complexity against its limit, decay before and after, pages and how much
    each was written. Needs matplotlib (the extra `bench`).

    Args:
        trace: of `gate_trace`.
        path: the file; its folder is made.
        row: which row of the batch.

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
    if trace.complexity is None:
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
    middle.set_ylabel("decay (mean of heads)")
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
    stages = getattr(getattr(memory, "gating", None), "stages", ())
    return next((stage for stage in stages if isinstance(stage, Pages)), None)
