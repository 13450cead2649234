"""Time the part-segmentation scores against the loops they replace, on as many points as ShapeNetPart's test set has.

Two loops, both of benchmarks/reference/literal_metrics.py: one looks at every point and part in turn, as the definition
reads; the other compares whole shapes with NumPy masks, part by part, as evaluation scripts of the field do. All
scores must agree, and the shortest of several runs counts.

run it:
  python -m benchmarks.metrics
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.reference.literal_metrics import shape_ious_by_mask, shape_ious_by_point
from datasets.shapenet_part import official_taxonomy
from downstream.metrics import part_scores
from utils.cli import HelpFormatter, positive_int, run, write_json


def shortest(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of the shortest of several runs, and the last result."""
    seconds, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Time and compare; returns seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--shapes", type=positive_int, default=2874, metavar="N", help="shapes; the test set has 2,874")
    parser.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points of a shape")
    parser.add_argument("--wrong", type=float, default=0.1, metavar="P", help="part of the points predicted at random")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the random labels")
    parser.add_argument("--json", metavar="FILE", help="also write the times to FILE as one JSON object")
    args = parser.parse_args(argv)

    taxonomy = official_taxonomy()
    generator = np.random.default_rng(args.seed)
    categories = generator.integers(len(taxonomy.category_names), size=args.shapes)
    shape = (args.shapes, args.points)
    local = generator.integers(1 << 30, size=shape) % np.array(taxonomy.part_counts)[categories, None]
    truth = np.array(taxonomy.part_starts)[categories, None] + local
    anything = generator.integers(taxonomy.num_parts, size=shape)
    predicted = np.where(generator.random(shape) < args.wrong, anything, truth)
    lists = truth.tolist(), predicted.tolist()  # a loop over points is slower still on arrays

    seconds, scores = shortest(lambda: part_scores(truth, predicted, categories, taxonomy), 10)
    by_mask, of_masks = shortest(lambda: shape_ious_by_mask(truth, predicted, categories, taxonomy), 3)
    by_point, of_points = shortest(lambda: shape_ious_by_point(*lists, categories, taxonomy), 1)
    np.testing.assert_allclose(scores.shape_iou, of_points, atol=1e-9)
    np.testing.assert_allclose(scores.shape_iou, of_masks, atol=1e-9)
    metrics = {
        "seconds": seconds,
        "loop_over_points_seconds": by_point,
        "loop_over_masks_seconds": by_mask,
        "times_faster_than_points": by_point / seconds,
        "times_faster_than_masks": by_mask / seconds,
    }
    print(f"{args.shapes:,} shapes of {args.points:,} points, equal results:")
    print(f"  histogram             {seconds:8.3f} s")
    print(f"  masks shape by shape  {by_mask:8.3f} s  {by_mask / seconds:6.1f} times as long")
    print(f"  loop over points      {by_point:8.3f} s  {by_point / seconds:6.1f} times as long")
    write_json(args.json, metrics)
    return metrics


if __name__ == "__main__":
    run(main)
