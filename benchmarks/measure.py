"""What the benchmarks share: times taken in turn, memory of fresh processes, the machine, tables.

The result of a benchmark that compares two forms holds

- ``ours``, ``textbook``: ``seconds`` (one per repetition), ``seconds_median`` and, where memory was measured,
  ``peak_mb`` and ``before_mb``;
- ``time_ratio``: median over the repetitions of textbook / ours, ``time_ratios``: each of them; ``memory_ratio``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import reproducible
from utils.errors import UserError
from utils.processes import available_cores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
FORMULATIONS = ("ours", "textbook")
# The smallest all-reduce between processes of one machine, assumed: NCCL on GPUs that NVLink connects, gloo on CPUs.
ALL_REDUCE_SECONDS = {"cuda": 15e-6, "cpu": 300e-6}


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return the names of the processor and the GPU, the cores for this process, and how busy the machine was.

    ``instructions`` are the vector instructions that PyTorch uses: with others, sums are rounded differently.
    """
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # no Linux
    on_gpu = device is not None and device.type == "cuda"
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # Windows
    }


def machine_name(about: Mapping[str, Any]) -> str:
    """Return the GPU, or the processor with its vector instructions where they were recorded."""
    instructions = f" ({about['instructions']})" if about.get("instructions") else ""
    return about["gpu"] or f"{about['cpu']}{instructions}"


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a measurement depends on besides its settings; call this before it."""
    return reproducible.provenance(machine=machine(device))


def now(device: torch.device | None = None, *, cpu: bool = False) -> float:
    """Return the time in seconds when a GPU has finished its work; with ``cpu``, the CPU time of this process."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if cpu else time.perf_counter()


def seconds_of(action: Callable[[], Any], device: torch.device | None = None, *, cpu: bool = False) -> float:
    """Return the wall-clock seconds of a call, on a GPU until it has finished; with ``cpu``, this process's CPU time.

    A busy machine hardly changes CPU time.
    """
    start = now(device, cpu=cpu)
    action()
    return now(device, cpu=cpu) - start


def seconds_in_turn(
    actions: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device | None = None, cpu: bool = False
) -> dict[str, list[float]]:
    """Time every action once per round, so that a machine that slows down meanwhile favors none of them.

    First calls are not left out: callers run each action once before, if that matters.

    Args:
        actions: what to time, by name.
        repeats: rounds.
        device: waited for around each call when it is a GPU.
        cpu: measure CPU time, as ``seconds_of`` does.

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
    """Compare ``ours`` with ``textbook``; the module's docstring describes the result.

    Args:
        seconds: repetitions of both, from ``seconds_in_turn``; the ratio is the median over rounds.
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
        # None if a tiny step took less than the peak while libraries were loaded.
        result["step_memory_ratio"] = step["textbook"] / step["ours"] if step["ours"] > 0 else None
    return result


def resident_megabytes() -> float:
    """Return the peak resident size of this process so far, in MB (10^6 bytes).

    Raises:
        UserError: on Windows.
    """
    try:
        # ru_maxrss is the fallback: a process inherits its parent's.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration):
        if resource is None:
            raise UserError("the memory of a process is measured on Linux and macOS only; use --device cuda") from None
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size * (1 if sys.platform == "darwin" else 1024) / 1e6


def memory_of(action: Callable[[], Any], device: torch.device | None = None) -> dict[str, float]:
    """Call once and return the peak and the MB before: on a GPU what PyTorch allocated, else the process's size.

    The peak size of a process never shrinks, so on a CPU call this in a process that has done nothing else.
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
        if reason.startswith("error: "):  # written for users already
            raise UserError(reason.removeprefix("error: "))
        raise UserError(
            f"python -m {module} {' '.join(argv)} ended with code {result.returncode} ({reason}); try a smaller size"
        )
    return json.loads(result.stdout.strip().splitlines()[-1])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns: the first flush left, the others flush right, the last one as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for first, *others, last in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; its first row is the heading."""
    heading, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rest))


def ratio_text(result: Mapping[str, Any]) -> str:
    """Return the median of the time ratios with their range."""
    ratios = result["time_ratios"]
    return f"{result['time_ratio']:.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"


def place_text(result: Mapping[str, Any]) -> str:
    """Return what a result was measured on, for the first line of a table."""
    about = result["machine"]
    return about["gpu"] or f"{about['cpu']}, {result['settings']['threads']} threads"
