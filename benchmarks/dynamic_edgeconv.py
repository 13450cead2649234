"""One EdgeConv layer, ours against torch_geometric's: forward and backward, neighbor search included.

torch_geometric is not a requirement of this project; install it for the comparison (``pip install torch_geometric``).
Its ``DynamicEdgeConv`` needs torch_cluster up to version 2.6 and pyg-lib from 2.7 on to find neighbors. Without them,
its ``EdgeConv`` gets the neighbors of benchmarks/reference/textbook.py, and the result says so. torch_cluster has to be
compiled, which takes a quarter of an hour:
``pip install "torch_geometric<2.7"; pip install --no-build-isolation torch_cluster``.

The layer is DGCNN's second: 64 channels to 64, batch norm and leaky ReLU, k neighbors in feature space. Both
normalize over all edges and compute the same; the table says how far they differ.

  python -m benchmarks.dynamic_edgeconv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import Tensor, nn

from benchmarks.frame import Benchmark, enough_points
from benchmarks.measure import compare, place_text, ratio_text, seconds_in_turn, text_table
from benchmarks.reference.textbook import textbook_knn
from models.ops.edge_conv import edge_conv
from models.ops.knn import knn
from models.ops.layers import edge_block
from utils.cli import positive_int, run
from utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=8, metavar="B", help="clouds")
    g.add_argument("--points", type=positive_int, default=1024, metavar="N", help="points per cloud")
    g.add_argument("--channels", type=positive_int, default=64, metavar="C", help="channels in and out")
    g.add_argument("--k", type=positive_int, default=20, help="neighbors per point, itself included")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")


def edges(neighbors: Tensor) -> Tensor:
    """(B, N, k) neighbors within each cloud -> (2, B N k) edges from neighbor to center over all points."""
    batch, points, k = neighbors.shape
    first = torch.arange(0, batch * points, points, device=neighbors.device)[:, None, None]
    centers = torch.arange(batch * points, device=neighbors.device).repeat_interleave(k)
    return torch.stack([(neighbors + first).flatten(), centers])


def geometric_layer(block: nn.Sequential, k: int) -> tuple[nn.Module, str]:
    """Return the same layer of torch_geometric, (B, N, C) -> (B N, C), and what it is made of.

    Raises:
        UserError: torch_geometric cannot be imported.
    """
    try:
        from torch_geometric.nn import DynamicEdgeConv, EdgeConv
    except ImportError as error:
        raise UserError(f"torch_geometric cannot be imported ({error}): pip install torch_geometric") from error
    conv, norm, activation = block
    difference, center = conv.weight.detach().flatten(1).chunk(2, dim=1)
    linear = nn.Linear(*reversed(conv.weight.shape[:2]), bias=False)
    weight = torch.cat([center, difference], dim=1)  # its input is [x_i ; x_j - x_i], in this order
    parts = nn.Sequential(linear, nn.BatchNorm1d(norm.num_features), nn.LeakyReLU(activation.negative_slope))
    try:
        layer = DynamicEdgeConv(parts, k=k, aggr="max")
    except ImportError:  # no torch_cluster; from torch_geometric 2.7 on, no pyg-lib
        layer = EdgeConv(parts, aggr="max")
        linear.weight.data = weight  # set last: the constructor initializes the weights
        layer.run = lambda x: layer(x.flatten(0, 1), edges(textbook_knn(x.mT, k)))
        return layer, "EdgeConv, neighbors by the textbook (the library that DynamicEdgeConv needs is missing)"
    linear.weight.data = weight
    layer.run = lambda x: layer(x.flatten(0, 1), torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1]))
    return layer, "DynamicEdgeConv"


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time both layers in turn and compare their outputs and gradients."""
    torch.manual_seed(args.seed)
    block = edge_block(2 * args.channels, args.channels)
    layer, made_of = geometric_layer(block, args.k)
    block, layer = block.to(device), layer.to(device)
    x = torch.randn(args.batch, args.points, args.channels).to(device)

    def ours(x: Tensor) -> Tensor:
        return edge_conv(x.flatten(0, 1), edges(knn(x, args.k))[0].view(-1, args.k), block)

    def step(form: Any) -> tuple[Tensor, Tensor]:
        points = x.clone().requires_grad_()
        out = form(points)
        out.square().mean().backward()
        return out.detach(), points.grad

    forms = {"ours": ours, "textbook": layer.run}
    (our_out, our_gradient), (their_out, their_gradient) = (step(form) for form in forms.values())
    actions = {name: lambda form=form: step(form) for name, form in forms.items()}
    return {
        **compare(seconds_in_turn(actions, repeats=args.repeats, device=device)),
        "difference": ((our_out - their_out).norm() / their_out.norm()).item(),
        "gradient_difference": ((our_gradient - their_gradient).norm() / their_gradient.norm()).item(),
        "textbook_is": made_of,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    s = result["settings"]
    cells = [f"{result[name]['seconds_median']:.3f}" for name in ("ours", "textbook")]
    rows = [("", "ours", "torch_geometric", "torch_geometric / ours"), ("seconds per step", *cells, ratio_text(result))]
    return "\n".join(
        [
            f"one EdgeConv layer, {s['channels']} to {s['channels']} channels, {s['batch']} x {s['points']} points, "
            f"k = {s['k']}, forward and backward, {place_text(result)}",
            f"torch_geometric: {result['textbook_is']}",
            text_table(rows),
            f"outputs differ by {result['difference']:.0e}, gradients by {result['gradient_difference']:.0e}",
        ]
    )


QUICK = {"batch": 2, "points": 64, "channels": 8, "k": 4, "repeats": 1}
BENCHMARK = Benchmark("dynamic_edgeconv", __doc__, add_arguments, measure, table, quick=QUICK, check=enough_points)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
