"""What the benchmarks share: times taken in turn, memory of fresh processes, the machine, tables.

Every benchmark's ``main(argv)`` returns one JSON object. Where two forms are compared it holds

- ``ours``, ``textbook``: ``seconds`` (one per repetition), ``seconds_median`` and, where memory was looked at,
  ``peak_mb`` and ``before_mb``;
- ``time_ratio``: median over the repetitions of textbook / ours, ``time_ratios``: each of them; ``memory_ratio``;
- ``settings``, ``machine``, ``versions``, ``git_commit``.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import reproducible
from utils.cli import positive_int, seed_number
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FORMULATIONS = ("ours", "textbook")


def add_measuring_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Add the flags that every benchmark understands: how to measure, and where the result goes."""
    g = parser.add_argument_group("how")
    g.add_argument("--quick", action="store_true", help="a try-out of seconds at sizes that say nothing")
    g.add_argument("--repeats", type=positive_int, default=repeats, metavar="R", help="timed rounds of each form")
    g.add_argument("--threads", type=positive_int, default=2, metavar="T", help="CPU threads of PyTorch")
    g.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of everything random")
    g.add_argument("--json", metavar="FILE", help="also write the result, with machine and versions, to FILE")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Names of the processor and the GPU, and how busy the machine was."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # no Linux
    on_gpu = device is not None and device.type == "cuda"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """What a measurement depends on besides its settings; to be called before it."""
    return reproducible.provenance(machine=machine(device))


def seconds_of(action: Callable[[], Any], device: torch.device | None = None, *, cpu: bool = False) -> float:
    """Wall-clock seconds of a call, on a GPU until it has finished; with ``cpu`` what this process took of all cores.

    CPU time is that of the work alone: a busy machine lengthens it little.
    """

    def now() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if cpu else time.perf_counter()

    start = now()
    action()
    return now() - start


def seconds_in_turn(
    actions: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device | None = None, cpu: bool = False
) -> dict[str, list[float]]:
    """Seconds of every action, one after another in each round.

    A machine that slows down meanwhile favours none of them. What a first call costs more is left to the caller, who
    may call each action once before.

    Args:
        actions: what to time, by name.
        repeats: rounds.
        device: waited for around each call when it is a GPU.
        cpu: CPU time, see ``seconds_of``.

    Returns:
        ``repeats`` times for every name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(seconds_of(action, device, cpu=cpu))
    return seconds


def compare(
    seconds: Mapping[str, Sequence[float]], memory: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """The part of a benchmark's result that compares ``ours`` with ``textbook`` (see the module's text).

    Args:
        seconds: repetitions of both, from ``seconds_in_turn``; the ratio is the median of those of neighbouring runs.
        memory: ``peak_mb`` and ``before_mb`` of both.
    """
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["textbook"], strict=True)]
    result: dict[str, Any] = {
        name: {"seconds": list(seconds[name]), "seconds_median": statistics.median(seconds[name])}
        for name in FORMULATIONS
    }
    result |= {"time_ratio": statistics.median(ratios), "time_ratios": ratios}
    if memory:
        for name in FORMULATIONS:
            result[name] |= memory[name]
        result["memory_ratio"] = memory["textbook"]["peak_mb"] / memory["ours"]["peak_mb"]
        step = {name: memory[name]["peak_mb"] - memory[name]["before_mb"] for name in FORMULATIONS}
        # None where a tiny step stayed below what loading the libraries had taken for a moment.
        result["step_memory_ratio"] = step["textbook"] / step["ours"] if step["ours"] > 0 else None
    return result


def resident_megabytes() -> float:
    """Largest resident size of this process so far, in MB (10^6 bytes)."""
    try:
        # Not ru_maxrss where it can be helped: a process starts with its parent's.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration):
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size * (1 if sys.platform == "darwin" else 1024) / 1e6


def memory_of(action: Callable[[], Any], device: torch.device | None = None) -> dict[str, float]:
    """Call once: MB at most, and MB before; on a GPU what PyTorch allocated, else the size of the whole process.

    The process's size never goes down, so on a CPU this is for a process that has done nothing else.
    """
    if device is None or device.type != "cuda":
        before = resident_megabytes()
        action()
        return {"peak_mb": resident_megabytes(), "before_mb": before}
    before = torch.cuda.memory_allocated(device) / 1e6
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return {"peak_mb": torch.cuda.max_memory_allocated(device) / 1e6, "before_mb": before}


def in_fresh_process(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark's module in a separate process; its last line of output is one JSON object.

    Raises:
        UserError: that process failed, for instance because memory ran out.
    """
    command = [sys.executable, "-m", module, *argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        if reason.startswith("error: "):  # said for people already
            raise UserError(reason.removeprefix("error: "))
        raise UserError(
            f"python -m {module} {' '.join(argv)} ended with code {result.returncode} ({reason}); try a smaller size"
        )
    return json.loads(result.stdout.strip().splitlines()[-1])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first one flush left; the last column is as long as it needs to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for first, *others, last in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)


def ratio_text(result: Mapping[str, Any]) -> str:
    """The median of the time ratios with their range."""
    ratios = result["time_ratios"]
    return f"{result['time_ratio']:.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"


def place_text(result: Mapping[str, Any]) -> str:
    """What a result was measured on, for the first line of a table."""
    about = result["machine"]
    return about["gpu"] or f"{about['cpu']}, {result['settings']['threads']} threads"
