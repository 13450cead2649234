"""Neighbor search: ours against other exact methods, at each width that a DGCNN layer has.

ours       models/ops/knn.py: one product per tile of the cloud, selection by vector instructions or a kernel
textbook   all distances of the batch at once, then topk (benchmarks/reference/textbook.py)
cdist      torch.cdist cloud by cloud, then an unsorted topk
tree       SciPy's k-d tree cloud by cloud, queried with as many threads as PyTorch has; xyz on a CPU only
plain      on a GPU: ours without Triton kernels (CROSSNET_KERNELS=torch)

The methods are called in turn, after one untimed call each. The last column is the fraction of neighbors that differ
from a search in float64: where points are almost equally distant, rounding decides.

  python -m benchmarks.neighbours
  python -m benchmarks.neighbours --batch 4 --points 8192 --widths 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from benchmarks.frame import Benchmark, enough_points
from benchmarks.measure import place_text, seconds_in_turn, text_table
from benchmarks.reference.textbook import textbook_knn
from models.ops.backend import VARIABLE
from models.ops.knn import knn
from utils.cli import positive_int, run

TREE_WIDTH = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=16, metavar="B", help="clouds")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points per cloud")
    g.add_argument("--widths", type=positive_int, nargs="+", default=[3, 64, 128], metavar="C", help="channels")
    g.add_argument("--k", type=positive_int, default=20, help="neighbors per point, itself included")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")


def by_cdist(points: Tensor, k: int) -> Tensor:
    """(B, N, C) -> (B, N, k) by ``torch.cdist``, cloud by cloud."""
    return torch.stack([torch.cdist(p, p).topk(k, largest=False, sorted=False).indices for p in points])


def by_tree(points: Tensor, k: int) -> Tensor:
    """(B, N, C) -> (B, N, k) by SciPy's k-d tree, in float64."""
    found = []
    for cloud in points.numpy():
        tree = KDTree(cloud, compact_nodes=False, balanced_tree=False)  # built faster, searched as fast
        found.append(tree.query(cloud, np.arange(1, k + 1), workers=torch.get_num_threads())[1])
    return torch.from_numpy(np.stack(found))


def plain(points: Tensor, k: int) -> Tensor:
    """(B, N, C) -> (B, N, k) by ours without Triton kernels."""
    with mock.patch.dict(os.environ, {VARIABLE: "torch"}):
        return knn(points, k)


def forms(width: int, device: torch.device) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return the methods for points of this width, by name."""
    found = {"ours": knn, "textbook": lambda points, k: textbook_knn(points.mT, k), "cdist": by_cdist}
    if device.type == "cuda":
        found["plain"] = plain
    elif width <= TREE_WIDTH:
        found["tree"] = by_tree
    return found


def measure_width(args: argparse.Namespace, width: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return seconds and the fraction of neighbors that differ from those of float64, by method."""
    generator = torch.Generator().manual_seed(args.seed)
    points = torch.randn(args.batch, args.points, width, generator=generator).to(device)
    exact = by_cdist(points.double(), args.k).sort(-1).values
    ways = forms(width, device)
    different = {
        name: (way(points, args.k).sort(-1).values != exact).double().mean().item() for name, way in ways.items()
    }
    seconds = seconds_in_turn(
        {name: lambda way=way: way(points, args.k) for name, way in ways.items()}, repeats=args.repeats, device=device
    )
    return {
        name: {"seconds_median": statistics.median(times), "seconds": times, "different": different[name]}
        for name, times in seconds.items()
    }


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure every width."""
    return {"widths": {str(width): measure_width(args, width, device) for width in args.widths}}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    s = result["settings"]
    rows = [("channels", "way", "ms", "times ours", "differ from float64")]
    for width, ways in result["widths"].items():
        for name, part in ways.items():
            ratio = part["seconds_median"] / ways["ours"]["seconds_median"]
            cells = f"{1e3 * part['seconds_median']:.1f}", f"{ratio:.2f}", f"{part['different']:.1e}"
            rows.append((width, name, *cells))
    title = f"{s['k']} neighbors of {s['batch']} x {s['points']} points, {place_text(result)}"
    return f"{title}\n{text_table(rows)}"


QUICK = {"batch": 2, "points": 64, "k": 4, "repeats": 1}
BENCHMARK = Benchmark("neighbours", __doc__, add_arguments, measure, table, repeats=5, quick=QUICK, check=enough_points)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
