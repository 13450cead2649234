"""How long will a pretraining run take here, and how much memory? Measured in about a minute on this machine.

The real training step runs at the settings given, in a separate process: a warm-up step, then steps until the time is
up, two at least. Then the loader alone. A second process repeats this with half the batch; from both follow the memory
per object and the largest batch that fits into --memory_gb. Of processes that train together only one is measured: what
they lose by talking to each other, or by sharing a machine, is not in the estimate; --check trains with all of them.

All flags of train_crossnet_con.py count: --batch_size, --num_points, --image_model, --image_size, --model, --k, --amp,
--workers and so on. Name your data with --data_root, and its reading is measured as it is. Without, the demo's
renderings stand in, packed in one file, with random clouds of --num_points points.

Examples:
  python -m benchmarks.estimate --shapes 43783 --epochs 100 --gpus 1
  python -m benchmarks.estimate --shapes 43783 --epochs 250 --gpus 4 --data_root data --amp bf16 --channels_last
  python -m benchmarks.estimate --shapes 2033 --epochs 6 --num_points 512 --image_model resnet18 --image_size 64 --check
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train_crossnet_con
from benchmarks.measure import (
    ROOT,
    in_fresh_process,
    place_text,
    provenance,
    resident_megabytes,
    seconds_of,
    text_table,
)
from datasets.pack import pack
from datasets.pair_sources import PairSource, open_source
from engine.device import resolve_device
from engine.faults import data_workers
from engine.loop import train
from engine.run_folder import RunFolder
from engine.task import Run
from utils.cli import (
    HelpFormatter,
    positive_float,
    positive_int,
    run,
    write_json,
)
from utils.errors import UserError
from utils.reproducible import deterministic

RELEASED_POINTS = 2048
# Batches of a stand-in: fewer would not show the loader at work.
BATCHES = 6


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line: ours, and what is left for the training script."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimate", description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    g = parser.add_argument_group("the run to predict")
    g.add_argument("--shapes", type=positive_int, default=43783, metavar="N", help="shapes of the data set")
    g.add_argument("--epochs", type=positive_int, default=100, metavar="E", help="passes over them")
    g.add_argument(
        "--gpus", type=positive_int, default=1, metavar="G", help="processes, each with --batch_size objects"
    )
    g.add_argument(
        "--memory_gb", type=positive_float, metavar="GB", help="say which batch fits into so much (10^9 bytes)"
    )
    g.add_argument("--data_root", metavar="DIR", help="pairs to read (default: a stand-in)")
    g = parser.add_argument_group("how")
    g.add_argument("--seconds", type=positive_float, default=40.0, metavar="S", help="of timed steps")
    g.add_argument("--threads", type=positive_int, metavar="T", help="CPU threads of PyTorch (default: its own choice)")
    g.add_argument("--check", action="store_true", help="then train an epoch of the data and compare")
    g.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # what the fresh processes run
    args, training = parser.parse_known_args(argv)
    training_parser = train_crossnet_con.build_parser()
    training_parser.error = parser.error  # a mistake shows this command's usage, not the training script's
    training_parser.parse_args(training)
    return args, training


class StandIn:
    """Pairs for measuring: the renderings of a source, over and over, with random clouds.

    Args:
        source: whose renderings to use.
        shapes: number of pairs.
        points: size of the clouds.
    """

    def __init__(self, source: PairSource, *, shapes: int, points: int) -> None:
        self.source, self.size = source, points
        self.ids = [f"00000000/{i:06d}" for i in range(shapes)]
        self.skipped: list[str] = []

    def points(self, i: int) -> np.ndarray:
        """Cloud of shape i, (N, 3) float32."""
        return np.random.default_rng(i).random((self.size, 3), dtype=np.float32)

    def view_names(self, i: int) -> Sequence[str]:
        """Names of the renderings of shape i."""
        return self.source.view_names(i % len(self.source.ids))[:1]

    def image_file(self, i: int, view: int) -> bytes:
        """Encoded rendering."""
        return self.source.image_file(i % len(self.source.ids), view)

    def where(self, i: int, view: int | None = None) -> str:
        """Its number."""
        return self.ids[i]


@contextlib.contextmanager
def started(training: list[str], threads: int | None) -> Iterator[Run]:
    """The training script's run, built and ready for a step, in a folder that goes away."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="crossnet-estimate-") as folder:
            args = train_crossnet_con.build_parser().parse_args([*training, "--output_dir", folder])
            args.eval_every = 0
            task = train_crossnet_con.Pretraining(train_crossnet_con.PretrainConfig.from_flags(args))
            yield Run(task, RunFolder(Path(folder) / args.exp_name))
    finally:
        torch.set_num_threads(before)


