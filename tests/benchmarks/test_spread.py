"""Intervals of differences between rows."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.spread import difference, differences_to_base

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


def test_one_variant_of_a_base_has_the_interval_of_the_paired_test():
    found = differences_to_base({"base": {**THEIRS, 4: 70.0}, "variant": OURS}, "base")["variant"]
    paired = difference(OURS, THEIRS)
    assert (found.mean, found.low, found.high) == pytest.approx((paired.mean, paired.low, paired.high))
    assert found.each == paired.each


def test_variants_of_a_base_pool_their_residuals_and_hold_at_once():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 3)) + [[0.0], [5.0], [0.0], [1.0]] + rng.normal(size=3) * 10  # seeds differ most
    names = ["base", "far", "same", "near"]
    scores = {name: dict(enumerate(row)) for name, row in zip(names, values, strict=True)}
    found = differences_to_base({**scores, "not run": {}}, "base")
    # The textbook's two-way table: residuals after row and column means, (4 - 1)(3 - 1) degrees of freedom.
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    half = stats.t.isf(0.025 / 3, 6) * (2 / 3 * (rest**2).sum() / 6) ** 0.5
    assert list(found) == names[1:]
    for place, name in enumerate(names):
        if place:
            mean = values[place].mean() - values[0].mean()
            assert (found[name].mean, found[name].low, found[name].high) == pytest.approx(
                (mean, mean - half, mean + half)
            )
    assert not found["far"].within_spread and found["same"].within_spread


def test_seeds_that_allow_no_interval_give_none():
    assert differences_to_base({"base": {1: 1.0}, "variant": {1: 2.0}}, "base") == {"variant": None}
    unlinked = {"base": {1: 1.0, 2: 2.0}, "same seeds": {1: 1.5, 2: 2.0}, "others": {3: 2.0, 4: 2.0}}
    found = differences_to_base(unlinked, "base")
    assert found["others"] is None and found["same seeds"].each == (0.5, 0.0)
    equal = differences_to_base({"base": {1: 0.1, 2: 0.2}, "variant": {1: 0.1, 2: 0.2}}, "base")["variant"]
    assert equal.text() == "~ +0.0 [+0.0, +0.0]"
