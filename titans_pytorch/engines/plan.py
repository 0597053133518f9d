"""Counting operations: which form a weight is kept in, and how long a window is.

Multiply-adds per stored and read token, for a weight [d e], windows of T tokens and chunks of p pairs, the store pass
(the same for all) left out. A window that is not the last also leaves M and S behind and reads an S it found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW_TOKENS = (64, 128, 256, 512, 1024)
SPECTRAL_TOKENS = 128
SOLVE_TOKENS = 64  # of a window of several mini-batches: its cost grows with its length, that of its ends shrinks
MOST_CHUNKS = 256  # the coefficients are square in a window's chunks

# Fitted to times on a CPU: a built weight is written and read several times, and memory is slower than arithmetic.
BUILT = 160
DUAL = 1.15
WINDOW = 4e7  # what the launches of one window cost, whatever its size
BLOCK = 64  # see ops/causal_product.py


@dataclass(frozen=True)
class Plan:
    """How chunks are written.

    chunks: of a window. dual: whether a window of this length is better read without building its weights. solve: a
    window holds several mini-batches, written in one triangular solve. unsolved: why it does not, if it does not.
    """

    chunks: int
    dual: bool
    solve: bool = False
    unsolved: str = field(default="", compare=False)


def dual_cost(d: int, e: int, tokens: int, carried: float) -> float:
    """M_0 once, half the window by attention, and the share `carried` of windows that carry: S_0, then M and S."""
    return DUAL * (d * e + (tokens + BLOCK) / 2 * (d + e) + carried * 3 * d * e)


def matrix_cost(d: int, e: int, chunks: int, pairs: int) -> float:
    """A gradient and a read, and per chunk a row of the coefficients' product and the traffic of a built weight."""
    return d * e * (2 + (chunks + BUILT) / pairs)


def plan(shapes: Sequence[tuple[int, int]], rows: int, chunks: int, pairs: int, form: str) -> Plan:
    """The cheapest for `chunks` chunks of `rows` memories, written from one anchor. form: "dual", "matrix", "auto", or
    "spectral": built updates, in short windows, since they all stay in memory."""
    if form == "spectral":
        return Plan(max(1, min(chunks, SPECTRAL_TOKENS // pairs)), dual=False)
    if form == "auto" and chunks == 1:  # its end is built anyway
        return Plan(1, dual=False)
    best, least = Plan(1, dual=False), math.inf
    for tokens in WINDOW_TOKENS:
        size = max(1, min(chunks, tokens // pairs, MOST_CHUNKS))
        windows = -(-chunks // size)
        carried = (windows - 1) / windows
        dual = sum(dual_cost(d, e, size * pairs, carried) for d, e in shapes)
        matrix = sum(matrix_cost(d, e, size, pairs) for d, e in shapes)
        use_dual = form == "dual" or (form == "auto" and dual < matrix)
        cost = (dual if use_dual else matrix) + WINDOW / (rows * size * pairs)
        if cost < least:
            best, least = Plan(size, use_dual), cost
    return best
