r"""Does a long run grow? Memory, open files and logs of thousands of steps through the real training loop.

The script pretrains as train_crossnet_con.py does, with data workers, checkpoints and probes, but with a tiny model,
and looks at the process and its workers every few steps. Growth is the slope of a straight line through the samples of
the last three quarters: before, PyTorch and the memory allocator settle. A run of the released length (450,000 steps)
would multiply a slope per 1,000 steps by 450.

Example:
  python -m benchmarks.long_run --steps 6000 --json long_run.json --picture long_run.png      # about 8 minutes
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_crossnet_con as pretraining
from benchmarks.measure import provenance
from datasets.pair_sources import open_source
from engine.task import Run
from models.image import IMAGE_ENCODERS
from utils.cli import HelpFormatter, positive_int, run, seed_number, write_json
from utils.errors import UserError

BATCH = 4
SETTINGS = (
    f"--device cpu --batch_size {BATCH} --num_points 64 --k 4 --emb_dims 16 --image_model resnet18 --image_size 16 "
    "--eval_points 64 --exp_name long_run"
)
# What is looked at -> unit, and the growth per 1,000 steps that would matter.
QUANTITIES = {
    "memory": ("MB", 1.0),
    "workers_memory": ("MB", 1.0),
    "open_files": ("", 0.5),
    "workers_open_files": ("", 0.5),
    "threads": ("", 0.5),
}


class ShallowImageNet(nn.Module):
    """One convolution with the parts of a ResNet that ``models.image`` replaces: the loop is looked at, not ResNets."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10), or (B, 64) without the classifier."""
        return self.fc(self.conv1(x).relu().mean((2, 3)))


def children() -> list[int]:
    """Processes that this one started and that still run."""
    listed = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text()
    return [int(word) for word in listed.split()]


def private_megabytes(process: int) -> float:
    """Memory that a process has written to and shares with no other, in MB (10^6 bytes).

    Pages of libraries are left out: they count as shared or not by what other processes run.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / 1e6


def open_files(process: int) -> int:
    """Open file handles of a process, sockets and pipes included."""
    return len(os.listdir(f"/proc/{process}/fd"))


def look(step: int, folder: Path) -> dict[str, float]:
    """One sample of this process, its children and its files."""
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
    """Least-squares slope per 1,000 steps, its standard error, and the range, of the last three quarters."""
    kept = np.asarray(steps) >= max(steps) / 4
    x, y = np.asarray(steps)[kept] / 1000, np.asarray(values)[kept]
    (slope, offset), residual = np.polyfit(x, y, 1), 0.0
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
    """Memory, open files and log over the steps."""
    from utils.pictures import Figure, save_figure

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


def watch(data_root: str, *, steps: int, every: int, workers: int, save_every: int, seed: int) -> dict[str, Any]:
    """Train and look.

    Args:
        data_root: pairs, and a labelled set for the probes.
        steps: train at least this many; whole epochs are trained.
        every: steps between looks.
        workers: data workers.
        save_every: steps between checkpoints.
        seed: of the run.

    Returns:
        The samples, the growth of each quantity, and the bytes of the log per 1,000 steps.
    """
    samples: list[dict[str, float]] = []

    class Watched(Run):
        def step(self, batch: dict[str, Any]) -> torch.Tensor:
            losses = super().step(batch)
            if self.progress.step % every == 0:
                samples.append(look(self.progress.step, self.folder.path))
            return losses

    epochs = math.ceil(steps / (len(open_source(data_root).ids) // BATCH))
    network, usual = IMAGE_ENCODERS["resnet18"], pretraining.Run
    IMAGE_ENCODERS["resnet18"], pretraining.Run = ShallowImageNet, Watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--epochs", epochs, "--workers", workers, "--save_every", save_every, "--seed", seed)
            argv = [*SETTINGS.split(), "--data_root", data_root, "--output_dir", folder, *map(str, flags)]
            record = pretraining.main(argv)
            metrics_bytes = (Path(folder) / "long_run" / "metrics.jsonl").stat().st_size
    finally:
        IMAGE_ENCODERS["resnet18"], pretraining.Run = network, usual
    looked = [int(sample["step"]) for sample in samples]
    slopes = {name: growth(looked, [sample[name] for sample in samples]) for name in QUANTITIES}
    return {
        "settings": {"steps": record["step"], "epochs": epochs, "workers": workers, "save_every": save_every},
        "checkpoints": record["step"] // save_every,
        "growth": slopes,
        "grows": [name for name, (_, limit) in QUANTITIES.items() if slopes[name]["per_1000_steps"] > limit],
        "run_log_bytes_per_1000_steps": growth(looked, [s["run_log_bytes"] for s in samples])["per_1000_steps"],
        "metrics_bytes_per_epoch": metrics_bytes / epochs,
        "samples": samples,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, look, report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_run", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--data_root", default="data/demo", metavar="DIR", help="pairs to train on")
    parser.add_argument("--steps", type=positive_int, default=2000, metavar="N", help="train at least N steps")
    parser.add_argument("--every", type=positive_int, default=20, metavar="N", help="steps between looks")
    parser.add_argument("--workers", type=positive_int, default=2, metavar="W", help="data workers")
    parser.add_argument("--save_every", type=positive_int, default=50, metavar="N", help="steps between checkpoints")
    parser.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of the run")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the samples")
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE as one JSON object")
    args = parser.parse_args(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this measurement reads /proc, which only Linux has")
    torch.set_num_threads(1)
    before = provenance()
    settings = {"steps": args.steps, "every": args.every, "workers": args.workers, "save_every": args.save_every}
    result = {**watch(args.data_root, **settings, seed=args.seed), "seed": args.seed, **before}
    print(f"{'':<20}{'per 1,000 steps':>20}{'error':>9}{'first':>9}{'last':>9}{'most':>9}")
    for name, (unit, _) in QUANTITIES.items():
        g = result["growth"][name]
        shown = f"{g['per_1000_steps']:+.3f} {unit}"
        print(f"{name:<20}{shown:>20}{g['standard_error']:>9.3f}{g['first']:>9.1f}{g['last']:>9.1f}{g['most']:>9.1f}")
    print(f"run.log: {result['run_log_bytes_per_1000_steps']:.0f} bytes per 1,000 steps")
    print(f"metrics.jsonl: {result['metrics_bytes_per_epoch']:.0f} bytes per epoch")
    print(f"grows: {', '.join(result['grows']) or 'nothing'}")
    if args.picture:
        draw(result["samples"], args.picture)
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
