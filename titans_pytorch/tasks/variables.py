"""Variable tracking (as in RULER, arXiv 2404.06654): names get values, other names copy them, and the value of a name
must be answered.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.tasks.task import Task, nothing_asked, pick, pick_distinct

__all__ = ["Variables"]

PAUSE, SET, LET, GET, FIRST = 0, 1, 2, 3, 4  # then names, then values


@dataclass(frozen=True)
class Variables(Task):
    """`set x 5`, `let y x`, `let z y` ... among pauses; at the end `get z`, the answer is z's value.

    Every chain sets one name and copies its value `hops` times; the last name of `queries` chains is queried.
    """

    name = "variables"
    chains: int = field(default=3, metadata={"help": "chains of names in a row, each with a value of its own"})
    hops: int = field(default=1, metadata={"help": "number of copies of each value from name to name"})
    queries: int = field(default=1, metadata={"help": "names queried in a row"})
    names: int = field(default=16, metadata={"help": "number of different names"})
    values: int = field(default=10, metadata={"help": "number of different values"})

    def __post_init__(self):
        for name in ("chains", "queries", "names", "values"):
            positive_int(getattr(self, name), name)
        if isinstance(self.hops, bool) or not isinstance(self.hops, int) or self.hops < 0:
            raise wrong("hops", self.hops, "an integer of at least 0")
        if self.queries > self.chains:
            raise wrong("queries", self.queries, f"at most chains = {self.chains}")
        if self.chains * (self.hops + 1) > self.names:
            raise wrong("names", self.names, f"at least chains * (hops + 1) = {self.chains * (self.hops + 1)}")
        super().__post_init__()

    @property
    def statements(self) -> int:
        """Number of statements at the beginning of a row."""
        return self.chains * (self.hops + 1)

    @property
    def vocab_size(self) -> int:
        return FIRST + self.names + self.values

    @property
    def shortest(self) -> int:
        return 3 * (self.statements + self.queries)

    @property
    def answer_ids(self) -> range:
        return range(FIRST + self.names, self.vocab_size)

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        names = pick_distinct(rng, self.statements, FIRST, FIRST + self.names).view(self.hops + 1, self.chains)
        values = pick(rng, self.chains, self.answer_ids.start, self.answer_ids.stop)
        spoken = []  # hop by hop: a name has a value before it is copied
        for hop in range(self.hops + 1):
            for chain in torch.randperm(self.chains, generator=rng).tolist():
                source = values[chain] if hop == 0 else names[hop - 1, chain]
                spoken.append([SET if hop == 0 else LET, int(names[hop, chain]), int(source)])
        asked = pick_distinct(rng, self.queries, 0, self.chains)

        ids, targets = torch.full((length,), PAUSE), nothing_asked(length)
        end = length - 3 * self.queries
        slots = pick_distinct(rng, len(spoken), 0, end - 2 * len(spoken)).sort().values
        for order, (slot, statement) in enumerate(zip(slots.tolist(), spoken, strict=True)):
            at = slot + 2 * order  # each statement before it takes two tokens more than its slot
            ids[at : at + 3] = torch.tensor(statement)
        for order, chain in enumerate(asked.tolist()):
            at = end + 3 * order
            ids[at], ids[at + 1], ids[at + 2] = GET, names[-1, chain], values[chain]
            targets[at + 1] = values[chain]
        return ids, targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        known: dict[int, int] = {}
        answers = {}
        for at, token in enumerate(ids):
            if token == SET:
                known[ids[at + 1]] = ids[at + 2]
            elif token == LET:
                known[ids[at + 1]] = known[ids[at + 2]]
            elif token == GET:
                answers[at + 1] = known[ids[at + 1]]
        return answers
