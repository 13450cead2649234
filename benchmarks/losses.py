"""NT-Xent, forward and backward: ours against the class of lightly that the released code uses.

Both get the same vectors; the table says how far their losses and gradients differ. Needs lightly
(requirements-dev.txt).

  python -m benchmarks.losses
  python -m benchmarks.losses --batch 512 --repeats 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import Tensor

from benchmarks.frame import Benchmark
from benchmarks.measure import compare, place_text, ratio_text, seconds_in_turn, text_table
from models.losses import nt_xent
from utils.cli import positive_int, run
from utils.errors import UserError

TEMPERATURE = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--batch", type=positive_int, default=200, metavar="B", help="pairs of vectors")
    g.add_argument("--dims", type=positive_int, default=256, metavar="D", help="length of the vectors")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")


def step(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the loss and the gradient of the first vectors, (B, D)."""
    a = a.detach().requires_grad_()
    value = loss(a, b)
    value.backward()
    return value.detach(), a.grad


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time both losses in turn and compare their values and gradients.

    Raises:
        UserError: lightly cannot be imported.
    """
    try:
        from lightly.loss import NTXentLoss
    except ImportError as error:
        raise UserError(f"lightly cannot be imported ({error}): pip install -r requirements-dev.txt") from error
    generator = torch.Generator().manual_seed(args.seed)
    a, b = (torch.randn(args.batch, args.dims, generator=generator).to(device) for _ in range(2))
    losses = {
        "ours": lambda a, b: nt_xent(a, b, temperature=TEMPERATURE),
        "textbook": NTXentLoss(temperature=TEMPERATURE),
    }
    (ours, our_gradient), (theirs, their_gradient) = (step(loss, a, b) for loss in losses.values())
    actions = {name: lambda loss=loss: step(loss, a, b) for name, loss in losses.items()}
    result = compare(seconds_in_turn(actions, repeats=args.repeats, device=device))
    result["loss_difference"] = (ours - theirs).abs().item()
    result["gradient_difference"] = ((our_gradient - their_gradient).norm() / their_gradient.norm()).item()
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    s = result["settings"]
    cells = [f"{1e3 * result[name]['seconds_median']:.2f}" for name in ("ours", "textbook")]
    rows = [("", "ours", "lightly", "lightly / ours"), ("ms per step", *cells, ratio_text(result))]
    return "\n".join(
        [
            f"NT-Xent of {s['batch']} pairs of {s['dims']} numbers, forward and backward, {place_text(result)}",
            text_table(rows),
            f"losses differ by {result['loss_difference']:.0e}, gradients by {result['gradient_difference']:.0e}",
        ]
    )


BENCHMARK = Benchmark(
    "losses", __doc__, add_arguments, measure, table, repeats=20, quick={"batch": 8, "dims": 16, "repeats": 2}
)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
