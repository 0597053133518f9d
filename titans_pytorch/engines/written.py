"""A run: the windows of chunks that one call stored, and every way of reading them.

Letters: B rows (batch and heads), n tokens, m chunks, p pairs per chunk, G groups, r tokens per group, d features.
Entry i of a run is the memory before the run's chunk i, counted from chunk 0 of the whole sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_pytorch.common.switches import tell
from titans_pytorch.engines.weight_paths import BuiltPath, Path, Rows, group_rows, larger, smaller
from titans_pytorch.memory.rates import StoreRates
from titans_pytorch.memory.state import LazyTensors

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class StoreChunks:
    """Complete chunks to store: keys and values [B m p d], their rates, the absolute index of the first, and the
    earlier layer's memory that joins the anchor (weight residual), if any."""

    keys: Tensor
    values: Tensor
    rates: StoreRates
    first: int
    residual: "ResidualSource | None" = None
    threshold: float | None = None  # pairs whose loss is below it change nothing (surprise.py)

    def __len__(self):
        return self.keys.shape[1]

    def chunks(self, start: int, stop: int) -> "StoreChunks":
        if start == 0 and stop == len(self):
            return self
        return replace(
            self,
            keys=self.keys[:, start:stop],
            values=self.values[:, start:stop],
            rates=self.rates.chunks(start, stop),
            first=self.first + start,
        )


@dataclass(frozen=True)
class Carry:
    """anchor and memory: name -> [B ...]; momentum: name -> its orders, each [B ...], or None while it is zero."""

    anchor: Tensors
    memory: Tensors
    momentum: Mapping[str, Sequence[Tensor]] | None


@dataclass(frozen=True)
class Window:
    """Chunks first .. first + chunks - 1, written from one anchor. `read(x [B G r d], rows)` reads grouped queries."""

    first: int
    chunks: int
    paths: Mapping[str, Path]
    read: Callable[[Tensor, Rows], Tensor]
    final_momentum: Callable[[str], Sequence[Tensor]]
    loss: Tensor | None = None  # [B m p]
    step: Tensor | None = None  # [B m p], as it was taken


