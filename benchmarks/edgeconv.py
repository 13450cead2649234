"""Time and memory of EdgeConv without edge tensors against the textbook formulation.

One training step (forward and backward) of a DGCNN encoder, once as models/ computes it and once as the formulas say it
(benchmarks/reference/textbook.py: a tensor of all N x k edges per layer). Both carry the same weights and get the same
clouds, so they compute the same numbers up to rounding; how far the pooled features differ is printed with the
result. In float32 that can be a few per cent for a few features, where rounding decides which of two almost equally
distant points is the k-th neighbour; in float64 both agree to 1e-9 (tests/models).

Time: both in this process, in turn, after one step each that is not counted; the ratio is the median of the ratios of
neighbouring steps, so that a machine that slows down meanwhile does not favour either side.
Profile: one step each under PyTorch's profiler; what each kind of operation takes, in per cent of the step.
Memory: one step each in a fresh process. On a CPU that is the largest resident size of the whole process,
Python and libraries included, and what the step added to it; on a GPU what PyTorch allocated at most.

  python -m benchmarks.edgeconv                                  # the released size: about 3 minutes on two cores
  python -m benchmarks.edgeconv --batch 2 --points 256           # a try-out: seconds
  python -m benchmarks.edgeconv --model dgcnn_partseg --json runs/edgeconv.json
  python -m benchmarks.edgeconv --device cuda --batch 32 --repeats 20
  CROSSNET_KERNELS=torch python -m benchmarks.edgeconv --device cuda    # without Triton kernels (models/ops/backend.py)
  python -m benchmarks.edgeconv --alone --points 8192            # ours only, where the textbook's edges do not fit
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.measure import (
    FORMULATIONS,
    add_measuring_arguments,
    compare,
    in_fresh_process,
    memory_of,
    place_text,
    provenance,
    ratio_text,
    seconds_in_turn,
    text_table,
)
from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from engine.device import resolve_device
from models import build_encoder
from models.ops import knn as knn_ops
from utils.cli import (
    HelpFormatter,
    positive_int,
    run,
    write_json,
)
from utils.errors import UserError

QUICK = {"batch": 2, "points": 128, "emb_dims": 64, "repeats": 2}
# Kinds of operations in a profile, by parts of their names; the first that fits counts.
STAGES = {
    "selection of neighbours": ("topk", "sort", "_largest", "_nearest"),
    "gather, scatter, reduce over neighbours": (
        *("index", "gather", "scatter", "embedding_bag", "max", "bincount", "sparse", "_edge_", "_gradient_of_"),
    ),
    "matrix products": ("mm", "convolution", "linear", "matmul"),
    "batch norm and activation": ("norm", "relu", "addcmul", "mul", "div", "sub", "add", "square", "sum", "mean"),
    "copies and allocation": ("copy", "cat", "clone", "fill", "zero", "empty", "contiguous"),
}
OTHER = "other"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edgeconv", description=__doc__, formatter_class=HelpFormatter
    )
    g = parser.add_argument_group("what is measured")
    g.add_argument("--model", choices=TEXTBOOK_ENCODERS, default="dgcnn_cls", help="encoder")
    g.add_argument("--batch", type=positive_int, default=16, metavar="B", help="clouds per step")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points per cloud")
    g.add_argument("--k", type=positive_int, default=20, help="neighbours per point, itself included")
    g.add_argument("--emb_dims", type=positive_int, default=1024, metavar="E", help="width of the embedding")
    g.add_argument("--alone", action="store_true", help="only ours, no comparison")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    add_measuring_arguments(parser, repeats=3)
    parser.add_argument("--memory_of", choices=FORMULATIONS, help=argparse.SUPPRESS)  # what the fresh processes run
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if args.k > args.points:
        raise UserError(f"--k {args.k} neighbours need at least as many points, not --points {args.points}")
    if args.model == "dgcnn_partseg" and args.batch < 2:
        raise UserError("--batch 1: the transformer of dgcnn_partseg normalises over clouds and needs at least 2")
    return args


def build(args: argparse.Namespace, formulation: str, device: torch.device) -> nn.Module:
    """The encoder in one of its formulations; the same weights for the same seed."""
    torch.manual_seed(args.seed)
    ours = build_encoder(args.model, k=args.k, emb_dims=args.emb_dims)
    if formulation == "ours":
        return ours.to(device)
    textbook = TEXTBOOK_ENCODERS[args.model](k=args.k, emb_dims=args.emb_dims)
    textbook.load_state_dict(ours.state_dict())
    return textbook.to(device)


def training_step(encoder: nn.Module, clouds: torch.Tensor) -> torch.Tensor:
    """Forward and backward of one batch (B, 3, N); returns the pooled features (B, D)."""
    encoder.zero_grad(set_to_none=True)
    pooled = encoder(clouds)[0]
    pooled.square().mean().backward()
    return pooled.detach()


def stage_shares(encoder: nn.Module, clouds: torch.Tensor) -> dict[str, float]:
    """Per cent of a step's operations by kind, see ``STAGES``; on a GPU of its kernels' time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if clouds.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    select = knn_ops._largest_places

    def recorded(*inputs: Any) -> torch.Tensor:  # NumPy's part of it would not be seen
        with torch.profiler.record_function("_largest_places"):
            return select(*inputs)

    with (
        mock.patch.object(knn_ops, "_largest_places", recorded),
        torch.profiler.profile(activities=activities) as profile,
    ):
        training_step(encoder, clouds)
    shares = dict.fromkeys([*STAGES, OTHER], 0.0)
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::").lower()
        stage = next((stage for stage, parts in STAGES.items() if any(part in name for part in parts)), OTHER)
        shares[stage] += event.self_device_time_total if clouds.is_cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {stage: 100 * time / total for stage, time in shares.items()}


