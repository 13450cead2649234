"""Run scripts in several processes forked from the test's process, so that nothing is imported again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from engine.launch import launch


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def redirect(log: Path) -> None:
    """Send the output of this process to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    logging.getLogger().handlers.clear()


def _one_of(count: int, rank: int, port: int, log: Path, main: Callable[[], Any]) -> None:
    """Set the environment as torchrun does, and redirect the output to a file."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
    redirect(log)
    launch(main)


def start_together(main: Callable[[], Any], folder: Path, count: int = 2) -> list[BaseProcess]:
    """Start ``launch(main)`` in several processes; process i writes to ``<folder>/<i>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    fork, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        fork.Process(target=_one_of, args=(count, rank, port, folder / f"{rank}.log", main)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def output_of(folder: Path) -> str:
    """Return the output of all processes."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for processes and return their exit codes."""
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def run_together(main: Callable[[], Any], folder: Path, count: int = 2) -> str:
    """Run ``main`` in several processes, check that they succeed, and return their output."""
    codes = exit_codes(start_together(main, folder, count))
    assert codes == [0] * count, output_of(folder)
    return output_of(folder)
