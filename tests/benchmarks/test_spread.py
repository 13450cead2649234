"""Intervals of differences between rows."""

import pytest
from scipy import stats

from benchmarks.spread import difference

OURS, THEIRS = {1: 92.5, 2: 93.1, 3: 92.9}, {1: 90.3, 2: 91.2, 3: 91.1}


def test_shared_seeds_give_the_interval_of_the_paired_test():
    found = difference(OURS, {**THEIRS, 4: 70.0})  # a seed of one side alone does not count
    expected = stats.ttest_rel(list(OURS.values()), list(THEIRS.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: differences 2.2, 1.9, 1.8, deviation 0.2082, t of two degrees of freedom 4.3027.
    assert (found.mean, found.low, found.high) == pytest.approx((1.9667, 1.4496, 2.4838), abs=1e-4)
    assert found.each == pytest.approx((2.2, 1.9, 1.8)) and not found.within_spread
    assert found.text() == "+2.0 [+1.4, +2.5]" and found.text(2) == "+1.97 [+1.45, +2.48]"


def test_other_seeds_give_welchs_interval():
    theirs = {seed + 10: value for seed, value in THEIRS.items()}
    found = difference(OURS, theirs)
    test = stats.ttest_ind(list(OURS.values()), list(theirs.values()), equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high, found.each) == (pytest.approx(expected.low), pytest.approx(expected.high), ())


def test_a_difference_whose_interval_contains_zero_is_within_the_spread():
    found = difference({1: 90.0, 2: 92.0}, {1: 90.5, 2: 91.0})
    # Two seeds: t of one degree of freedom, 12.7062, times 0.75.
    assert (found.low, found.high) == pytest.approx((0.25 - 9.5297, 0.25 + 9.5297), abs=1e-3)
    assert found.text() == "~ +0.2 [-9.3, +9.8]"
    assert difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).within_spread


def test_one_seed_has_no_interval():
    assert difference({1: 90.0}, OURS) is None and difference(OURS, {7: 1.0}) is None
    assert difference({1: 5.0, 2: 5.0}, {3: 4.0, 4: 4.0}).text() == "+1.0 [+1.0, +1.0]"
