"""Time the part-segmentation scores against the loops they replace, on as many points as ShapeNetPart's test set has.

Two loops, both of benchmarks/reference/literal_metrics.py: one visits every point and part in turn, as the definition
reads; the other compares whole shapes with NumPy masks, part by part, as evaluation scripts of the field do. All
scores must agree. The shortest of --repeats runs counts; of the mask loop at most three, of the point loop one.

  python -m benchmarks.metrics
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
import torch

from benchmarks.frame import Benchmark
from benchmarks.measure import place_text, seconds_of
from benchmarks.reference.literal_metrics import shape_ious_by_mask, shape_ious_by_point
from datasets.shapenet_part import official_taxonomy
from downstream.metrics import part_scores
from utils.cli import positive_int, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--shapes", type=positive_int, default=2874, metavar="N", help="shapes; the test set has 2,874")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points of a shape")
    g.add_argument("--wrong", type=float, default=0.1, metavar="P", help="fraction of the points predicted at random")


def shortest(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the seconds of the shortest of several runs, and the last result."""
    results: list[Any] = []
    seconds = min(seconds_of(lambda: results.append(action())) for _ in range(repeats))
    return seconds, results[-1]


def measure(args: argparse.Namespace, _: torch.device) -> dict[str, Any]:
    """Time the histogram and both loops, and check that their scores agree."""
    taxonomy = official_taxonomy()
    generator = np.random.default_rng(args.seed)
    categories = generator.integers(len(taxonomy.category_names), size=args.shapes)
    shape = (args.shapes, args.points)
    local = generator.integers(1 << 30, size=shape) % np.array(taxonomy.part_counts)[categories, None]
    truth = np.array(taxonomy.part_starts)[categories, None] + local
    anything = generator.integers(taxonomy.num_parts, size=shape)
    predicted = np.where(generator.random(shape) < args.wrong, anything, truth)
    lists = truth.tolist(), predicted.tolist()  # a loop over points is slower still on arrays
    seconds, scores = shortest(lambda: part_scores(truth, predicted, categories, taxonomy), args.repeats)
    by_mask, of_masks = shortest(
        lambda: shape_ious_by_mask(truth, predicted, categories, taxonomy), min(3, args.repeats)
    )
    by_point, of_points = shortest(lambda: shape_ious_by_point(*lists, categories, taxonomy), 1)
    np.testing.assert_allclose(scores.shape_iou, of_points, atol=1e-9)
    np.testing.assert_allclose(scores.shape_iou, of_masks, atol=1e-9)
    return {
        "seconds": seconds,
        "loop_over_points_seconds": by_point,
        "loop_over_masks_seconds": by_mask,
        "times_faster_than_points": by_point / seconds,
        "times_faster_than_masks": by_mask / seconds,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    s = result["settings"]
    lines = [f"{s['shapes']:,} shapes of {s['points']:,} points, equal results, {place_text(result)}:"]
    lines.append(f"  histogram             {result['seconds']:8.3f} s")
    for name, key in (("masks shape by shape", "masks"), ("loop over points", "points")):
        times = f"{result[f'times_faster_than_{key}']:6.1f} times as long"
        lines.append(f"  {name:<20}  {result[f'loop_over_{key}_seconds']:8.3f} s  {times}")
    return "\n".join(lines)


QUICK = {"shapes": 50, "points": 64, "repeats": 1}
BENCHMARK = Benchmark("metrics", __doc__, add_arguments, measure, table, repeats=10, quick=QUICK)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
