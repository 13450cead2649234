"""How long will a pretraining run take here, and how much memory? Measured in about a minute on this machine.

The real training step runs at the settings given, in a separate process: a warm-up step, then steps until the time is
up, two at least. Then the loader alone. A second process repeats this with half the batch; from both follow the memory
per object and the largest batch that fits into --memory_gb. What comes on top of the steps:

- checkpoints: one is written, into the system's temporary folder, and timed; last.pth is written after every epoch and
  every --save_every steps, best.pth at every probe at most.
- linear-SVM probes, every --eval_every epochs: the features of one batch of clouds are timed and scaled to the probe's
  sets; the SVM is timed at their size, on made-up features. The sets are those that training would find; without
  --data_root and --eval_root, one of ModelNet40's size.
- several processes: only one is measured. Each all-reduce of batch statistics and of the loss, which the step waits
  for, adds --all_reduce_us. Gradients travel beside the backward pass and are left out; so is what processes lose by
  waiting for each other or by sharing a machine. --check trains with all of them.

Held-out pairs (--val_fraction) are not counted.

All flags of train_crossnet_con.py count: --batch_size, --num_points, --image_model, --image_size, --model, --k, --amp,
--workers and so on. Name your data with --data_root, and its reading is measured as it is. Without, the demo's
renderings stand in, packed in one file, with random clouds of --num_points points.

Examples:
  python -m benchmarks.estimate --shapes 43783 --epochs 100 --gpus 1
  python -m benchmarks.estimate --shapes 43783 --epochs 250 --gpus 4 --data_root data --amp bf16 --channels_last
  python -m benchmarks.estimate --shapes 2033 --epochs 6 --num_points 512 --image_model resnet18 --image_size 64 --check
  python -m benchmarks.estimate --plan benchmarks/ablations.toml --seeds 1 2 --seconds 1 --threads 1 --cpu_time

With --plan, the rows of a plan of benchmarks.reproduce are priced, as far as they are not recorded yet. Pretrainings
that differ in nothing that a step's time depends on are measured once. Linear SVMs are timed on made-up features; other
scoring scripts take as long as in the row's recorded seeds, or are named as not priced.
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
from collections.abc import Iterator, Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import train_crossnet_con
from benchmarks.measure import (
    ALL_REDUCE_SECONDS,
    ROOT,
    in_fresh_process,
    place_text,
    provenance,
    resident_megabytes,
    seconds_of,
    text_table,
)
from benchmarks.plan import Plan
from benchmarks.plan_hours import Prices, price
from benchmarks.plan_hours import table as price_table
from benchmarks.reproduce import Runner, add_plan_arguments, chosen_rows
from benchmarks.svm import synthetic_features
from datasets.pack import pack
from datasets.pair_sources import PairSource, open_source
from downstream.features import extract_features
from downstream.svm import linear_svm
from engine.device import resolve_device
from engine.faults import data_workers
from engine.grad_cache import chunk_count
from engine.loop import train
from engine.resume import save
from engine.run_folder import RunFolder
from engine.task import Run
from models import CrossNet
from utils.cli import HelpFormatter, positive_float, positive_int, run, write_json
from utils.errors import UserError
from utils.reproducible import deterministic

RELEASED_POINTS = 2048
# Batches of a stand-in: fewer would not show the loader at work.
BATCHES = 6
MODELNET40 = {"dataset": "a set of ModelNet40's size", "train": 9840, "test": 2468, "classes": 40}


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return our settings and the words for the training script."""
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
    g.add_argument(
        "--all_reduce_us",
        type=positive_float,
        metavar="US",
        help="microseconds of one small all-reduce between the processes (default, assumed: "
        + ", ".join(f"{1e6 * seconds:.0f} on {kind}" for kind, seconds in ALL_REDUCE_SECONDS.items())
        + ")",
    )
    add_plan_arguments(parser.add_argument_group("or the rows of a plan"), plan=None)
    g = parser.add_argument_group("how")
    g.add_argument("--seconds", type=positive_float, default=40.0, metavar="S", help="of timed steps")
    g.add_argument("--threads", type=positive_int, metavar="T", help="CPU threads of PyTorch (default: its own choice)")
    g.add_argument(
        "--cpu_time",
        action="store_true",
        help="count processor time, which a busy machine hardly changes; with --threads 1 and --workers 0",
    )
    g.add_argument("--check", action="store_true", help="then train an epoch of the data and compare")
    g.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--measure", choices=("all", "steps"), help=argparse.SUPPRESS)  # what the fresh processes run
    args, training = parser.parse_known_args(argv)
    if args.plan and training:
        parser.error(f"--plan takes its settings from the rows; leave out {' '.join(training)}")
    training_parser = train_crossnet_con.build_parser()
    training_parser.error = parser.error  # a mistake shows this command's usage, not the training script's
    training_parser.parse_args(training)
    return args, training


