r"""Find leaks: memory, open files and logs over thousands of steps of the real training loop.

Pretrains as train_crossnet_con.py does, with data workers, checkpoints and probes but a tiny model, and samples the
process and its workers every few steps. Growth is the slope of a line through the samples of the last three quarters;
earlier, PyTorch and the memory allocator still warm up. A run of the released length (450,000 steps) grows by 450 times
the slope per 1,000 steps.

Example:
  python -m benchmarks.long_run --steps 6000 --json long_run.json --picture long_run.png      # about 8 minutes
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
import train_crossnet_con as pretraining
from benchmarks.frame import Benchmark
from benchmarks.measure import DEMO
from benchmarks.reference.tiny_image_net import TinyImageNet
from datasets.pair_sources import open_source
from downstream.figures import PICTURE_TYPES, check_output_path
from engine.task import Run
from models.image import IMAGE_ENCODERS
from utils.cli import positive_int, run
from utils.errors import UserError, warn_on_failure
from utils.pictures import Figure, save_figure

BATCH = 4
LEAST_SAMPLES = 4  # the first quarter does not count, and a line and its error need three
SETTINGS = (
    f"--device cpu --batch_size {BATCH} --num_points 64 --k 4 --emb_dims 16 --image_model resnet18 --image_size 16 "
    "--eval_points 64 --exp_name long_run"
)
# Quantity -> unit, and the growth per 1,000 steps that would matter.
QUANTITIES = {
    "memory": ("MB", 1.0),
    "workers_memory": ("MB", 1.0),
    "open_files": ("", 0.5),
    "workers_open_files": ("", 0.5),
    "threads": ("", 0.5),
}


def children() -> list[int]:
    """Return the ids of this process's data workers; other children, such as a resource tracker, do not count."""
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def private_megabytes(process: int) -> float:
    """Return the memory that a process has written to and shares with none, in MB (10^6 bytes).

    Pages of libraries do not count: whether they are shared depends on what else runs.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / 1e6


def open_files(process: int) -> int:
    """Count the open file handles of a process, sockets and pipes included."""
    return len(os.listdir(f"/proc/{process}/fd"))


def sample(step: int, folder: Path) -> dict[str, float]:
    """Sample this process, its data workers and its files."""
    workers = children()
    return {
        "step": step,
        "memory": private_megabytes(os.getpid()),
        "workers": len(workers),
        "workers_memory": sum(map(private_megabytes, workers)),
        "open_files": open_files(os.getpid()),
        "workers_open_files": sum(map(open_files, workers)),
        "threads": len(os.listdir("/proc/self/task")),
        "run_log_bytes": (folder / "run.log").stat().st_size,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def growth(steps: list[int], values: list[float]) -> dict[str, float]:
    """Fit a line to the last three quarters: slope per 1,000 steps, its standard error, and the range of the values."""
    kept = np.asarray(steps) >= max(steps) / 4
    x, y = np.asarray(steps)[kept] / 1000, np.asarray(values)[kept]
    slope, offset = np.polyfit(x, y, 1)
    residual = float(np.sum((y - slope * x - offset) ** 2))
    error = math.sqrt(residual / max(1, len(x) - 2) / max(float(np.sum((x - x.mean()) ** 2)), 1e-12))
    return {
        "per_1000_steps": float(slope),
        "standard_error": error,
        "first": float(y[0]),
        "last": float(y[-1]),
        "least": float(y.min()),
        "most": float(y.max()),
    }


def draw(samples: list[dict[str, float]], path: Path) -> None:
    """Plot memory, open files and log size over the steps."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    steps = [sample["step"] for sample in samples]
    panels = (
        ("private memory (MB)", ("memory", "workers_memory"), 1),
        ("open files", ("open_files", "workers_open_files"), 1),
        ("run.log (kB)", ("run_log_bytes",), 1000),
    )
    for axis, (title, names, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            label = "data workers" if name.startswith("workers") else "training process"
            axis.plot(steps, [sample[name] / unit for sample in samples], label=label)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    save_figure(figure, path, dpi=110)


def measure(args: argparse.Namespace, _: torch.device) -> dict[str, Any]:
    """Train at least ``args.steps`` steps in whole epochs and sample the process on the way.

    Returns:
        The samples, the growth of each quantity, and the bytes of the log per 1,000 steps.
    """
    samples: list[dict[str, float]] = []

    class Watched(Run):
        def step(self, batch: dict[str, Any]) -> torch.Tensor:
            losses = super().step(batch)
            if self.progress.step % args.every == 0:
                samples.append(sample(self.progress.step, self.folder.path))
            return losses

    epochs = math.ceil(args.steps / (len(open_source(args.data_root).ids) // BATCH))
    network, usual = IMAGE_ENCODERS["resnet18"], pretraining.Run
    IMAGE_ENCODERS["resnet18"], pretraining.Run = TinyImageNet, Watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = {"data_root": args.data_root, "output_dir": folder, "epochs": epochs}
            flags |= {name: getattr(args, name) for name in ("workers", "save_every", "seed")}
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            record = pretraining.main([*SETTINGS.split(), *words])
            metrics_bytes = (Path(folder) / "long_run" / "metrics.jsonl").stat().st_size
    finally:
        IMAGE_ENCODERS["resnet18"], pretraining.Run = network, usual
    if args.picture:
        with warn_on_failure("the picture"):
            draw(samples, args.picture)
    steps = [int(taken["step"]) for taken in samples]
    slopes = {name: growth(steps, [taken[name] for taken in samples]) for name in QUANTITIES}
    return {
        "settings": {"steps": record["step"], "epochs": epochs},
        "checkpoints": record["step"] // args.save_every,
        "growth": slopes,
        "grows": [name for name, (_, limit) in QUANTITIES.items() if slopes[name]["per_1000_steps"] > limit],
        "run_log_bytes_per_1000_steps": growth(steps, [taken["run_log_bytes"] for taken in samples])["per_1000_steps"],
        "metrics_bytes_per_epoch": metrics_bytes / epochs,
        "samples": samples,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the run."""
    g = parser.add_argument_group("the run")
    g.add_argument("--data_root", default=str(DEMO), metavar="DIR", help="pairs to train on")
    g.add_argument("--steps", type=positive_int, default=2000, metavar="N", help="train at least N steps")
    g.add_argument("--every", type=positive_int, default=20, metavar="N", help="steps between samples")
    g.add_argument("--workers", type=positive_int, default=2, metavar="W", help="data workers")
    g.add_argument("--save_every", type=positive_int, default=50, metavar="N", help="steps between checkpoints")
    g.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the samples")


def check(args: argparse.Namespace) -> None:
    """Raise UserError without /proc, with too few samples for a line and its error, or if no picture can be written."""
    if args.picture:
        check_output_path(args.picture, PICTURE_TYPES)
    if math.ceil(args.steps / args.every) < LEAST_SAMPLES:
        raise UserError(
            f"--every {args.every} takes fewer than {LEAST_SAMPLES} samples in --steps {args.steps}; lower --every"
        )
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this measurement reads /proc, which only Linux has")


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [f"{'':<20}{'per 1,000 steps':>20}{'error':>9}{'first':>9}{'last':>9}{'most':>9}"]
    for name, (unit, _) in QUANTITIES.items():
        g = result["growth"][name]
        shown = f"{g['per_1000_steps']:+.3f} {unit}"
        numbers = f"{g['standard_error']:>9.3f}{g['first']:>9.1f}{g['last']:>9.1f}{g['most']:>9.1f}"
        lines.append(f"{name:<20}{shown:>20}{numbers}")
    lines.append(f"run.log: {result['run_log_bytes_per_1000_steps']:.0f} bytes per 1,000 steps")
    lines.append(f"metrics.jsonl: {result['metrics_bytes_per_epoch']:.0f} bytes per epoch")
    lines.append(f"grows: {', '.join(result['grows']) or 'nothing'}")
    return "\n".join(lines)


BENCHMARK = Benchmark("long_run", __doc__, add_arguments, measure, table, repeats=None, threads=1, check=check)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
