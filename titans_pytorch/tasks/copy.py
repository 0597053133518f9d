"""Copy: a payload, a pause, a mark, and then the payload again, token by token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.tasks.task import Task, nothing_asked, pick, pick_distinct

__all__ = ["Copy"]

PAUSE, MARK, FIRST = 0, 1, 2


@dataclass(frozen=True)
class Copy(Task):
    """payload p_1 .. p_k | pause ... pause | mark p_1 .. p_(k-1); asked from the mark on: p_1 .. p_k.

    The payload begins the row and the copy ends it, so that `length` says how far apart they lie. With `segment_len`
    the mark also begins a segment: payload and copy are then in different segments, at the same positions within them.
    """

    name = "copy"
    payload: int = field(default=8, metadata={"help": "tokens to copy"})
    symbols: int = field(default=16, metadata={"help": "number of different tokens that a payload can contain"})
    distinct: bool = field(default=False, metadata={"help": "draw the tokens of a payload without repetition"})
    segment_len: int | None = field(
        default=None, metadata={"help": "tokens of a segment; the mark then begins a segment (none: anywhere)"}
    )

    def __post_init__(self):
        positive_int(self.payload, "payload")
        positive_int(self.symbols, "symbols")
        if self.distinct and self.payload > self.symbols:
            raise wrong("payload", self.payload, f"at most symbols = {self.symbols} distinct tokens")
        if self.segment_len is not None and positive_int(self.segment_len, "segment_len") < self.payload:
            raise wrong("segment_len", self.segment_len, f"at least the payload, {self.payload}")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return FIRST + self.symbols

    @property
    def shortest(self) -> int:
        if self.segment_len is None:
            return 2 * self.payload
        return self.segment_len + self.payload

    @property
    def answer_ids(self) -> range:
        return range(FIRST, FIRST + self.symbols)

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing. With distinct tokens, those already copied can be ruled out."""
        if not self.distinct:
            return 1 / self.symbols
        return sum(1 / (self.symbols - i) for i in range(self.payload)) / self.payload

    def mark_at(self, length: int) -> int:
        """Return the position of the mark in a row of `length` tokens."""
        mark = length - self.payload
        return mark if self.segment_len is None else mark // self.segment_len * self.segment_len

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        choose = pick_distinct if self.distinct else pick
        payload = choose(rng, self.payload, FIRST, FIRST + self.symbols)
        ids, targets = torch.full((length,), PAUSE), nothing_asked(length)
        mark, k = self.mark_at(length), self.payload
        ids[:k] = payload
        ids[mark] = MARK
        ids[mark + 1 : mark + k] = payload[:-1]
        targets[mark : mark + k] = payload
        return ids, targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        mark = ids.index(MARK)
        return {mark + i: ids[i] for i in range(self.payload)}
