"""The protocol of an engine: it writes chunks to the fast weights of a memory network, and applies them to queries.

Letters: B rows (batch and heads), m chunks, p pairs per chunk, d features, G read groups, r queries per group.
Entry i of a window: the fast weights before its chunk i, so that a window of m chunks has entries 0 .. m.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titans_pytorch.ops.positions import Rows
from titans_pytorch.rules.base import UpdateRule, like
from titans_pytorch.rules.rates import WriteRates

from .plan import Plan
from .weight_paths import BuiltPath, Path

if TYPE_CHECKING:
    from .written import EarlierLayer

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Chunks:
    """Complete chunks to write.

    keys, values: [B m p d]. rates: of each chunk. first: the absolute index of the first. residual: an earlier layer's
    fast weights, added to those at which surprises are computed; or None. threshold: pairs whose inner loss is below it
    change nothing; None for no threshold. initial: the initial fast weights, name -> [B ...], from which texts begin
    (`rates.resets`), in mini-batches of one chunk; None without resets.
    """

    keys: Tensor
    values: Tensor
    rates: WriteRates
    first: int
    residual: "EarlierLayer | None" = None
    threshold: float | None = None
    initial: Tensors | None = None

    def __len__(self) -> int:
        return self.keys.shape[1]

    def part(self, start: int, stop: int) -> "Chunks":
        """The chunks start .. stop - 1 of these."""
        if start == 0 and stop == len(self):
            return self
        return replace(
            self,
            keys=self.keys[:, start:stop],
            values=self.values[:, start:stop],
            rates=self.rates.chunks(start, stop),
            first=self.first + start,
        )

    def restarted(self, name: str, weight: Tensor, index: int = 0) -> Tensor:
        """A parameter [B ...] before chunk `index`: the initial one in rows whose text begins with it."""
        if self.initial is None or self.rates.resets is None:
            return weight
        return torch.where(like(self.rates.resets[:, index], weight), self.initial[name], weight)

    def restarted_slots(
        self, slots: Sequence[Tensor], fresh: Sequence[Tensor] | None, index: int = 0
    ) -> tuple[Tensor, ...]:
        """The rule's slots, each [B ...], before chunk `index`: fresh ones in rows whose text begins with it; None:
        zero."""
        resets = self.rates.resets
        if resets is None:
            return tuple(slots)
        fresh = tuple(map(torch.zeros_like, slots)) if fresh is None else fresh
        pairs = zip(slots, fresh, strict=True)
        return tuple(torch.where(like(resets[:, index], slot), new, slot) for slot, new in pairs)


@dataclass(frozen=True)
class Carry:
    """What the next chunk continues from.

    start: the mini-batch start weights, name -> [B ...]. weights: the fast weights, name -> [B ...]. slots: the rule's
    tensors of each parameter (momentum of each order), name -> [B ...] each; None while they are zero.
    """

    start: Tensors
    weights: Tensors
    slots: Mapping[str, Sequence[Tensor]] | None


@dataclass(frozen=True)
class Window:
    """A solve window: chunks first .. first + chunks - 1, written in one go.

    paths: for each parameter, its fast weights at every entry. final_slots: builds the rule's slots of a parameter
    after the window. loss, learning_rate: of each pair, [B m p]. solved: it holds any number of mini-batches, and its
    entries are those after a gated transition.
    """

    first: int
    chunks: int
    paths: Mapping[str, Path]
    final_slots: Callable[[str], Sequence[Tensor]]
    loss: Tensor | None = None
    learning_rate: Tensor | None = None
    solved: bool = False


class Engine(ABC):
    """Writes and reads the fast weights of `model`, a module on the meta device, by the update rule `rule`."""

    def __init__(self, model: nn.Module, rule: UpdateRule):
        self.model: Any = model  # its methods depend on its kind
        self.rule = rule

    @abstractmethod
    def plan(self, chunks: Chunks, mini_batch: int) -> Plan:
        """How many chunks make a window, where `mini_batch` chunks share their start weights."""

    @abstractmethod
    def window(self, chunks: Chunks, carry: Carry, plan: Plan) -> Window:
        """Write chunks that share their start weights."""

    def solve(self, chunks: Chunks, carry: Carry, mini_batch: int, transition: Tensor | None) -> Window:
        """Write chunks of any number of mini-batches (`Plan.solve`), `mini_batch` chunks each. With `transition`, the
        entries at their ends are those after it."""
        raise NotImplementedError

    @abstractmethod
    def read(self, paths: Mapping[str, Path], queries: Tensor, rows: Rows) -> Tensor:
        """Apply the network to queries [B G r d], group g with the fast weights of entry rows[g]: [B G r d]."""

    def still(self, first: int, weights: Tensors) -> Window:
        """A window without chunks: fast weights to read from, as they stand before chunk `first`."""
        return Window(first, 0, {k: BuiltPath(v.unsqueeze(1)) for k, v in weights.items()}, lambda name: ())