def measure_batch(training: list[str], *, seconds: float, threads: int | None) -> dict[str, float]:
    """Time and memory of the step at these settings, and the time of the loader alone.

    Returns:
        ``step_seconds`` and ``load_seconds`` per batch, ``peak_mb``, ``before_mb``, ``steps`` that were timed.
    """
    with (
        started(training, threads) as run_,
        deterministic(run_.config.deterministic),
        data_workers(run_.task) as loader,
    ):
        device, on_gpu = run_.task.device, run_.task.device.type == "cuda"
        before = torch.cuda.memory_allocated(device) / 1e6 if on_gpu else resident_megabytes()
        run_.task.model.train()
        batches = iter(loader)
        batch = next(batches)
        run_.step(batch)
        times: list[float] = []
        while len(times) < 2 or (sum(times) < seconds and len(times) < 200):
            times.append(seconds_of(lambda: run_.step(batch), device))
        # What it holds back for itself counts as well: a GPU is full when nothing is left to hold.
        peak = torch.cuda.max_memory_reserved(device) / 1e6 if on_gpu else resident_megabytes()
        for _ in batches:  # the rest of the epoch; from the next on the workers are busy already
            pass
        count, start = 0, time.perf_counter()
        for _ in loader:
            count += 1
            if time.perf_counter() - start > seconds:
                break
        load = (time.perf_counter() - start) / count
    return {
        "step_seconds": float(np.median(times)),
        "load_seconds": load,
        "peak_mb": peak,
        "before_mb": before,
        "steps": len(times),
    }