class StandIn:
    """Pairs for measuring: the renderings of a source, over and over, with random clouds."""

    def __init__(self, source: PairSource, *, shapes: int, points: int) -> None:
        self.source, self.num_points = source, points
        self.ids = [f"00000000/{i:06d}" for i in range(shapes)]
        self.skipped: list[str] = []

    def points(self, i: int) -> np.ndarray:
        """Cloud of shape i, (N, 3) float32."""
        return np.random.default_rng(i).random((self.num_points, 3), dtype=np.float32)

    def size(self, i: int) -> int:
        """Return the number of points, the same for all shapes."""
        return self.num_points

    def view_names(self, i: int) -> Sequence[str]:
        """Names of the renderings of shape i."""
        return self.source.view_names(i % len(self.source.ids))[:1]

    def image_file(self, i: int, view: int) -> bytes:
        """Return an encoded rendering."""
        return self.source.image_file(i % len(self.source.ids), view)

    def where(self, i: int, view: int | None = None) -> str:
        """Its number."""
        return self.ids[i]


@contextlib.contextmanager
def started(training: list[str], threads: int | None, *, with_probes: bool = False) -> Iterator[Run]:
    """Build a run of the training script, ready for a step, in a temporary folder."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="crossnet-estimate-") as folder:
            args = train_crossnet_con.build_parser().parse_args([*training, "--output_dir", folder])
            args.eval_every = args.eval_every if with_probes else 0
            task = train_crossnet_con.Pretraining(train_crossnet_con.PretrainConfig.from_flags(args))
            yield Run(task, RunFolder(Path(folder) / args.exp_name))
    finally:
        torch.set_num_threads(before)


def measure_batch(
    training: list[str], *, seconds: float, threads: int | None, only_steps: bool, cpu: bool = False
) -> dict[str, Any]:
    """Time and memory of the step at these settings, the time of the loader alone, and what comes between steps.

    Returns:
        ``step_seconds`` and ``load_seconds`` per batch, ``peak_mb``, ``before_mb``, ``steps`` that were timed; unless
        ``only_steps`` also what ``measure_between_steps`` returns.
    """
    with (
        started(training, threads, with_probes=True) as run_,
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
            times.append(seconds_of(lambda: run_.step(batch), device, cpu=cpu))
        # What it holds back for itself counts as well: a GPU is full when nothing is left to hold.
        peak = torch.cuda.max_memory_reserved(device) / 1e6 if on_gpu else resident_megabytes()
        for _ in batches:  # the rest of the epoch; from the next on the workers are busy already
            pass
        now = time.process_time if cpu else time.perf_counter
        count, start = 0, now()
        for _ in loader:
            count += 1
            if now() - start > seconds:
                break
        load = (now() - start) / count
        more = {} if only_steps else measure_between_steps(run_, cpu=cpu)
    return {
        "step_seconds": float(np.median(times)),
        "load_seconds": load,
        "peak_mb": peak,
        "before_mb": before,
        "steps": len(times),
        **more,
    }


def measure_between_steps(run_: Run, *, cpu: bool = False) -> dict[str, Any]:
    """Measure a checkpoint and a probe's features; return them with the sizes that the estimate needs.

    Returns:
        ``checkpoint_seconds`` of one; ``cloud_seconds`` of one cloud's features and their number ``dims``;
        ``probe_sets``, the sizes of the sets that the run would score on; ``all_reduces`` of a step.
    """
    task, config = run_.task, run_.config
    encoder, batch = task.model.point_encoder, config.test_batch_size
    clouds = np.random.default_rng(0).random((batch, config.eval_points, 3), dtype=np.float32)

    def features() -> None:
        extract_features(encoder, clouds, batch_size=batch, progress=False)  # ends with a copy to the CPU

    features()
    return {
        "checkpoint_seconds": seconds_of(lambda: save(run_, "last.pth"), task.device, cpu=cpu),
        "cloud_seconds": seconds_of(features, task.device, cpu=cpu) / batch,
        "dims": encoder.feature_dim,
        "probe_sets": [
            {
                "dataset": probe.dataset,
                "train": len(probe.train),
                "test": len(probe.test),
                "classes": len(np.unique(probe.train.labels)),
            }
            for probe in task.probes
        ],
        "all_reduces": all_reduces_of_step(task.model, config),
    }


def all_reduces_of_step(model: CrossNet, config: train_crossnet_con.PretrainConfig) -> int:
    """All-reduces of a step under several processes, but for those of gradients, which overlap.

    Each batch norm needs one in either direction, one after the other: its statistics depend on the layer before. In
    chunks every chunk goes forward twice. The loss gathers both sides of each NT-Xent, with gradient.
    """
    norms = 0 if config.no_sync_bn else sum(isinstance(module, _BatchNorm) for module in model.modules())
    passes = 3 * chunk_count(config.batch_size, config.chunk_size) if config.chunk_size else 2
    images = len(model.image_encoders)
    pairs = 1 + (1 if config.objective == "con" and images == 2 else images)
    numbers_of_objects = config.mask_same_object and config.objective == "con" and images == 2
    return config.accumulate * (passes * norms + 4 * pairs + numbers_of_objects)


def probe_seconds(train: int, test: int, *, classes: int, dims: int, cpu: bool = False) -> float:
    """Seconds of a probe's two SVMs: one is timed on made-up features, the other has 80 % of its training clouds."""
    sample = synthetic_features(train=train, test=test, classes=classes, dims=dims)
    return (1 + 0.8**2) * seconds_of(lambda: linear_svm(*sample), cpu=cpu)


