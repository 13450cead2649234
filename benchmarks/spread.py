"""Differences between two settings over seeds, with 95 % intervals of Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean difference of a score and its interval.

    Attributes:
        mean: ours minus theirs.
        low, high: ends of the interval.
        each: difference of every seed; empty if seeds are not shared.
    """

    mean: float
    low: float
    high: float
    each: tuple[float, ...] = ()

    @property
    def within_spread(self) -> bool:
        """Whether the interval contains 0, so that the difference supports no claim."""
        return self.low <= 0 <= self.high

    def text(self, digits: int = 1) -> str:
        """Format the mean and the interval; ``~`` marks a difference within the spread."""
        mean, low, high = (f"{value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{'~ ' if self.within_spread else ''}{mean} [{low}, {high}]"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Compare two settings by the scores of their seeds.

    Where they share two seeds or more, the interval is that of the paired t-test over these seeds, which share data
    order, held-out pairs and drawn labels; otherwise that of Welch's t-test.

    Returns:
        The difference; None if a side has a single seed and no interval exists.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) > 1:
        each = [ours[seed] - theirs[seed] for seed in shared]
        error, freedom = statistics.stdev(each) / len(each) ** 0.5, len(each) - 1
    elif min(len(ours), len(theirs)) > 1:
        each = []
        parts = [statistics.variance(side.values()) / len(side) for side in (ours, theirs)]
        error = sum(parts) ** 0.5
        # Welch and Satterthwaite's degrees of freedom; without any variance they do not matter.
        sides = zip(parts, (ours, theirs), strict=True)
        freedom = error**4 / sum(part**2 / (len(side) - 1) for part, side in sides) if error else 1
    else:
        return None
    mean = statistics.mean(each) if each else statistics.mean(ours.values()) - statistics.mean(theirs.values())
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, tuple(each))
