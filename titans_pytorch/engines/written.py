"""What a call wrote: solve windows, and every way to read them.

Letters: B rows (batch and heads), n tokens, m chunks, p pairs per chunk, G read groups, r queries per group,
d features.
Entry i: the fast weights before chunk i, counted from the first chunk of the stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_pytorch.common.switches import tell
from titans_pytorch.ops.positions import Reads, begun_entry, ends_mini_batch, larger, smaller, solve_windows

from .base import Carry, Chunks, Engine, Tensors, Window
from .lazy import LazyTensors
from .weight_paths import BuiltPath


@dataclass
class Written:
    """The windows that a call wrote, in order, and what the next call continues from.

    engine: reads them; None for entries that are only applied (an earlier layer's).
    shapes: name -> [B ...].
    blended_end: the gated transition replaced the last entry, which is not the last window's own.
    before: an entry from before these windows, which the unfinished read group still reads.
    """

    engine: Engine | None
    windows: list[Window]
    shapes: Mapping[str, tuple[int, ...]]
    final: Carry
    blended_end: bool = False
    before: Window | None = None
    _end: list = field(default_factory=list)

    @property
    def first(self) -> int:
        """The first entry."""
        return self.windows[0].first

    @property
    def last(self) -> int:
        """The last entry."""
        return self.windows[-1].first + self.windows[-1].chunks

    def windows_of(self, start: int, stop: int) -> list[tuple[Window, int, int]]:
        """The windows that hold the entries start .. stop - 1, each with the part that it holds."""
        out = []
        if self.before is not None and start <= self.before.first < stop:
            out.append((self.before, self.before.first, self.before.first + 1))
        for i, window in enumerate(self.windows):
            own_end = i + 1 == len(self.windows) and not self.blended_end
            lo, hi = larger(start, window.first), smaller(stop, window.first + window.chunks + own_end)
            if lo < hi:
                out.append((window, lo, hi))
        if self.blended_end and start <= self.last < stop:
            if not self._end:
                assert self.engine is not None
                self._end.append(self.engine.still(self.last, self.final.weights))
            out.append((self._end[0], self.last, self.last + 1))
        return out

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """A parameter at the entries start .. stop - 1: [B stop-start ...]."""
        parts = [w.paths[name].entries(lo - w.first, hi - w.first) for w, lo, hi in self.windows_of(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def entry(self, index: int) -> LazyTensors:
        """The fast weights at entry `index`: name -> [B ...]."""
        return LazyTensors(self.shapes, lambda name: self._entry(name, index))

    def _entry(self, name: str, index: int) -> Tensor:
        ((window, _, _),) = self.windows_of(index, index + 1)
        return window.paths[name].entry(index - window.first)

    def updates(self) -> LazyTensors:
        """The fast weights at all entries: name -> [B entries ...]."""

        def build(name):
            return self.entries(name, self.first, self.last + 1)

        return LazyTensors(self.shapes, build, self.first, source=self)

    def surprises(self) -> tuple[Tensor, Tensor]:
        """(inner loss, learning rate) of all pairs written, [B m p]."""
        losses = [w.loss for w in self.windows if w.loss is not None]
        rates = [w.learning_rate for w in self.windows if w.learning_rate is not None]
        return (losses[0], rates[0]) if len(losses) == 1 else (torch.cat(losses, dim=1), torch.cat(rates, dim=1))

    def read(self, queries: Tensor, position: int, reads: Reads) -> Tensor:
        """Apply the network to queries [B n d], the first at `position`, each with the entry it reads: [B n d]."""
        assert self.engine is not None
        n, outs = queries.shape[1], []
        for window, lo, hi in self.windows_of(reads.entry(position), reads.stop(position, n)):
            begin, end = reads.of_entries(position, n, lo, hi)
            if begin >= end:
                continue
            rows = reads.rows(position + begin, end - begin, window.first, queries.device)
            grouped = _Groups(reads.group, reads.slot(position + begin), end - begin)
            outs.append(grouped.flat(self.engine.read(window.paths, grouped.of(queries[:, begin:end]), rows)))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


@dataclass(frozen=True)
class _Groups:
    """n queries as read groups of `size`, the first query at slot `offset` of its group. Groups are padded at their
    ends: networks that are not tokenwise are causal."""

    size: int
    offset: int
    n: int

    def of(self, x: Tensor) -> Tensor:
        """[B n d] -> [B G r d]"""
        if self.offset + self.n <= self.size:
            return x.unsqueeze(1)
        if self.offset:
            head = self.size - self.offset
            x = torch.cat((x[:, :head], x.new_zeros(x.shape[0], self.offset, x.shape[2]), x[:, head:]), dim=1)
        return pad(x, (0, 0, 0, -x.shape[1] % self.size)).unflatten(1, (-1, self.size))

    def flat(self, y: Tensor) -> Tensor:
        """[B G r d] -> [B n d]"""
        y = y.flatten(1, 2)
        if self.offset and self.offset + self.n > self.size:
            y = torch.cat((y[:, : self.size - self.offset], y[:, self.size :]), dim=1)
        return y[:, : self.n]


class EarlierLayer:
    """An earlier memory layer's fast weights, applied chunk by chunk: chunk i of x [B m p d] with entry first + i."""

    def __init__(self, written: Written):
        self.written = written

    def _apply(self, method: str, x: Tensor, name: str, first: int) -> Tensor:
        outs = []
        for window, lo, hi in self.written.windows_of(first, first + x.shape[1]):
            rows = slice(lo - window.first, hi - window.first)
            outs.append(getattr(window.paths[name], method)(x[:, lo - first : hi - first], rows))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def matmul(self, x: Tensor, name: str, first: int) -> Tensor:
        """x [B m p d] @ W."""
        return self._apply("matmul", x, name, first)

    def matmul_t(self, x: Tensor, name: str, first: int) -> Tensor:
        """x [B m p e] @ W transposed."""
        return self._apply("matmul_t", x, name, first)

    def mul(self, x: Tensor, name: str, first: int) -> Tensor:
        """x [B m p d] * w."""
        return self._apply("mul", x, name, first)

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """The entries first .. first + count - 1: [B count ...]."""
        return self.written.entries(name, first, first + count)


def write(engine: Engine, chunks: Chunks, carry: Carry, mini_batch: int | None, transition: Tensor | None) -> Written:
    """Write the chunks, window by window.

    A window ends with its mini-batch, or with several where the plan is to solve for them. At the end of each
    `mini_batch` chunks the start weights become the fast weights; with `transition`, a share in 0..1, the fast weights
    first become start + transition (weights - start).
    """
    shapes = {name: tuple(weight.shape) for name, weight in carry.weights.items()}
    windows, blended = [], False
    plan = engine.plan(chunks, len(chunks) if mini_batch is None else mini_batch)
    ends_at = plan.chunks if plan.solve else mini_batch
    for start, stop in solve_windows(chunks.first, len(chunks), ends_at, plan.chunks):
        part = chunks.part(start, stop)
        if part.initial is not None and not plan.solve:
            carry = replace(carry, start=restarted(part, carry.start))
        if plan.solve and mini_batch is not None:
            window = engine.solve(part, carry, mini_batch, transition)
        else:
            window = engine.window(part, carry, plan)
        tell(engine, "wrote", part, carry, window, mini_batch, transition)
        windows.append(window)
        weights = LazyTensors(shapes, partial(_entry_of, window, window.chunks))
        slots = LazyTensors(shapes, window.final_slots) if engine.rule.slots else None
        if plan.solve and mini_batch is not None:
            begun = begun_entry(part.first, len(part), mini_batch)
            anchor = carry.start if begun < 1 else LazyTensors(shapes, partial(_entry_of, window, begun))
            carry = Carry(weights if begun == len(part) else anchor, weights, slots)
            continue
        ends = ends_mini_batch(chunks.first + stop, mini_batch)
        blended = ends and transition is not None
        if ends and transition is not None:
            weights = _blend(carry.start, weights, transition)
        carry = Carry(weights if ends else carry.start, weights, slots)
    return Written(engine, windows, shapes, carry, blended)


def restarted(chunks: Chunks, start: Tensors) -> LazyTensors:
    """Return the start weights of a mini-batch of one chunk, the initial ones where a text begins with it."""
    return LazyTensors(tuple(start), lambda name: chunks.restarted(name, start[name]))


def nothing_written(engine: Engine, first: int, carry: Carry) -> Written:
    """No chunk was written: the fast weights before chunk `first`, to read from."""
    shapes = {name: tuple(weight.shape) for name, weight in carry.weights.items()}
    return Written(engine, [engine.still(first, carry.weights)], shapes, carry)


def given_entries(weights: Tensors, first: int, engine: Engine | None = None) -> Written:
    """Entries that are built already, name -> [B entries ...], the first being entry `first`."""
    count = next(iter(weights.values())).shape[1]
    window = Window(first, count - 1, {k: BuiltPath(v) for k, v in weights.items()}, lambda name: ())
    shapes = {k: (v.shape[0], *v.shape[2:]) for k, v in weights.items()}
    return Written(engine, [window], shapes, Carry({}, {}, None))


def _entry_of(window: Window, entry: int, name: str) -> Tensor:
    return window.paths[name].entry(entry)


def _blend(start: Tensors, weights: Tensors, share: Tensor) -> LazyTensors:
    return LazyTensors(tuple(weights), lambda name: blended(start[name], weights[name], share))


def blended(start: Tensor, weights: Tensor, share: Tensor | None) -> Tensor:
    """Return a parameter after a gated transition, which passes a share of the way from `start`; None: all of it."""
    return weights if share is None else torch.lerp(start, weights, share.to(weights.dtype))