def count_checkpoints(*, steps: int, epochs: int, save_every: int, probes: int) -> int:
    """How often a run of ``steps`` an epoch writes a checkpoint, where every probe finds the best weights so far."""
    between = steps * epochs // save_every - steps * epochs // lcm(steps, save_every) if save_every else 0
    return epochs + between + probes


def seconds_per_step(costs: Mapping[str, float], run_: Any) -> float:
    """Return the seconds from step to step, from ``step_seconds`` and ``load_seconds``."""
    step, load = costs["step_seconds"], costs["load_seconds"]
    # Workers read while the device computes; without workers one comes after the other.
    return max(step, load) if run_.workers else step + load


def predict(args: argparse.Namespace, full: dict[str, Any], half: dict[str, Any] | None, run_: Any) -> dict[str, Any]:
    """Extrapolate the measurements to the whole run.

    Args:
        args: shapes, epochs, GPUs and memory.
        full: ``measure_batch`` at the batch wanted.
        half: at half of it, or None where that is too small.
        run_: the training script's settings.
    """
    batch, objects = run_.batch_size, run_.batch_size * run_.accumulate * args.gpus
    all_reduces = full["all_reduces"] if args.gpus > 1 else 0
    step, load = full["step_seconds"] + all_reduces * args.all_reduce_us / 1e6, full["load_seconds"]
    per_step = seconds_per_step({"step_seconds": step, "load_seconds": load}, run_)
    steps = args.shapes // objects
    if not steps:
        raise UserError(f"--shapes {args.shapes} do not fill one global batch of {objects}")
    sets = full["probe_sets"]
    probes = -(-args.epochs // run_.eval_every) if sets else 0
    features = sum(found["train"] + found["test"] for found in sets) * full["cloud_seconds"] / args.gpus
    svm = sum(
        probe_seconds(found["train"], found["test"], classes=found["classes"], dims=full["dims"], cpu=args.cpu_time)
        for found in sets
    )
    checkpoints = count_checkpoints(steps=steps, epochs=args.epochs, save_every=run_.save_every, probes=probes)
    hours = {
        "steps": steps * args.epochs * per_step / 3600,
        "probes": probes * (features + svm) / 3600,
        "checkpoints": checkpoints * full["checkpoint_seconds"] / 3600,
    }
    result = {
        "seconds_per_step": per_step,
        "step_seconds": step,
        "load_seconds": load,
        "all_reduces": all_reduces,
        "all_reduce_seconds": all_reduces * args.all_reduce_us / 1e6,
        "shapes_per_s": objects / per_step,
        "steps": steps * args.epochs,
        "hours": sum(hours.values()),
        "hours_of": hours,
        "probes": probes,
        "probe_sets": sets,
        "probe_seconds": {"features": features, "svm": svm},
        "checkpoints": checkpoints,
        "checkpoint_seconds": full["checkpoint_seconds"],
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
    training: list[str], predicted: float, *, objects: int, threads: int | None, processes: int
) -> dict[str, float]:
    """Train an epoch of the data measured with, in as many processes as the run would have, and compare.

    ``predicted`` is in seconds per step; ``objects`` are those of a step over all processes.

    Returns:
        Predicted and measured seconds per step and the error in per cent.

    Raises:
        UserError: this number of processes cannot train here.
    """
    training = [*training, "--epochs", "1", "--save_every", "0"]
    record = train_alone(training, threads) if processes == 1 else train_together(training, threads, processes)
    measured = objects / record["shapes_per_s"]
    return {
        "processes": processes,
        "steps": record["step"],
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "error_percent": 100 * (predicted / measured - 1),
    }


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
    s = result["settings"]
    rows = [
        ("shapes per second", f"{result['shapes_per_s']:.1f}"),
        ("seconds per step", f"{result['seconds_per_step']:.3f}"),
        ("  the step", f"{result['step_seconds']:.3f}"),
    ]
    if result["all_reduces"]:
        each = f"{s['all_reduce_us']:g} us each, {'given' if s['all_reduce_given'] else 'assumed'}"
        rows.append((f"    {result['all_reduces']} all-reduces of it, {each}", f"{result['all_reduce_seconds']:.3f}"))
    hours, probe = result["hours_of"], result["probe_seconds"]
    names = " and ".join(found["dataset"] for found in result["probe_sets"]) or "no set"
    rows += [
        ("  reading a batch", f"{result['load_seconds']:.3f}"),
        ("bottleneck", result["bottleneck"]),
        ("hours", f"{result['hours']:.1f}"),
        (f"  {result['steps']:,} steps", f"{hours['steps']:.2f}"),
        (f"  {result['probes']} probes on {names}", f"{hours['probes']:.2f}"),
        ("    features of one, seconds, scaled", f"{probe['features']:.1f}"),
        ("    SVMs of one, seconds", f"{probe['svm']:.1f}"),
        (f"  {result['checkpoints']} checkpoints at most", f"{hours['checkpoints']:.2f}"),
        ("    one, seconds", f"{result['checkpoint_seconds']:.2f}"),
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


@contextlib.contextmanager
def pairs_to_read(data_root: str | None, *, points: int, objects: int) -> Iterator[str]:
    """Yield the path of the pairs to measure with: ``data_root``, or a stand-in that goes away."""
    if data_root is not None:
        yield str(Path(data_root).absolute())
        return
    with tempfile.TemporaryDirectory(prefix="crossnet-estimate-") as folder:
        source = StandIn(open_source(ROOT / "data" / "demo"), shapes=BATCHES * objects, points=points)
        data = str(Path(folder) / "pairs.h5")
        pack(source, data, chosen=list(range(len(source.ids))), name="stand-in")
        yield data


def measured(
    args: argparse.Namespace, training: Sequence[str], data: str, *, what: str = "all", seconds: float
) -> dict[str, Any]:
    """Return ``measure_batch`` of a fresh process."""
    own = ["--measure", what, "--seconds", str(seconds), "--data_root", data]
    own += ["--threads", str(args.threads)] if args.threads else []
    own += ["--cpu_time"] if args.cpu_time else []
    return in_fresh_process("benchmarks.estimate", [*own, *training])


def price_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Price the rows of a plan; print the table."""
    plan = Plan.read(Path(args.plan), dict(args.root))
    runner = Runner(plan, work=Path(args.work_dir), results=Path(args.results), quick={})

    def costs(words: Sequence[str], data_root: str | None, points: int) -> dict[str, float]:
        run_ = train_crossnet_con.build_parser().parse_args(words)
        objects = run_.batch_size * run_.accumulate
        with pairs_to_read(data_root, points=run_.num_points or RELEASED_POINTS, objects=objects) as data:
            training = [*words, "--eval_every", "0", "--eval_points", str(points)]
            found = measured(args, training, data, seconds=args.seconds)
        return {**found, "seconds_per_step": seconds_per_step(found, run_)}

    prices = Prices(runner, costs, shapes=args.shapes, cpu=args.cpu_time)
    result = price(chosen_rows(plan, args.rows), args.seeds, prices)
    print(price_table(result))
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    args, training = parse_args(argv)
    if args.plan:
        about = provenance()
        result = price_plan(args) | about
        write_json(args.json, result)
        return result
    if args.measure:
        training = [*training, "--data_root", args.data_root]
        how = {"seconds": args.seconds, "threads": args.threads, "cpu": args.cpu_time}
        result = measure_batch(training, only_steps=args.measure == "steps", **how)
        print(json.dumps(result))
        return result
    run_ = train_crossnet_con.build_parser().parse_args(training)
    device = resolve_device(run_.device)
    about = provenance(device)
    given = args.all_reduce_us is not None
    args.all_reduce_us = args.all_reduce_us if given else 1e6 * ALL_REDUCE_SECONDS[device.type]
    batch, objects = run_.batch_size, run_.batch_size * run_.accumulate * args.gpus
    assumes_sets = run_.eval_every > 0 and args.data_root is None and run_.eval_root is None
    points = run_.num_points or RELEASED_POINTS
    words = [*training, *(["--eval_every", "0"] if assumes_sets else []), "--batch_size"]
    with pairs_to_read(args.data_root, points=points, objects=objects) as data:
        full = measured(args, [*words, str(batch)], data, seconds=args.seconds)
        half = None
        if batch >= 4:
            half = measured(args, [*words, str(batch // 2)], data, what="steps", seconds=0.1 * args.seconds)
        if assumes_sets:
            full["probe_sets"] = [MODELNET40]
        result = predict(args, full, half, run_)
        if args.check:
            result["check"] = check(
                *([*training, "--data_root", data], result["seconds_per_step"]),
                **{"objects": objects, "threads": args.threads, "processes": args.gpus},
            )
    keys = ("batch_size", "accumulate", "chunk_size", "num_points", "model", "k", "image_model", "image_size", "amp")
    keys += ("channels_last", "workers", "eval_every", "eval_points", "save_every", "no_sync_bn")
    result["settings"] = {key: getattr(run_, key) for key in keys} | {
        **{
            key: getattr(args, key)
            for key in ("shapes", "epochs", "gpus", "memory_gb", "seconds", "cpu_time", "all_reduce_us")
        },
        "all_reduce_given": given,
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
