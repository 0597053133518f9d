"""Intervals against tables, and what they let one say."""

import math

import pytest
from harness.statistics import paired, spread, t_probability, t_quantile


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [
        (0.975, 1, 12.7062047364),
        (0.975, 2, 4.30265272975),
        (0.975, 4, 2.77644510520),
        (0.975, 9, 2.26215716280),
        (0.95, 5, 2.01504837333),
        (0.995, 30, 2.74999565357),
        (0.025, 4, -2.77644510520),
    ],
)
def test_quantiles_are_those_of_the_tables(p, df, value):
    assert t_quantile(p, df) == pytest.approx(value, rel=1e-9)
    assert t_probability(value, df) == pytest.approx(p, rel=1e-9)


def test_the_spread_of_known_values():
    got = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (got.n, got.mean, got.sd) == (5, 3.0, pytest.approx(math.sqrt(2.5)))
    half = 2.77644510520 * math.sqrt(2.5 / 5)
    assert (got.low, got.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert (got.side, spread([-1.0, -1.1]).side, spread([1.0, -1.0]).side) == (1, -1, 0)


def test_pairs_take_out_what_seeds_share():
    ours, theirs = [1.0, 5.0, 9.0], [2.0, 6.1, 9.9]
    assert paired(ours, theirs).side == -1
    assert spread(ours).high > spread(theirs).low  # unpaired they overlap
    with pytest.raises(ValueError):
        paired(ours, theirs[:2])


def test_one_seed_and_equal_values_conclude_nothing():
    assert spread([3.0]).low is None
    assert spread([3.0]).side == 0
    assert spread([0.0, 0.0, 0.0]).side == 0
    assert spread([math.nan, 1.0]).side == 0
