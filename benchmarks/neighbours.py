"""The search for neighbours: ours against other exact ways, for each width that a DGCNN layer gives it.

ours       models/ops/knn.py: one product for each block of the cloud, selection by vector instructions or a kernel
textbook   all distances of the batch at once, then topk (benchmarks/reference/textbook.py)
cdist      torch.cdist in blocks of one cloud, then an unsorted topk
tree       SciPy's k-d tree, a cloud after the other, its query on as many threads as PyTorch; xyz on a CPU only
plain      on a GPU: ours without Triton kernels (CROSSNET_KERNELS=torch)

All are called in turn, after one call each that is not counted. Beside the times stands which part of the neighbours
differs from a search in float64: points almost equally distant, where rounding decides.

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

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from benchmarks.measure import add_measuring_arguments, place_text, provenance, seconds_in_turn, text_table
from benchmarks.reference.textbook import textbook_knn
from engine.device import resolve_device
from models.ops.backend import VARIABLE
from models.ops.knn import knn
from utils.cli import (
    HelpFormatter,
    positive_int,
    run,
    write_json,
)
from utils.errors import UserError

TREE_WIDTH = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.neighbours", description=__doc__, formatter_class=HelpFormatter
    )
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=16, metavar="B", help="clouds")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points per cloud")
    g.add_argument("--widths", type=positive_int, nargs="+", default=[3, 64, 128], metavar="C", help="channels")
    g.add_argument("--k", type=positive_int, default=20, help="neighbours per point, itself included")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    add_measuring_arguments(parser, repeats=5)
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.points, args.k, args.repeats = 2, 64, 4, 1
    if args.k > args.points:
        raise UserError(f"--k {args.k} neighbours need at least as many points, not --points {args.points}")
    return args


def by_cdist(points: Tensor, k: int) -> Tensor:
    """(B, N, C) -> (B, N, k) by ``torch.cdist``, a cloud after the other."""
    return torch.stack([torch.cdist(p, p).topk(k, largest=False, sorted=False).indices for p in points])


def by_tree(points: Tensor, k: int) -> Tensor:
    """(B, N, C) -> (B, N, k) by SciPy's k-d tree, in float64."""
    found = []
    for cloud in points.numpy():
        tree = KDTree(cloud, compact_nodes=False, balanced_tree=False)  # built faster, searched as fast
        found.append(tree.query(cloud, np.arange(1, k + 1), workers=torch.get_num_threads())[1])
    return torch.from_numpy(np.stack(found))


def plain(points: Tensor, k: int) -> Tensor:
    """Ours without Triton kernels."""
    with mock.patch.dict(os.environ, {VARIABLE: "torch"}):
        return knn(points, k)


def forms(width: int, device: torch.device) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The ways that apply."""
    found = {"ours": knn, "textbook": lambda points, k: textbook_knn(points.mT, k), "cdist": by_cdist}
    if device.type == "cuda":
        found["plain"] = plain
    elif width <= TREE_WIDTH:
        found["tree"] = by_tree
    return found


def measure(args: argparse.Namespace, width: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of every way and the share of neighbours that differ from those of float64, by name."""
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    args = parse_args(argv)
    before, device = torch.get_num_threads(), resolve_device(args.device)
    torch.set_num_threads(args.threads)
    about = provenance(device)
    try:
        widths = {str(width): measure(args, width, device) for width in args.widths}
    finally:
        torch.set_num_threads(before)
    result: dict[str, Any] = {"widths": widths}
    result["settings"] = {key: value for key, value in vars(args).items() if key != "json"} | {"device": str(device)}
    result |= about
    rows = [("channels", "way", "ms", "times ours", "differ from float64")]
    for width, ways in widths.items():
        for name, part in ways.items():
            ratio = part["seconds_median"] / ways["ours"]["seconds_median"]
            cells = f"{1e3 * part['seconds_median']:.1f}", f"{ratio:.2f}", f"{part['different']:.1e}"
            rows.append((width, name, *cells))
    print(f"{args.k} neighbours of {args.batch} x {args.points} points, {place_text(result)}")
    print(text_table(rows))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
