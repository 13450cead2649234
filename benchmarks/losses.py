"""NT-Xent: ours against lightly's class, which the released code uses, forward and backward.

Both see the same vectors; how far losses and gradients differ is printed. Without lightly (requirements-dev.txt) the
benchmark says so and ends.

  python -m benchmarks.losses
  python -m benchmarks.losses --batch 512 --repeats 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.measure import (
    add_measuring_arguments,
    compare,
    place_text,
    provenance,
    ratio_text,
    seconds_in_turn,
    text_table,
)
from engine.device import resolve_device
from models.losses import nt_xent
from utils.cli import (
    HelpFormatter,
    positive_int,
    run,
    write_json,
)
from utils.errors import UserError

TEMPERATURE = 0.2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=__doc__, formatter_class=HelpFormatter
    )
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=200, metavar="B", help="pairs of vectors")
    g.add_argument("--dims", type=positive_int, default=256, metavar="D", help="length of the vectors")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    add_measuring_arguments(parser, repeats=20)
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.dims, args.repeats = 8, 16, 2
    return args


def step(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and the gradient of the first vectors."""
    a = a.detach().requires_grad_()
    value = loss(a, b)
    value.backward()
    return value.detach(), a.grad


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object.

    Raises:
        UserError: lightly cannot be imported.
    """
    args = parse_args(argv)
    try:
        from lightly.loss import NTXentLoss
    except ImportError as error:
        raise UserError(f"lightly cannot be imported ({error}): pip install -r requirements-dev.txt") from error
    before, device = torch.get_num_threads(), resolve_device(args.device)
    torch.set_num_threads(args.threads)
    about = provenance(device)
    try:
        generator = torch.Generator().manual_seed(args.seed)
        a, b = (torch.randn(args.batch, args.dims, generator=generator).to(device) for _ in range(2))
        losses = {
            "ours": lambda a, b: nt_xent(a, b, temperature=TEMPERATURE),
            "textbook": NTXentLoss(temperature=TEMPERATURE),
        }
        (ours, our_gradient), (theirs, their_gradient) = (step(loss, a, b) for loss in losses.values())
        actions = {name: lambda loss=loss: step(loss, a, b) for name, loss in losses.items()}
        result = compare(seconds_in_turn(actions, repeats=args.repeats, device=device))
    finally:
        torch.set_num_threads(before)
    result["loss_difference"] = (ours - theirs).abs().item()
    result["gradient_difference"] = ((our_gradient - their_gradient).norm() / their_gradient.norm()).item()
    result["settings"] = {key: value for key, value in vars(args).items() if key != "json"} | {"device": str(device)}
    result |= about
    cells = [f"{1e3 * result[name]['seconds_median']:.2f}" for name in ("ours", "textbook")]
    rows = [("", "ours", "lightly", "lightly / ours"), ("ms per step", *cells, ratio_text(result))]
    print(f"NT-Xent of {args.batch} pairs of {args.dims} numbers, forward and backward, {place_text(result)}")
    print(text_table(rows))
    print(f"losses differ by {result['loss_difference']:.0e}, gradients by {result['gradient_difference']:.0e}")
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
