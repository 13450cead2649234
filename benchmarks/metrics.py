"""Time the part-segmentation scores against the loops they replace, on as many points as ShapeNetPart's test set has.

Two loops, both of benchmarks/reference/literal_metrics.py: one visits every point and part in turn, as the definition
reads; the other compares whole shapes with NumPy masks, part by part, as evaluation scripts of the field do. All three
run in turn, after one untimed call each, in CPU time, and all scores must agree.

  python -m benchmarks.metrics
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
import torch

from benchmarks.frame import Benchmark
from benchmarks.measure import compare, place_text, ratio_text, seconds_in_turn, text_table
from benchmarks.reference.literal_metrics import shape_ious_by_mask, shape_ious_by_point
from datasets.shapenet_part import official_taxonomy
from downstream.metrics import part_scores
from utils.cli import positive_int, run

LOOPS = {"masks": "masks shape by shape", "points": "loop over points"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--shapes", type=positive_int, default=2874, metavar="N", help="shapes; the test set has 2,874")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points of a shape")
    g.add_argument("--wrong", type=float, default=0.1, metavar="P", help="fraction of the points predicted at random")


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
    ious: dict[str, np.ndarray] = {}

    def ours() -> None:
        ious["ours"] = part_scores(truth, predicted, categories, taxonomy).shape_iou

    def masks() -> None:
        ious["masks"] = shape_ious_by_mask(truth, predicted, categories, taxonomy)

    def points() -> None:
        ious["points"] = shape_ious_by_point(*lists, categories, taxonomy)

    actions = {"ours": ours, "masks": masks, "points": points}
    seconds_in_turn(actions, repeats=1)
    seconds = seconds_in_turn(actions, repeats=args.repeats, cpu=True)
    for name in LOOPS:
        np.testing.assert_allclose(ious["ours"], ious[name], atol=1e-9)
    return {name: compare({"ours": seconds["ours"], "textbook": seconds[name]}) for name in LOOPS}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    s = result["settings"]
    rows = [("", "ours, s", "loop, s", "loop / ours")]
    for name, text in LOOPS.items():
        seconds = [f"{result[name][form]['seconds_median']:.3f}" for form in ("ours", "textbook")]
        rows.append((text, *seconds, ratio_text(result[name])))
    title = f"{s['shapes']:,} shapes of {s['points']:,} points, equal results, CPU time, {place_text(result)}"
    return f"{title}\n{text_table(rows)}"


QUICK = {"shapes": 50, "points": 64, "repeats": 1}
BENCHMARK = Benchmark("metrics", __doc__, add_arguments, measure, table, repeats=5, quick=QUICK)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