def predict(
    args: argparse.Namespace, full: dict[str, float], half: dict[str, float] | None, run_: Any
) -> dict[str, Any]:
    """What the measurements say about the run.

    Args:
        args: shapes, epochs, GPUs and memory.
        full: ``measure_batch`` at the batch wanted.
        half: at half of it, or None where that is too small.
        run_: the training script's settings.
    """
    batch = run_.batch_size
    step, load = full["step_seconds"], full["load_seconds"]
    # Workers read while the device computes; without workers one comes after the other.
    per_step = max(step, load) if run_.workers else step + load
    steps = args.shapes // (batch * args.gpus)
    if not steps:
        raise UserError(f"--shapes {args.shapes} do not fill one global batch of {batch * args.gpus}")
    result = {
        "seconds_per_step": per_step,
        "step_seconds": step,
        "load_seconds": load,
        "shapes_per_s": batch * args.gpus / per_step,
        "steps": steps * args.epochs,
        "hours": steps * args.epochs * per_step / 3600,
        "bottleneck": "reading data" if load > step else "the training step",
        "peak_mb": full["peak_mb"],
        "mb_per_object": None,
        "largest_batch": None,
    }
    if half is not None:
        per_object = (full["peak_mb"] - half["peak_mb"]) / (batch - batch // 2)
        result["mb_per_object"] = per_object
        if args.memory_gb and per_object > 0:
            free = 1e3 * args.memory_gb - full["peak_mb"]
            result["largest_batch"] = max(0, int(batch + free / per_object))
    return result


def train_alone(training: list[str], threads: int | None) -> dict[str, Any]:
    """Train in this process; the epoch's record."""
    with started(training, threads) as run_:
        run_.folder.write_config(run_.config.provenance())
        train(run_)
        return next(iter(run_.folder.metrics()))


def train_together(training: list[str], threads: int | None, processes: int) -> dict[str, Any]:
    """Train by torchrun, in several processes on this machine; the epoch's record.

    Raises:
        UserError: that failed, for instance because there are fewer GPUs.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryDirectory(prefix="crossnet-estimate-") as folder:
        command += [str(ROOT / "train_crossnet_con.py"), *training]
        command += ["--eval_every", "0", "--output_dir", folder, "--exp_name", "check"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no message")
            raise UserError(f"--check: {processes} processes cannot train together here: {reason}")
        return next(iter(RunFolder(Path(folder) / "check", resume="auto").metrics()))


def check(
    training: list[str], full: dict[str, float], *, batch: int, workers: bool, threads: int | None, processes: int
) -> dict[str, float]:
    """Train an epoch of the data measured with, in as many processes as the run would have, and compare.

    Returns:
        Predicted and measured seconds per step and the error in per cent.

    Raises:
        UserError: this number of processes cannot train here.
    """
    training = [*training, "--epochs", "1", "--save_every", "0"]
    record = train_alone(training, threads) if processes == 1 else train_together(training, threads, processes)
    measured = batch * processes / record["shapes_per_s"]
    step, load = full["step_seconds"], full["load_seconds"]
    predicted = max(step, load) if workers else step + load
    return {
        "processes": processes,
        "steps": record["step"],
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "error_percent": 100 * (predicted / measured - 1),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    s = result["settings"]
    rows = [
        ("shapes per second", f"{result['shapes_per_s']:.1f}"),
        ("seconds per step", f"{result['seconds_per_step']:.3f}"),
        ("  the step", f"{result['step_seconds']:.3f}"),
        ("  reading a batch", f"{result['load_seconds']:.3f}"),
        ("bottleneck", result["bottleneck"]),
        (f"{result['steps']:,} steps, hours", f"{result['hours']:.1f}"),
        ("peak memory, MB", f"{result['peak_mb']:.0f}"),
    ]
    if result["mb_per_object"] is not None:
        rows.append(("  for every object of the batch", f"{result['mb_per_object']:.1f}"))
    if result["largest_batch"] is not None:
        rows.append((f"largest batch in {s['memory_gb']:g} GB", str(result["largest_batch"])))
    if found := result.get("check"):
        rows.append(
            (
                f"check: an epoch of {found['steps']} steps, {found['processes']} process(es), seconds per step",
                f"{found['measured_seconds']:.3f}, predicted {found['predicted_seconds']:.3f} "
                f"({found['error_percent']:+.0f} %)",
            )
        )
    title = (
        f"{s['shapes']:,} shapes, {s['epochs']} epochs, {s['gpus']} x {s['batch_size']} objects of {s['num_points']} "
        f"points, {s['model']}, {s['image_model']} at {s['image_size']} px, {place_text(result)}"
    )
    return "\n".join([title, text_table(rows)])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    args, training = parse_args(argv)
    if args.measure:
        training = [*training, "--data_root", args.data_root]
        result = measure_batch(training, seconds=args.seconds, threads=args.threads)
        print(json.dumps(result))
        return result
    run_ = train_crossnet_con.build_parser().parse_args(training)
    device = resolve_device(run_.device)
    about = provenance(device)
    batch = run_.batch_size
    with tempfile.TemporaryDirectory(prefix="crossnet-estimate-") as folder:
        if args.data_root is None:
            points = run_.num_points or RELEASED_POINTS
            source = StandIn(open_source(ROOT / "data" / "demo"), shapes=BATCHES * batch * args.gpus, points=points)
            data = str(Path(folder) / "pairs.h5")
            pack(source, data, chosen=list(range(len(source.ids))), name="stand-in")
        else:
            data = str(Path(args.data_root).absolute())

        def measured(size: int, share: float) -> dict[str, float]:
            own = ["--measure", "--seconds", str(share * args.seconds), "--data_root", data]
            own += ["--threads", str(args.threads)] if args.threads else []
            return in_fresh_process("benchmarks.estimate", [*own, *training, "--batch_size", str(size)])

        full = measured(batch, 1.0)
        half = measured(batch // 2, 0.1) if batch >= 4 else None
        result = predict(args, full, half, run_)
        if args.check:
            result["check"] = check(
                *([*training, "--data_root", data], full),
                **{"batch": batch, "workers": bool(run_.workers), "threads": args.threads, "processes": args.gpus},
            )
    keys = ("batch_size", "num_points", "model", "k", "image_model", "image_size", "amp", "channels_last", "workers")
    result["settings"] = {key: getattr(run_, key) for key in keys} | {
        **{key: getattr(args, key) for key in ("shapes", "epochs", "gpus", "memory_gb", "seconds")},
        "num_points": run_.num_points or (RELEASED_POINTS if args.data_root is None else "all"),
        "threads": args.threads or torch.get_num_threads(),
        "data": Path(args.data_root).name if args.data_root else "stand-in",
    }
    result |= about
    print(table(result))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
