"""Every count against one that goes token by token, or chunk by chunk."""

import pytest
import torch

from titans_pytorch.ops.positions import Reads, ends_mini_batch, solve_windows, window_of

CPU = torch.device("cpu")
CHUNKS = [(1, 1), (4, 4), (2, 4), (3, 2), (5, 3), (6, 4)]


def reads_by_token(group, chunk, last):
    """Chunks written when each token is read, one token after the other."""
    written, out = 0, []
    for seen in range(1, last + 1):
        if seen % group == 0:  # a new read group begins with the token that completes the one before
            written = seen // chunk
        out.append(written)
    return out


@pytest.mark.parametrize(("group", "chunk"), CHUNKS)
def test_the_entry_that_a_token_reads(group, chunk):
    reads, wanted = Reads(group, chunk), reads_by_token(group, chunk, 40)
    assert [reads.entry(t) for t in range(40)] == wanted
    assert reads.entries(7, 20, CPU).tolist() == wanted[7:27]
    assert [reads.stop(5, n) for n in range(1, 20)] == [wanted[5 + n - 1] + 1 for n in range(1, 20)]


@pytest.mark.parametrize(("group", "chunk"), CHUNKS)
def test_queries_before_a_position_in_its_group(group, chunk):
    groups = [(t + 1) // group for t in range(40)]
    for position in range(40):
        assert Reads(group, chunk).earlier(position) == groups[:position].count(groups[position])
        if groups[position]:  # group 0 lacks its first slot
            assert Reads(group, chunk).slot(position) == groups[:position].count(groups[position])


@pytest.mark.parametrize(("group", "chunk"), CHUNKS)
def test_queries_of_some_entries_and_the_rows_they_read(group, chunk):
    wanted = reads_by_token(group, chunk, 60)
    for position, n in ((0, 1), (0, 30), (7, 23), (11, 1), (20, 40)):
        reads, part = Reads(group, chunk), wanted[position : position + n]
        for first in range(max(wanted) + 1):
            for stop in range(first + 1, max(wanted) + 2):
                lo, hi = reads.of_entries(position, n, first, stop)
                assert part[max(lo, 0) : max(hi, 0)] == [e for e in part if first <= e < stop]
        rows, entries = reads.rows(position, n, part[0], CPU), torch.arange(part[0], 100)
        groups = sorted({(t + 1) // group for t in range(position, position + n)})
        assert entries[rows].tolist() == [g * group // chunk for g in groups]


@pytest.mark.parametrize("mini_batch", [None, 1, 3, 5])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_solve_windows(mini_batch, most):
    for first in range(7):
        for count in range(9):
            windows = list(solve_windows(first, count, mini_batch, most))
            assert [i for start, stop in windows for i in range(start, stop)] == list(range(count))
            for start, stop in windows:
                assert 1 <= stop - start <= most
                inside = range(first + start + 1, first + stop)
                assert not any(ends_mini_batch(chunk, mini_batch) for chunk in inside)
                full = stop - start == most or stop == count
                assert full or ends_mini_batch(first + stop, mini_batch), "no window is cut without need"


@pytest.mark.parametrize("size", [None, 1, 3])
def test_windows_that_chunks_lie_in(size):
    number, start = window_of(4, 6, size, CPU)
    chunks = range(4, 10)
    assert number.tolist() == [0 if size is None else chunk // size for chunk in chunks]
    for i in range(6):
        assert start[i] == min(j for j in range(6) if number[j] == number[i])
