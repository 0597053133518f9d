"""Task: rows of tokens with targets, a reference solution, the accuracy of guessing, a score.

Letters: b rows, n tokens, v vocabulary.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.common.switches import evaluating
from titans_pytorch.training.rows import IGNORE, Rows

__all__ = ["IGNORE", "Rows", "Score", "Task"]

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """The score of a model on held-out rows of a task.

    accuracy: share of answers that are right.
    exact: share of rows with every answer right.
    loss: mean over answers, nats.
    answers: number of answers.
    rows: number of rows.
    length: tokens of a row.
    by_row: the accuracy of each row.
    """

    accuracy: float
    exact: float
    loss: float
    answers: int
    rows: int
    length: int
    by_row: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Task:
    """A distribution of rows; every field is a setting.

    Subclasses have a `name`, a `vocab_size`, a `shortest` length, `answer_ids` (the tokens an answer can be), make one
    row in `row` and solve it in `solve`.
    """

    name: ClassVar[str] = ""
    length: int = field(default=256, metadata={"help": "tokens of a row"})
    seed: int = field(default=0, metadata={"help": "seed of the rows; held-out rows differ from those trained on"})

    def __post_init__(self):
        positive_int(self.length, "length")
        if self.length < self.shortest:
            raise wrong("length", self.length, f"at least {self.shortest} for this {self.name} task")

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        raise NotImplementedError

    @property
    def shortest(self) -> int:
        """The smallest length that a row fits in."""
        raise NotImplementedError

    @property
    def answer_ids(self) -> range:
        """The tokens that an answer can be."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Accuracy of the best guess without the information to remember."""
        return 1 / len(self.answer_ids)

    def row(self, rng: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        """Draw a row of `length` tokens with `rng`: (ids [n], targets [n], IGNORE where no answer is due)."""
        raise NotImplementedError

    def solve(self, ids: list[int]) -> dict[int, int]:
        """Return position -> token for every position with an answer, computed from the ids up to there."""
        raise NotImplementedError

    # rows

    def batch(self, position: int, size: int, length: int | None = None, held_out: bool = False) -> Rows:
        """Make rows of an endless sequence. A row does not depend on its neighbours.

        Args:
            position: index of the first row.
            size: number of rows.
            length: tokens of a row; None: the task's own.
            held_out: take rows of a sequence that is not trained on.

        Returns:
            Rows: ids and targets, long [size length].

        Raises:
            ValueError: for a length in which a row does not fit.
        """
        length = self.length if length is None else positive_int(length, "length")
        if length < self.shortest:
            raise wrong("length", length, f"at least {self.shortest} for this {self.name} task")
        made = [self.row_at(index, length, held_out) for index in range(position, position + size)]
        ids, targets = (torch.stack(part) for part in zip(*made, strict=True))
        return Rows(ids, targets)

    def row_at(self, index: int, length: int, held_out: bool) -> tuple[Tensor, Tensor]:
        """Make row `index` of `length` tokens, as in `batch`; held_out: of the rows that are not trained on."""
        return self.row(self._rng(index, length, held_out), length)

    def _rng(self, index: int, length: int, held_out: bool) -> torch.Generator:
        what = f"{self.name} {self.seed} {length} {index} {held_out}".encode()
        digest = hashlib.blake2b(what, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    # solutions

    def reference(self, ids: Tensor) -> Tensor:
        """Return the solution as a model: ids [b n] -> logits [b n v], one at each correct answer."""
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for row, tokens in enumerate(ids.tolist()):
            for position, token in self.solve(tokens).items():
                logits[row, position, token] = 1.0
        return logits

    def guesser(self, seed: int = 0) -> Model:
        """Return a model that guesses among the possible answers, with accuracy about at chance or below.

        Args:
            seed: seed of the guesses.
        """
        rng = torch.Generator().manual_seed(seed)

        def guess(ids: Tensor) -> Tensor:
            answers = torch.randint(self.answer_ids.start, self.answer_ids.stop, ids.shape, generator=rng)
            return F.one_hot(answers, self.vocab_size).float()

        return guess

    # scores

    @torch.no_grad()
    def score(
        self,
        model: Model,
        sequences: int = 200,
        length: int | None = None,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Score:
        """Score a model on held-out rows, the same ones at every call with a seed and length.

        Args:
            model: ids [b n] -> logits [b n v].
            sequences: number of rows.
            length: tokens of a row; None: the task's own.
            batch_size: rows in one forward pass.
            device: where the model computes.
            autocast: returns the autocast context of each forward pass.
        """
        length = self.length if length is None else length
        right = asked = exact = 0
        loss, by_row = 0.0, []
        for start in range(0, sequences, batch_size):
            rows = self.batch(start, min(batch_size, sequences - start), length, held_out=True)
            with evaluating(model), autocast():
                logits = model(rows.ids.to(device))
            mask = rows.targets != IGNORE
            chosen, targets = logits[mask.to(logits.device)].float().cpu(), rows.targets[mask]
            hits = torch.zeros_like(mask)
            hits[mask] = chosen.argmax(dim=-1) == targets
            right, asked = right + int(hits.sum()), asked + int(mask.sum())
            exact += int((hits | ~mask).all(dim=1).sum())
            by_row += (hits.sum(dim=1) / mask.sum(dim=1)).tolist()
            loss += float(F.cross_entropy(chosen, targets, reduction="sum"))
        return Score(right / asked, exact / sequences, loss / asked, asked, sequences, length, tuple(by_row))


def pick(rng: torch.Generator, count: int, start: int, stop: int) -> Tensor:
    """Draw `count` tokens of start .. stop - 1 uniformly."""
    return torch.randint(start, stop, (count,), generator=rng)


def pick_distinct(rng: torch.Generator, count: int, start: int, stop: int) -> Tensor:
    """Draw `count` different tokens of start .. stop - 1."""
    return torch.randperm(stop - start, generator=rng)[:count] + start


def nothing_asked(length: int) -> Tensor:
    return torch.full((length,), IGNORE)