def measure(args: argparse.Namespace, argv: list[str], device: torch.device, clouds: torch.Tensor) -> dict[str, Any]:
    """Memory first, in fresh processes; then time, in turn; then the profiles."""
    about = provenance(device)
    names = FORMULATIONS[:1] if args.alone else FORMULATIONS
    memory = {name: in_fresh_process("benchmarks.edgeconv", [*argv, "--memory_of", name]) for name in names}
    encoders = {name: build(args, name, device) for name in names}
    clouds = clouds.to(device)
    pooled = {name: training_step(encoder, clouds) for name, encoder in encoders.items()}
    seconds = seconds_in_turn(
        {name: lambda encoder=encoder: training_step(encoder, clouds) for name, encoder in encoders.items()},
        repeats=args.repeats,
        device=device,
    )
    result: dict[str, Any]
    if args.alone:
        (times,) = seconds.values()
        result = {"ours": {"seconds": times, "seconds_median": statistics.median(times), **memory["ours"]}}
    else:
        difference = (pooled["ours"] - pooled["textbook"]).abs() / pooled["textbook"].abs().max()
        result = {
            **compare(seconds, memory),
            "largest_relative_difference": difference.max().item(),
            "share_beyond_1e-4": (difference > 1e-4).double().mean().item(),
        }
    return {
        **result,
        "profile": {name: stage_shares(encoder, clouds) for name, encoder in encoders.items()},
        "settings": {
            **{key: getattr(args, key) for key in ("model", "batch", "points", "k", "emb_dims", "repeats", "seed")},
            "device": str(device),
            "threads": args.threads,
        },
        **about,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    settings, ours, textbook = result["settings"], result["ours"], result.get("textbook")
    sentence = (
        f"{settings['model']}, forward + backward, {settings['batch']} x {settings['points']} points, "
        f"k = {settings['k']}, float32, {place_text(result)}"
    )
    if textbook is None:
        step = ours["peak_mb"] - ours["before_mb"]
        numbers = f"{ours['seconds_median']:.3f} s a step, {ours['peak_mb']:.0f} MB at most, {step:.0f} by the step"
        return f"{sentence}\n{numbers}"
    rows = [
        ("", "ours", "textbook", "textbook / ours"),
        (
            "seconds per step",
            f"{ours['seconds_median']:.3f}",
            f"{textbook['seconds_median']:.3f}",
            ratio_text(result),
        ),
        ("peak memory, MB", f"{ours['peak_mb']:.0f}", f"{textbook['peak_mb']:.0f}", f"{result['memory_ratio']:.2f}"),
        (
            "  by the step alone",
            f"{ours['peak_mb'] - ours['before_mb']:.0f}",
            f"{textbook['peak_mb'] - textbook['before_mb']:.0f}",
            f"{result['step_memory_ratio']:.2f}" if result["step_memory_ratio"] else "",
        ),
        *(
            (f"{stage}, %", f"{share:.0f}", f"{result['profile']['textbook'][stage]:.0f}", "")
            for stage, share in result["profile"]["ours"].items()
        ),
    ]
    difference = (
        f"pooled features differ by {result['largest_relative_difference']:.1e} of their maximum at most, "
        f"{result['share_beyond_1e-4']:.2%} of them by more than 1e-4"
    )
    return "\n".join([sentence, text_table(rows), difference])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = resolve_device(args.device)
    torch.set_num_threads(args.threads)
    clouds = torch.rand(args.batch, 3, args.points, generator=torch.Generator().manual_seed(args.seed))
    if args.memory_of:
        encoder, clouds = build(args, args.memory_of, device), clouds.to(device)
        result = memory_of(lambda: training_step(encoder, clouds), device)
        print(json.dumps(result))
        return result
    result = measure(args, argv, device, clouds)
    print(table(result))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
