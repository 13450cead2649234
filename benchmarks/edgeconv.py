"""Time and memory of EdgeConv without edge tensors against the textbook formulation.

One training step (forward and backward) of a DGCNN encoder, once as models/ computes it and once as the formulas read
(benchmarks/reference/textbook.py: a tensor of all N x k edges per layer). Both have the same weights and clouds, so
they compute the same numbers up to rounding; the table says how far the pooled features differ. In float32 a few
features may differ by a few percent, where rounding decides which of two almost equally distant points is the k-th
neighbor; in float64 both agree to 1e-9 (tests/models).

Time: both in this process, in turn, after one untimed step each. The ratio is the median over successive pairs of
steps, so that a machine that slows down meanwhile favors neither side.
Profile: one step each under PyTorch's profiler, in percent of the step by kind of operation.
Memory: one step each in a fresh process. On a CPU, the peak resident size of the process (Python and libraries
included) and what the step added to it; on a GPU, the peak that PyTorch allocated.

  python -m benchmarks.edgeconv                                  # the released size: about 3 minutes on two cores
  python -m benchmarks.edgeconv --batch 2 --points 256           # a try-out: seconds
  python -m benchmarks.edgeconv --model dgcnn_partseg --json runs/edgeconv.json
  python -m benchmarks.edgeconv --device cuda --batch 32 --repeats 20
  CROSSNET_KERNELS=torch python -m benchmarks.edgeconv --device cuda    # without Triton kernels (models/ops/backend.py)
  python -m benchmarks.edgeconv --alone --points 8192            # ours only, where the textbook's edges do not fit
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import nn
from torch.autograd import DeviceType

from benchmarks.frame import Benchmark, enough_points
from benchmarks.measure import FORMULATIONS, compare, memory_of, place_text, ratio_text, seconds_in_turn, text_table
from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from engine.device import resolve_device
from models import build_encoder
from models.ops import knn as knn_ops
from utils.cli import positive_int, run
from utils.errors import UserError
from utils.reproducible import deterministic

# Kinds of operations in a profile, by parts of their names, "^" the beginning of one; the first match counts.
STAGES = {
    "selection of neighbors": ("topk", "sort", "_largest", "^_select"),
    "gather, scatter, reduce over neighbors": (
        *("index", "gather", "scatter", "embedding_bag", "max", "bincount", "sparse", "_edge_", "_gradient_of_"),
    ),
    "matrix products": ("mm", "convolution", "linear", "matmul"),
    "batch norm and activation": (
        "norm",
        "relu",
        "addcmul",
        "mul",
        "div",
        "sub",
        "add",
        "square",
        "sum",
        "mean",
        "bn_",
    ),
    "copies and allocation": ("copy", "memcpy", "memset", "cat", "clone", "fill", "zero", "empty", "contiguous"),
}
OTHER = "other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--model", choices=TEXTBOOK_ENCODERS, default="dgcnn_cls", help="encoder")
    g.add_argument("--batch", type=positive_int, default=16, metavar="B", help="clouds per step")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points per cloud")
    g.add_argument("--k", type=positive_int, default=20, help="neighbors per point, itself included")
    g.add_argument("--emb_dims", type=positive_int, default=1024, metavar="E", help="width of the embedding")
    g.add_argument("--alone", action="store_true", help="only ours, no comparison")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")


def check(args: argparse.Namespace) -> None:
    """Raise UserError if there are too few points or clouds."""
    enough_points(args)
    if args.model == "dgcnn_partseg" and args.batch < 2:
        raise UserError("--batch 1: the transformer of dgcnn_partseg normalizes over clouds and needs at least 2")


def random_clouds(args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Return the batch, (B, 3, N)."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.rand(args.batch, 3, args.points, generator=generator).to(device)


def build(args: argparse.Namespace, formulation: str, device: torch.device) -> nn.Module:
    """Build the encoder in one formulation; the weights follow from the seed alone."""
    torch.manual_seed(args.seed)
    ours = build_encoder(args.model, k=args.k, emb_dims=args.emb_dims)
    if formulation == "ours":
        return ours.to(device)
    textbook = TEXTBOOK_ENCODERS[args.model](k=args.k, emb_dims=args.emb_dims)
    textbook.load_state_dict(ours.state_dict())
    return textbook.to(device)


@deterministic(False)  # as in a run: cuDNN searches for its fastest convolutions, which the textbook form needs most
def training_step(encoder: nn.Module, clouds: torch.Tensor) -> torch.Tensor:
    """Run forward and backward on a batch, (B, 3, N); return the pooled features, (B, D)."""
    encoder.zero_grad(set_to_none=True)
    pooled = encoder(clouds)[0]
    pooled.square().mean().backward()
    return pooled.detach()


def stage_shares(encoder: nn.Module, clouds: torch.Tensor) -> dict[str, float]:
    """Return the percentage of a step's time by kind of operation (``STAGES``); on a GPU, of the kernels' time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if clouds.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    select = knn_ops._largest_places

    def recorded(*inputs: Any) -> torch.Tensor:  # without this, the part in NumPy would be missing
        with torch.profiler.record_function("_largest_places"):
            return select(*inputs)

    with (
        mock.patch.object(knn_ops, "_largest_places", recorded),
        torch.profiler.profile(activities=activities) as profile,
    ):
        training_step(encoder, clouds)
    return shares_of(profile.key_averages(), on_gpu=clouds.is_cuda)


def shares_of(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    """Return the percentage of the time of profiled events by kind of operation (``STAGES``)."""
    shares = dict.fromkeys([*STAGES, OTHER], 0.0)
    for event in events:
        # PyTorch's operations repeat the time of the kernels that they launch; Triton's kernels have no operation.
        is_kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if on_gpu and not is_kernel:
            continue
        name = "^" + event.key.removeprefix("aten::").lower()
        stage = next((stage for stage, parts in STAGES.items() if any(part in name for part in parts)), OTHER)
        shares[stage] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(shares.values()) or 1.0  # a profiler that may not read the GPU's counters finds no kernels
    return {stage: 100 * time / total for stage, time in shares.items()}


def memory_of_step(args: argparse.Namespace, words: Sequence[str]) -> dict[str, float]:
    """Measure the memory of one step of the formulation that ``words`` names, in this process."""
    device = resolve_device(args.device)
    encoder, clouds = build(args, *words, device), random_clouds(args, device)
    return memory_of(lambda: training_step(encoder, clouds), device)


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure memory in fresh processes, then time in turn, then the profiles."""
    names = FORMULATIONS[:1] if args.alone else FORMULATIONS
    memory = {name: BENCHMARK.fresh(args, name) for name in names}
    encoders = {name: build(args, name, device) for name in names}
    clouds = random_clouds(args, device)
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
    return {**result, "profile": {name: stage_shares(encoder, clouds) for name, encoder in encoders.items()}}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
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
        ("seconds per step", f"{ours['seconds_median']:.3f}", f"{textbook['seconds_median']:.3f}", ratio_text(result)),
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


QUICK = {"batch": 2, "points": 128, "emb_dims": 64, "repeats": 2}
BENCHMARK = Benchmark("edgeconv", __doc__, add_arguments, measure, table, quick=QUICK, check=check, part=memory_of_step)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
