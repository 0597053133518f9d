"""Means, their intervals, and paired differences. Student's t, for whole degrees of freedom."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NO_DIFFERENCE = "no difference found"


@dataclass(frozen=True)
class Spread:
    """n values: mean, standard deviation (n - 1), 95 % interval of the mean; None for a single value."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1 or -1 if the interval lies above or below zero, else 0."""
        if self.low is None or self.high is None or not math.isfinite(self.low) or not math.isfinite(self.high):
            return 0
        return (self.low > 0) - (self.high < 0)


def spread(values: Sequence[float], level: float = 0.95) -> Spread:
    n, mean = len(values), statistics.fmean(values)
    if n < 2 or not math.isfinite(mean):
        return Spread(n, mean, None, None, None)
    sd = statistics.stdev(values)
    half = t_quantile(0.5 + level / 2, n - 1) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Spread:
    """Return the Spread of the differences ours - theirs, seed by seed."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)], level)


def t_quantile(p: float, df: int) -> float:
    """Return the p-quantile of Student's t distribution, 0 < p < 1."""
    if p < 0.5:
        return -t_quantile(1.0 - p, df)
    low, high = 0.0, 1.0
    while t_probability(high, df) < p:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_probability(t: float, df: int) -> float:
    """Return P(T <= t). With theta = atan(t / sqrt(df)) the probability of |T| <= t is a finite sum of powers of cos
    theta (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(abs(t) / math.sqrt(df))
    cosine, odd = math.cos(theta), df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 if odd else 0, df - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return 0.5 + math.copysign(inside / 2, t)
