"""Differences between settings over seeds, with 95 % intervals of Student's t: of two, or of variants to one base."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
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


def differences_to_base(scores: Mapping[str, Mapping[int, float]], base: str) -> dict[str, Difference | None]:
    """Compare settings with one base by the scores of their seeds.

    The model is the analysis of variance of a randomized block design, score = setting + seed + residual: seeds are
    blocks because they share data order and drawn labels. The variance of the residuals is pooled over all settings,
    so that two seeds of each are enough; it is assumed to be the same for all. The intervals hold for all settings at
    once with 95 % (Bonferroni). For a single setting they are those of the paired t-test.

    Args:
        scores: value of every seed, by setting.
        base: the setting that the others are compared with.

    Returns:
        The difference of each other setting that has scores; None where the seeds allow no interval.
    """
    settings = [base, *(name for name, values in scores.items() if values and name != base)]
    seeds = sorted({seed for name in settings for seed in scores[name]})
    points = [(setting, seed) for setting in settings for seed in scores[setting]]
    values = np.array([scores[setting][seed] for setting, seed in points])
    # One column for each setting and one for each seed: redundant, which the pseudoinverse copes with.
    design = np.array(
        [[*(s == setting for s in settings), *(s == seed for s in seeds)] for setting, seed in points], float
    )
    inverse = np.linalg.pinv(design)
    estimate = inverse @ values
    freedom = len(values) - np.linalg.matrix_rank(design)
    found: dict[str, Difference | None] = {}
    for place, name in enumerate(settings[1:], start=1):
        contrast = np.zeros(design.shape[1])
        contrast[[place, 0]] = 1, -1
        if freedom < 1 or not np.allclose(contrast @ inverse @ design, contrast):  # no seed links them
            found[name] = None
            continue
        variance = ((values - design @ estimate) ** 2).sum() / freedom
        error = (variance * ((contrast @ inverse) ** 2).sum()) ** 0.5
        mean, half = (
            round(float(value), 9) + 0.0  # no -0.0; residuals that are 0 but for rounding make no claim
            for value in (contrast @ estimate, stats.t.isf((1 - LEVEL) / 2 / (len(settings) - 1), freedom) * error)
        )
        each = tuple(
            scores[name][seed] - scores[base][seed] for seed in seeds if seed in scores[name] and seed in scores[base]
        )
        found[name] = Difference(mean, mean - half, mean + half, each)
    return found
