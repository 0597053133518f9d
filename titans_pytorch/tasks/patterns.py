"""Repeating patterns: a pattern of unknown length repeats; every round but the first must be predicted."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.tasks.task import IGNORE, Task, nothing_asked, pick

__all__ = ["Patterns"]

MARK, FIRST = 0, 1


@dataclass(frozen=True)
class Patterns(Task):
    """mark s_1 .. s_p mark s_1 .. s_p ...; p differs from row to row. Asked from the second mark on."""

    name = "patterns"
    shortest_period: int = field(default=6, metadata={"help": "shortest pattern, in tokens"})
    longest_period: int = field(default=12, metadata={"help": "longest pattern, in tokens"})
    symbols: int = field(default=16, metadata={"help": "number of different tokens that a pattern can contain"})

    def __post_init__(self):
        positive_int(self.shortest_period, "shortest_period")
        positive_int(self.symbols, "symbols")
        if positive_int(self.longest_period, "longest_period") < self.shortest_period:
            raise wrong("longest_period", self.longest_period, f"at least shortest_period = {self.shortest_period}")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return FIRST + self.symbols

    @property
    def shortest(self) -> int:
        return self.longest_period + 2  # so that every row has an answer to predict

    @property
    def answer_ids(self) -> range:
        return range(FIRST, FIRST + self.symbols)

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        period = int(pick(rng, 1, self.shortest_period, self.longest_period + 1))
        pattern = torch.cat([torch.tensor([MARK]), pick(rng, period, FIRST, self.vocab_size)])
        rounds = -(-(length + 1) // len(pattern))
        stream = pattern.repeat(rounds)[: length + 1]
        ids, targets = stream[:-1], nothing_asked(length)
        targets[period + 1 :] = stream[period + 2 :]
        targets[targets == MARK] = IGNORE  # the mark ends a round; the round's length is not to be predicted
        return ids, targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        period = ids.index(MARK, 1)
        answers = {i: ids[i + 1 - period] for i in range(period, len(ids))}
        return {i: token for i, token in answers.items() if token != MARK}
