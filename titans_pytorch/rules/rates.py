"""The rates of a write, as rules and engines are given them, and which pairs are written at all.

Letters: B rows (batch and heads), m chunks, p key-value pairs per chunk, o momentum orders, w parameters of the memory
network, r rows that are written.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class WriteRates:
    """Rates of m chunks.

    learning_rate: theta of each pair [B m p].
    retention: 1 - alpha, what the forget gate leaves of the fast weights [B m].
    momentum: eta [B m o]; None without momentum.
    combine: weights of the momentum orders in the update [B m o], or [B m o+1] with the surprise itself first; None:
        the last order is the update.
    modulation: factor of the surprise of each parameter [B m w]; None: 1.
    residual_mix: share of an earlier layer's fast weights in those at which surprises are computed [B m]; None: 0.
    active: False where a chunk changes nothing, neither fast weights nor momentum [B m] bool; None: True.
    resets: True where a text begins, with initial fast weights and without momentum [B m] bool; None: nowhere.
    bound: the learned bound of each pair's inner loss, above 0 [B m p]; None: the loss takes none.
    step: the learning rate of a chunk, where the rule applies it (`UpdateRule.step_outside`) [B m]; None: it is in
        learning_rate.
    window: weight of each earlier pair of a surprise window, beside the chunk's own learning rate [B m k]; None: no
        window.
    start_scale: factor of the mini-batch start weights at which surprises are computed [B m]; None: 1.
    active_rows: where `active` is True, as many rows in every chunk: long [r m] (pages only).
    """

    learning_rate: Tensor
    retention: Tensor
    momentum: Tensor | None = None
    combine: Tensor | None = None
    modulation: Tensor | None = None
    residual_mix: Tensor | None = None
    active: Tensor | None = None
    resets: Tensor | None = None
    active_rows: Tensor | None = None
    bound: Tensor | None = None
    step: Tensor | None = None
    start_scale: Tensor | None = None
    window: Tensor | None = None

    @property
    def bounds(self) -> tuple[Tensor, ...]:
        """(bound,), or nothing where the loss takes none: further arguments of `UpdateRule.loss`."""
        return () if self.bound is None else (self.bound,)

    def chunks(self, start: int, stop: int) -> "WriteRates":
        """The rates of the chunks start .. stop - 1."""
        return self._map(lambda rate: rate[:, start:stop])

    def chunk(self, index: int) -> "WriteRates":
        """The rates of one chunk, without the dimension m."""
        return self._map(lambda rate: rate[:, index])

    def pairs(self, count: int) -> "WriteRates":
        """The rates of chunks of which the first `count` pairs are written."""
        bound = None if self.bound is None else self.bound[:, :, :count]
        return replace(self, learning_rate=self.learning_rate[:, :, :count], bound=bound)

    def masked(self, allowed: Tensor) -> "WriteRates":
        """The rates with learning rate 0 where `allowed` [B m p] is False."""
        return replace(self, learning_rate=self.learning_rate.masked_fill(~allowed, 0.0))

    def still(self, linear: bool = True) -> "WriteRates":
        """Rates that change nothing. (A learning rate of 0 alone would leave the forget gate.)

        linear: the rule adds its update to the fast weights times the retention.
        """
        zero, one = torch.zeros_like(self.learning_rate), torch.ones_like(self.retention)
        active = self.active if linear else torch.zeros_like(one, dtype=torch.bool)
        return replace(self, learning_rate=zero, retention=one, active=active)

    def _map(self, fn) -> "WriteRates":
        return replace(self, **{name: fn(rate) for name, rate in vars(self).items() if rate is not None})


def above_threshold(surprise: Tensor, threshold: float) -> Tensor:
    """Whether `surprise` reaches the threshold: bool, of its shape. NaN counts as surprising, so that it propagates."""
    return ~(surprise < threshold)


def skip_pairs(learning_rate: Tensor, surprise: Tensor, threshold: float | None) -> Tensor:
    """The learning rate [B m p], 0 for pairs whose surprise [B m p] is below the threshold."""
    return learning_rate if threshold is None else learning_rate.masked_fill(surprise < threshold, 0.0)


def skip_below_threshold(rates: WriteRates, surprise: Tensor, threshold: float | None) -> WriteRates:
    """The rates, with pairs whose surprise [B m p] is below the threshold, and chunks of such pairs alone, skipped."""
    if threshold is None:
        return rates
    active = above_threshold(surprise, threshold).any(dim=-1)
    active = active if rates.active is None else active & rates.active
    return replace(rates, learning_rate=skip_pairs(rates.learning_rate, surprise, threshold), active=active)
