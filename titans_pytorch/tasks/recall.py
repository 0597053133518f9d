"""Multi-query associative recall (arXiv 2312.04927): pairs are read, then the values of several keys must be
answered.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.tasks.task import Task, nothing_asked, pick, pick_distinct

__all__ = ["Recall"]

PAUSE, FIRST = 0, 1  # then keys, then values


@dataclass(frozen=True)
class Recall(Task):
    """k_1 v_1 .. k_m v_m | pause ... | k_a v_a k_b v_b ...; answers are due at each key of the second part, no key
    twice.
    """

    name = "recall"
    pairs: int = field(default=8, metadata={"help": "pairs in a row"})
    queries: int = field(default=4, metadata={"help": "keys to answer in a row"})
    keys: int = field(default=32, metadata={"help": "number of different keys"})
    values: int = field(default=16, metadata={"help": "number of different values"})

    def __post_init__(self):
        for name in ("pairs", "queries", "keys", "values"):
            positive_int(getattr(self, name), name)
        if self.pairs > self.keys:
            raise wrong("pairs", self.pairs, f"at most keys = {self.keys}")
        if self.queries > self.pairs:
            raise wrong("queries", self.queries, f"at most pairs = {self.pairs}")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return FIRST + self.keys + self.values

    @property
    def shortest(self) -> int:
        return 2 * (self.pairs + self.queries)

    @property
    def answer_ids(self) -> range:
        return range(FIRST + self.keys, self.vocab_size)

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        keys = pick_distinct(rng, self.pairs, FIRST, FIRST + self.keys)
        values = pick(rng, self.pairs, self.answer_ids.start, self.answer_ids.stop)
        asked = pick_distinct(rng, self.queries, 0, self.pairs)
        ids, targets = torch.full((length,), PAUSE), nothing_asked(length)
        ids[: 2 * self.pairs] = torch.stack((keys, values), dim=1).flatten()
        ids[length - 2 * self.queries :] = torch.stack((keys[asked], values[asked]), dim=1).flatten()
        targets[length - 2 * self.queries :: 2] = values[asked]
        return ids, targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        said = dict(zip(ids[: 2 * self.pairs : 2], ids[1 : 2 * self.pairs : 2], strict=True))
        return {at: said[ids[at]] for at in range(len(ids) - 2 * self.queries, len(ids), 2)}
