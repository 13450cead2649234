"""One EdgeConv layer, ours against torch_geometric's, forward and backward with the search for neighbours.

torch_geometric is not a requirement of this project; install it for the comparison (``pip install torch_geometric``).
Its ``DynamicEdgeConv`` searches neighbours by torch_cluster up to version 2.6, by pyg-lib from 2.7 on. Without them its
``EdgeConv`` is called on the neighbours of benchmarks/reference/textbook.py, and the result says so. torch_cluster is
compiled on the spot, a quarter of an hour:
``pip install "torch_geometric<2.7"; pip install --no-build-isolation torch_cluster``.

The layer is DGCNN's second: 64 channels to 64, batch norm and leaky ReLU, k neighbours in the space of the features.
Both compute the same: batch norm is over all edges in both. How far they differ is printed.

  python -m benchmarks.dynamic_edgeconv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    add_measuring_arguments,
    compare,
    place_text,
    provenance,
    ratio_text,
    seconds_in_turn,
    text_table,
)
from benchmarks.reference.textbook import textbook_knn
from engine.device import resolve_device
from models.ops.edge_conv import edge_conv
from models.ops.knn import knn
from models.ops.layers import edge_block
from utils.cli import (
    HelpFormatter,
    positive_int,
    run,
    write_json,
)
from utils.errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dynamic_edgeconv", description=__doc__, formatter_class=HelpFormatter
    )
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=8, metavar="B", help="clouds")
    g.add_argument("--points", type=positive_int, default=1024, metavar="N", help="points per cloud")
    g.add_argument("--channels", type=positive_int, default=64, metavar="C", help="channels in and out")
    g.add_argument("--k", type=positive_int, default=20, help="neighbours per point, itself included")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    add_measuring_arguments(parser, repeats=3)
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.points, args.channels, args.k, args.repeats = 2, 64, 8, 4, 1
    return args


def edges(neighbors: Tensor) -> Tensor:
    """(B, N, k) neighbours within each cloud -> (2, B N k) edges from neighbour to centre over all points."""
    batch, points, k = neighbors.shape
    first = torch.arange(0, batch * points, points, device=neighbors.device)[:, None, None]
    centers = torch.arange(batch * points, device=neighbors.device).repeat_interleave(k)
    return torch.stack([(neighbors + first).flatten(), centers])


def geometric_layer(block: nn.Sequential, k: int) -> tuple[nn.Module, str]:
    """The same layer by torch_geometric, (points (B, N, C)) -> (B N, C), and what it is made of.

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
    weight = torch.cat([center, difference], dim=1)  # it puts [x_i ; x_j - x_i] in this order
    parts = nn.Sequential(linear, nn.BatchNorm1d(norm.num_features), nn.LeakyReLU(activation.negative_slope))
    try:
        layer = DynamicEdgeConv(parts, k=k, aggr="max")
    except ImportError:  # its search of neighbours is in torch_cluster, from torch_geometric 2.7 on in pyg-lib
        layer = EdgeConv(parts, aggr="max")
        linear.weight.data = weight  # only now: the constructor draws its own weights
        layer.run = lambda x: layer(x.flatten(0, 1), edges(textbook_knn(x.mT, k)))
        return layer, "EdgeConv, neighbours by the textbook (the library that DynamicEdgeConv needs is missing)"
    linear.weight.data = weight
    layer.run = lambda x: layer(x.flatten(0, 1), torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1]))
    return layer, "DynamicEdgeConv"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    args = parse_args(argv)
    before, device = torch.get_num_threads(), resolve_device(args.device)
    torch.set_num_threads(args.threads)
    about = provenance(device)
    try:
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
        result = compare(seconds_in_turn(actions, repeats=args.repeats, device=device))
    finally:
        torch.set_num_threads(before)
    result["difference"] = ((our_out - their_out).norm() / their_out.norm()).item()
    result["gradient_difference"] = ((our_gradient - their_gradient).norm() / their_gradient.norm()).item()
    result["textbook_is"] = made_of
    result["settings"] = {key: value for key, value in vars(args).items() if key != "json"} | {"device": str(device)}
    result |= about
    cells = [f"{result[name]['seconds_median']:.3f}" for name in ("ours", "textbook")]
    rows = [("", "ours", "torch_geometric", "torch_geometric / ours"), ("seconds per step", *cells, ratio_text(result))]
    print(
        f"one EdgeConv layer, {args.channels} to {args.channels} channels, {args.batch} x {args.points} points, "
        f"k = {args.k}, forward and backward, {place_text(result)}"
    )
    print(f"torch_geometric: {made_of}")
    print(text_table(rows))
    print(f"outputs differ by {result['difference']:.0e}, gradients by {result['gradient_difference']:.0e}")
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
