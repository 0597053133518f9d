"""Count tokens, chunks, entries, read groups and mini-batches. No other module does arithmetic on them.

Positions and indices are absolute: they count from the first token of a stream, however it is cut into calls. Store
chunks of c = 4 tokens, mini-batches of 2 chunks, the read chunk r = c:

    position     0    1    2    3    4    5    6    7    8    9   10   11
    chunk       |------ 0 ------- | ------ 1 ------- | ------ 2 ------- |
    mini-batch  |------------------ 0 -------------- | ------ 1 ...
    entry       0                   1                  2                  3       entry i: fast weights before chunk i
    reads       0    0    0    1    1    1    1    2    2    2    2    3          floor((position + 1) / c)
    read group  |-- 0 ----- | ------ 1 ------- | ------ 2 ------- | 3             floor((position + 1) / r)

The token that completes a chunk reads what that chunk wrote, so read groups lie one token to the left of chunks, and
group 0 lacks a token. With r != c the tokens of group g read entry floor(g r / c).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor  # which entries of a window its groups of queries read


# In place of min and max: under torch.compile a length stays a plain symbol in the branch that is taken.
def smaller(a: int, b: int) -> int:
    return a if a <= b else b


def larger(a: int, b: int) -> int:
    return a if a >= b else b


@dataclass(frozen=True)
class Reads:
    """Which entry each query reads.

    group: tokens of a read group, the read chunk r. chunk: tokens of a store chunk c.
    """

    group: int
    chunk: int

    def entry(self, position: int) -> int:
        """The entry that a query at `position` reads."""
        return (position + 1) // self.group * self.group // self.chunk

    def entries(self, position: int, n: int, device: torch.device) -> Tensor:
        """The entries that n queries from `position` on read: long [n]."""
        slots = torch.arange(position + 1, position + 1 + n, device=device)
        return slots // self.group * self.group // self.chunk

    def earlier(self, position: int) -> int:
        """How many queries before `position` are in its read group."""
        return position - larger((position + 1) // self.group * self.group - 1, 0)

    def stop(self, position: int, n: int) -> int:
        """One more than the last entry that n queries from `position` on read."""
        return self.entry(position + n - 1) + 1

    def of_entries(self, position: int, n: int, first: int, stop: int) -> tuple[int, int]:
        """Of n queries from `position` on, the slice of those that read the entries first .. stop - 1."""
        start = position + 1
        begin = larger(start, -(-first * self.chunk // self.group) * self.group)
        end = smaller(start + n, -(-stop * self.chunk // self.group) * self.group)
        return begin - start, end - start

    def slot(self, position: int) -> int:
        """The place of a query at `position` within its read group, 0 .. group - 1."""
        return (position + 1) % self.group

    def rows(self, position: int, n: int, first: int, device: torch.device) -> Rows:
        """The entries of the read groups of n queries from `position` on, counted from entry `first`: a slice where it
        can be one, since a slice of the entries is a view and no copy."""
        start, stop = (position + 1) // self.group, (position + n) // self.group + 1
        if self.group == self.chunk:
            return slice(start - first, stop - first)
        if stop - start == 1:
            start = start * self.group // self.chunk - first
            return slice(start, start + 1)
        return torch.arange(start, stop, device=device) * self.group // self.chunk - first


def solve_windows(first: int, count: int, mini_batch: int | None, most: int) -> Iterator[tuple[int, int]]:
    """Cut the chunks first .. first + count - 1 where mini-batches end, and after at most `most` chunks of one.

    Yields (start, stop), counted from `first`. mini_batch: chunks of one, None for no end.
    """
    at, end = first, first + count
    while at < end:
        stop = end if mini_batch is None else smaller(end, (at // mini_batch + 1) * mini_batch)
        stop = smaller(stop, at + most)
        yield at - first, stop - first
        at = stop


def ends_mini_batch(chunk: int, mini_batch: int | None) -> bool:
    """Whether a mini-batch ends where `chunk` begins."""
    return mini_batch is not None and chunk % mini_batch == 0


def begun_entry(first: int, count: int, mini_batch: int) -> int:
    """Return the entry at which the mini-batch that is unfinished after the chunks first .. first + count - 1 began,
    counted from `first`: below 1 where it is that of chunk `first` itself."""
    return (first + count) // mini_batch * mini_batch - first


def chunks_of_first(first: int, count: int, mini_batch: int) -> int:
    """Return how many of the chunks first .. first + count - 1 are in the mini-batch of chunk `first`."""
    return smaller(count, (first // mini_batch + 1) * mini_batch - first)


def mini_batch_entries(first: int, count: int, mini_batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, of the chunks first .. first + count - 1, the number of the mini-batch of each, from 0 on, and the
    entries at which that begins and ends, counted from `first` and within these chunks: long [count], three times."""
    batch = torch.arange(first, first + count, device=device) // mini_batch
    start = batch * mini_batch - first
    return batch - first // mini_batch, start.clamp(min=0), (start + mini_batch).clamp(max=count)


def mini_batches(first: int, count: int, mini_batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, of the chunks first .. first + count - 1, the entry at which the mini-batch of each begins, counted from
    `first` and 0 where that is earlier, long [count]; and whether it ends with the chunk, bool [count]."""
    chunks = torch.arange(first, first + count, device=device)
    return (chunks // mini_batch * mini_batch - first).clamp(min=0), (chunks + 1) % mini_batch == 0


def window_of(first: int, count: int, size: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the chunks first .. first + count - 1: the number of the window of `size` chunks that each lies in, and the
    first chunk of that window among these, counted from `first`: long [count], twice. size: None for one window."""
    chunks = torch.arange(first, first + count, device=device)
    if size is None:
        return torch.zeros_like(chunks), torch.zeros_like(chunks)
    return chunks // size, (chunks // size * size - first).clamp(min=0)