@dataclass
class Run:
    """What a store leaves: windows in order, then the final carry, built when asked for."""

    windows: list[Window]
    shapes: Mapping[str, tuple[int, ...]]  # name -> [B ...]
    final: Carry
    still: Callable[[int, Tensors], Window] | None = None
    blended_end: bool = False  # the last entry is not the last window's own
    before: Window | None = None  # an entry from before the run, for the rest of its read group
    _tail: list = field(default_factory=list)

    @property
    def first(self) -> int:
        return self.windows[0].first

    @property
    def last(self) -> int:
        """Absolute index of the last entry."""
        return self.windows[-1].first + self.windows[-1].chunks

    def spans(self, start: int, stop: int) -> list[tuple[Window, int, int]]:
        """Which window answers for which of the entries start .. stop - 1."""
        out = []
        if self.before is not None and start <= self.before.first < stop:
            out.append((self.before, self.before.first, self.before.first + 1))
        for i, window in enumerate(self.windows):
            own_end = i + 1 == len(self.windows) and not self.blended_end
            lo, hi = larger(start, window.first), smaller(stop, window.first + window.chunks + own_end)
            if lo < hi:
                out.append((window, lo, hi))
        if self.blended_end and start <= self.last < stop:
            if not self._tail:
                self._tail.append(self.still(self.last, self.final.memory))
            out.append((self._tail[0], self.last, self.last + 1))
        return out

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """The parameter before chunks start .. stop - 1: [B stop-start ...]."""
        parts = [w.paths[name].entries(lo - w.first, hi - w.first) for w, lo, hi in self.spans(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def entry(self, index: int) -> LazyTensors:
        """The memory before chunk `index`: name -> [B ...]."""
        return LazyTensors(self.shapes, lambda name: self._entry(name, index))

    def _entry(self, name: str, index: int) -> Tensor:
        ((window, _, _),) = self.spans(index, index + 1)
        return window.paths[name].entry(index - window.first)

    def updates(self) -> LazyTensors:
        return LazyTensors(
            self.shapes, lambda name: self.entries(name, self.first, self.last + 1), self.first, source=self
        )

    def surprises(self) -> tuple[Tensor, Tensor]:
        """(loss, step) of all pairs stored, [B m p]."""
        if len(self.windows) == 1:
            return self.windows[0].loss, self.windows[0].step
        return torch.cat([w.loss for w in self.windows], dim=1), torch.cat([w.step for w in self.windows], dim=1)

    def read(self, queries: Tensor, position: int, group: int, chunk: int) -> Tensor:
        """queries [B n d], the first at absolute `position`; each read group of `group` tokens sees the memory after
        floor(group end / chunk) chunks. Returns [B n d]."""
        start = position + 1  # a query at t reads as of t + 1
        stop = start + queries.shape[1]
        outs = []
        for window, lo, hi in self.spans(start // group * group // chunk, (stop - 1) // group * group // chunk + 1):
            begin = larger(start, -(-lo * chunk // group) * group)
            end = smaller(stop, -(-hi * chunk // group) * group)
            if begin >= end:
                continue
            rows = group_rows(begin // group, (end - 1) // group + 1, group, chunk, window.first, queries.device)
            part = queries[:, begin - start : end - start]
            outs.append(_read_grouped(window, part, rows, group, begin % group))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _read_grouped(window: Window, x: Tensor, rows: Rows, group: int, offset: int) -> Tensor:
    """x [B n d] starts at slot `offset` of its first group; groups are padded at their ends (reads are causal)."""
    n = x.shape[1]
    if offset + n <= group:
        return window.read(x.unsqueeze(1), rows).squeeze(1)
    head = group - offset
    if offset:
        x = torch.cat((x[:, :head], x.new_zeros(x.shape[0], offset, x.shape[2]), x[:, head:]), dim=1)
    x = pad(x, (0, 0, 0, -x.shape[1] % group))
    y = window.read(x.unflatten(1, (-1, group)), rows).flatten(1, 2)
    if offset:
        y = torch.cat((y[:, :head], y[:, group:]), dim=1)
    return y[:, :n]


class ResidualSource:
    """An earlier layer's memory, applied per chunk: chunk i of x [B m p d] meets entry first + i."""

    def __init__(self, run: Run):
        self.run = run

    def _apply(self, method: str, x: Tensor, name: str, first: int) -> Tensor:
        outs = []
        for window, lo, hi in self.run.spans(first, first + x.shape[1]):
            rows = slice(lo - window.first, hi - window.first)
            outs.append(getattr(window.paths[name], method)(x[:, lo - first : hi - first], rows))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def matmul(self, x, name, first):
        return self._apply("matmul", x, name, first)

    def matmul_t(self, x, name, first):
        return self._apply("matmul_t", x, name, first)

    def mul(self, x, name, first):
        return self._apply("mul", x, name, first)

    def entries(self, name, first, count):
        return self.run.entries(name, first, first + count)


def built_run(weights: Tensors, first: int, reader=None) -> Run:
    """A run over weights that are there already: name -> [B entries ...]. `reader(paths)` gives its `read`."""
    count = next(iter(weights.values())).shape[1]
    paths = {k: BuiltPath(v) for k, v in weights.items()}
    window = Window(first, count - 1, paths, reader(paths) if reader else _unreadable, _unreadable)
    return Run([window], {k: (v.shape[0], *v.shape[2:]) for k, v in weights.items()}, Carry({}, {}, None))


def _unreadable(*_):
    raise RuntimeError("these weights are applied, not read through a model")


def store(engine, chunks: StoreChunks, carry: Carry, batch_chunks: int | None, transition: Tensor | None) -> Run:
    """Writes the chunks, window by window. At each multiple of `batch_chunks` the anchor moves to the memory; with
    `transition` (a share in 0..1) the memory itself first becomes anchor + transition (memory - anchor)."""
    shapes = {name: tuple(weight.shape) for name, weight in carry.memory.items()}
    windows, at, blended = [], 0, False
    plan = engine.plan(chunks, len(chunks) if batch_chunks is None else batch_chunks)
    for size in _window_sizes(chunks, batch_chunks, plan.chunks):
        part = chunks.chunks(at, at + size)
        window = engine.window(part, carry, plan)
        tell(engine, "wrote", part, carry, window, batch_chunks, transition)
        windows.append(window)
        at += size
        memory = LazyTensors(shapes, lambda name, w=window: w.paths[name].entry(w.chunks))
        momentum = LazyTensors(shapes, window.final_momentum) if chunks.rates.momentum is not None else None
        boundary = batch_chunks is not None and (chunks.first + at) % batch_chunks == 0
        blended = boundary and transition is not None
        if blended:
            memory = _blend(carry.anchor, memory, transition)
        carry = Carry(memory if boundary else carry.anchor, memory, momentum)
    return Run(windows, shapes, carry, engine.still, blended)


def still_run(engine, first: int, carry: Carry) -> Run:
    """Nothing was stored: the memory before chunk `first`, to read from."""
    shapes = {name: tuple(weight.shape) for name, weight in carry.memory.items()}
    return Run([engine.still(first, carry.memory)], shapes, carry)


def _blend(anchor: Tensors, memory: Tensors, share: Tensor) -> LazyTensors:
    return LazyTensors(tuple(memory), lambda name: torch.lerp(anchor[name], memory[name], share.to(memory[name].dtype)))


def _window_sizes(chunks: StoreChunks, batch_chunks: int | None, most: int):
    """Cuts at the anchor's boundaries, and within them where a window is full."""
    at, end = chunks.first, chunks.first + len(chunks)
    while at < end:
        stop = end if batch_chunks is None else smaller(end, (at // batch_chunks + 1) * batch_chunks)
        size = smaller(stop - at, most)
        yield size
        at += size
