"""Time and memory of EdgeConv without edge tensors against the textbook formulation.

One training step (forward and backward) of a DGCNN encoder, once as models/ computes it and once as the formulas say it
(tests/textbook.py: a tensor of all N x k edges per layer). Both carry the same weights and get the same clouds, so they
compute the same numbers up to rounding; how far the pooled features differ is printed with the result. In float32 that
can be a few per cent for a few features, where rounding decides which of two almost equally distant points is the k-th
neighbour; in float64 both agree to 1e-9 (tests/models).

Time: both in this process, in turn, after one step each that is not counted; the ratio is the median of the ratios of
neighbouring steps, so that a machine that slows down meanwhile does not favour either side.
Memory: one step each in a fresh process of its own. On a CPU that is the largest resident size of the whole process,
Python and libraries included, and what the step added to it; on a GPU what PyTorch allocated at most.

  python -m benchmarks.edgeconv                                  # the released size: about 3 minutes on two cores
  python -m benchmarks.edgeconv --batch 2 --points 256           # a try-out: seconds
  python -m benchmarks.edgeconv --model dgcnn_partseg --json runs/edgeconv.json
  python -m benchmarks.edgeconv --device cuda --batch 32 --repeats 20
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models import build_encoder
from tests.textbook import TEXTBOOK_ENCODERS
from utils.cli import HelpFormatter, positive_int, resolve_device, run, seed_number, write_json
from utils.errors import UserError
from utils.training import git_commit, versions

FORMULATIONS = ("ours", "textbook")


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
    g = parser.add_argument_group("how")
    g.add_argument("--repeats", type=positive_int, default=3, metavar="R", help="timed steps of each formulation")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--threads", type=positive_int, default=2, metavar="T", help="CPU threads of PyTorch")
    g.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of the weights and the clouds")
    g.add_argument("--json", metavar="FILE", help="also write the result, with machine and versions, to FILE")
    parser.add_argument("--memory_of", choices=FORMULATIONS, help=argparse.SUPPRESS)  # what the fresh processes run
    args = parser.parse_args(argv)
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


def seconds_of_step(encoder: nn.Module, clouds: torch.Tensor) -> float:
    """Wall-clock seconds of one step, on a GPU until it has finished."""

    def now() -> float:
        if clouds.is_cuda:
            torch.cuda.synchronize(clouds.device)
        return time.perf_counter()

    start = now()
    training_step(encoder, clouds)
    return now() - start


def resident_megabytes() -> float:
    """Largest resident size of this process so far, in MB (10^6 bytes)."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e6


def own_memory(args: argparse.Namespace, device: torch.device, clouds: torch.Tensor) -> dict[str, float]:
    """Run one step of ``args.memory_of`` in this process: MB at most, and MB before the step."""
    encoder, clouds = build(args, args.memory_of, device), clouds.to(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) / 1e6
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = resident_megabytes()
    training_step(encoder, clouds)
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else resident_megabytes()
    return {"peak_mb": peak, "before_mb": before}


def memory_in_fresh_process(argv: list[str], formulation: str) -> dict[str, float]:
    """``own_memory`` of one formulation, measured in a process that has done nothing else.

    Raises:
        UserError: that process failed, for instance because memory ran out.
    """
    command = [sys.executable, "-m", "benchmarks.edgeconv", *argv, "--memory_of", formulation]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"measuring the memory of the {formulation} formulation ended with code {result.returncode} ({reason}); "
            "try a smaller --batch"
        )
    return json.loads(result.stdout.strip().splitlines()[-1])


def machine(device: torch.device) -> dict[str, Any]:
    """Names of the processor and the GPU, and how busy the machine was."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # no Linux
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def measure(args: argparse.Namespace, argv: list[str], device: torch.device, clouds: torch.Tensor) -> dict[str, Any]:
    """Both formulations: memory first (a child inherits its parent's peak, which is still small), then time."""
    about = machine(device)
    memory = {name: memory_in_fresh_process(argv, name) for name in FORMULATIONS}
    encoders = {name: build(args, name, device) for name in FORMULATIONS}
    clouds = clouds.to(device)
    ours, textbook = (training_step(encoders[name], clouds) for name in FORMULATIONS)
    difference = (ours - textbook).abs() / textbook.abs().max()
    seconds: dict[str, list[float]] = {name: [] for name in FORMULATIONS}
    for _ in range(args.repeats):
        for name in FORMULATIONS:
            seconds[name].append(seconds_of_step(encoders[name], clouds))
    step_memory = {name: memory[name]["peak_mb"] - memory[name]["before_mb"] for name in FORMULATIONS}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["textbook"], strict=True)]
    return {
        **{
            name: {"seconds": seconds[name], "seconds_median": statistics.median(seconds[name]), **memory[name]}
            for name in FORMULATIONS
        },
        "time_ratio": statistics.median(ratios),
        "time_ratios": ratios,
        "memory_ratio": memory["textbook"]["peak_mb"] / memory["ours"]["peak_mb"],
        # None where a tiny step stayed below what loading the libraries had taken for a moment.
        "step_memory_ratio": step_memory["textbook"] / step_memory["ours"] if step_memory["ours"] else None,
        "largest_relative_difference": difference.max().item(),
        "share_beyond_1e-4": (difference > 1e-4).double().mean().item(),
        "settings": {
            **{key: getattr(args, key) for key in ("model", "batch", "points", "k", "emb_dims", "repeats", "seed")},
            "device": str(device),
            "threads": args.threads,
        },
        "machine": about,
        "versions": versions(),
        "commit": git_commit(),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    settings, about = result["settings"], result["machine"]
    ours, textbook, ratios = result["ours"], result["textbook"], result["time_ratios"]
    where = about["gpu"] or f"{about['cpu']}, {settings['threads']} threads"
    sentence = (
        f"{settings['model']}, forward + backward, {settings['batch']} x {settings['points']} points, "
        f"k = {settings['k']}, float32, {where}"
    )
    rows = [
        ("", "ours", "textbook", "textbook / ours"),
        (
            "seconds per step",
            f"{ours['seconds_median']:.3f}",
            f"{textbook['seconds_median']:.3f}",
            f"{result['time_ratio']:.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)",
        ),
        (
            "peak memory, MB",
            f"{ours['peak_mb']:.0f}",
            f"{textbook['peak_mb']:.0f}",
            f"{result['memory_ratio']:.2f}",
        ),
        (
            "  by the step alone",
            f"{ours['peak_mb'] - ours['before_mb']:.0f}",
            f"{textbook['peak_mb'] - textbook['before_mb']:.0f}",
            f"{result['step_memory_ratio']:.2f}" if result["step_memory_ratio"] else "",
        ),
    ]
    lines = [f"{name:<20}{a:>10}{b:>10}   {c}".rstrip() for name, a, b, c in rows]
    lines.append(
        f"pooled features differ by {result['largest_relative_difference']:.1e} of their maximum at most, "
        f"{result['share_beyond_1e-4']:.2%} of them by more than 1e-4"
    )
    return "\n".join([sentence, *lines])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = resolve_device(args.device)
    torch.set_num_threads(args.threads)
    clouds = torch.rand(args.batch, 3, args.points, generator=torch.Generator().manual_seed(args.seed))
    if args.memory_of:
        result = own_memory(args, device, clouds)
        print(json.dumps(result))
        return result
    result = measure(args, argv, device, clouds)
    print(table(result))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
