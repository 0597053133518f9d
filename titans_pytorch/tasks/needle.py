"""Needle: a token sequence that occurs once in a long row and must be repeated at the end."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.tasks.task import Task, nothing_asked, pick

__all__ = ["Needle"]

NEEDLE, ASK, FIRST = 0, 1, 2  # then digits, then sections, then hay
KINDS = ("position", "passkey", "number")


@dataclass(frozen=True)
class Needle(Task):
    """hay ... needle d_1 .. d_k ... hay | ask d_1 .. d_(k-1); asked from `ask` on: d_1 .. d_k.

    passkey: the hay repeats one short phrase. number: the hay is random and contains digits, so that only the digits
    after the needle's mark count. position: hay without digits is divided into `sections` equal parts, each opened by
    its own token; the needle is its mark alone, and the answer is the section that holds it.

    At least `gap` tokens lie between the needle's last token and the question.
    """

    name = "needle"
    kind: Literal["position", "passkey", "number"] = field(
        default="passkey", metadata={"help": "what must be answered at the end of a row"}
    )
    digits: int = field(default=1, metadata={"help": "tokens of the passkey or number"})
    symbols: int = field(default=10, metadata={"help": "number of different digits"})
    hay: int = field(default=16, metadata={"help": "number of different tokens of hay"})
    sections: int = field(default=8, metadata={"help": "parts of a row, for kind position"})
    gap: int = field(default=0, metadata={"help": "smallest number of tokens between needle and question"})

    def __post_init__(self):
        if self.kind not in KINDS:
            raise wrong("kind", self.kind, f"one of {', '.join(KINDS)}")
        for name in ("digits", "symbols", "hay", "sections"):
            positive_int(getattr(self, name), name)
        if isinstance(self.gap, bool) or not isinstance(self.gap, int) or self.gap < 0:
            raise wrong("gap", self.gap, "an integer of at least 0")
        super().__post_init__()

    @property
    def said(self) -> int:
        """Number of tokens of the needle, its mark included."""
        return 1 if self.kind == "position" else 1 + self.digits

    @property
    def asked(self) -> int:
        """Number of tokens to answer."""
        return 1 if self.kind == "position" else self.digits

    @property
    def first_section(self) -> int:
        """The first token that opens a section."""
        return FIRST + self.symbols

    @property
    def first_hay(self) -> int:
        """The first token of hay."""
        return self.first_section + self.sections

    @property
    def vocab_size(self) -> int:
        return self.first_hay + self.hay

    @property
    def shortest(self) -> int:
        opened = 2 * self.sections if self.kind == "position" else 0
        return max(opened, self.said) + self.gap + self.asked

    @property
    def answer_ids(self) -> range:
        if self.kind == "position":
            return range(self.first_section, self.first_hay)
        return range(FIRST, FIRST + self.symbols)

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        question = length - self.asked
        ids, targets = torch.empty(length, dtype=torch.long), nothing_asked(length)
        ids[:question] = self._haystack(rng, question)
        ids[question] = ASK
        room = question - self.gap - self.said
        if self.kind == "position":
            return self._position(rng, ids, targets, question, room)
        at = int(pick(rng, 1, 0, room + 1))
        answer = pick(rng, self.digits, FIRST, FIRST + self.symbols)
        ids[at] = NEEDLE
        ids[at + 1 : at + 1 + self.digits] = answer
        ids[question + 1 :] = answer[:-1]
        targets[question:] = answer
        return ids, targets

    def _haystack(self, rng: torch.Generator, count: int) -> Tensor:
        if self.kind == "passkey":
            phrase = torch.arange(self.first_hay, self.vocab_size)
            return phrase.repeat(-(-count // self.hay))[:count]
        hay = pick(rng, count, self.first_hay, self.vocab_size)
        if self.kind == "number":
            with_digits = torch.rand(count, generator=rng) < 0.2
            hay[with_digits] = pick(rng, int(with_digits.sum()), FIRST, FIRST + self.symbols)
        return hay

    def _position(self, rng, ids, targets, question, room):
        starts = [part * question // self.sections for part in range(self.sections)]
        for part, start in enumerate(starts):
            ids[start] = self.first_section + part
        free = [at for at in range(room + 1) if at not in set(starts)]
        at = free[int(pick(rng, 1, 0, len(free)))]
        ids[at] = NEEDLE
        targets[question] = self.first_section + max(part for part, start in enumerate(starts) if start < at)
        return ids, targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        at, question = ids.index(NEEDLE), ids.index(ASK)
        if self.kind == "position":
            sections = [token for token in ids[:at] if self.first_section <= token < self.first_hay]
            return {question: sections[-1]}
        return {question + i: ids[at + 1 + i] for i in range(self.digits)}
