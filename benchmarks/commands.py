"""Run command lines of the project as child processes, several at a time, each shared one once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

import torch

from utils.processes import available_cores

THREADS = "OMP_NUM_THREADS"


class Commands:
    """Child processes of this process, which end with it unless it is killed.

    Args:
        jobs: how many callers run commands at a time; each child gets its share of the cores, unless the environment
            sets ``OMP_NUM_THREADS``.
        folder: where the commands run.
    """

    def __init__(self, *, jobs: int, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self._children: set[subprocess.Popen] = set()
        self._succeeded: set[tuple[str, ...]] = set()
        self._error: BaseException | None = None  # the first; nothing starts after it
        self._lock = threading.Lock()
        self._turns: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)

    @contextlib.contextmanager
    def turn(self, command: Sequence[str]) -> Iterator[bool]:
        """Wait until no other thread is in a turn of this command line; yield whether it has succeeded before."""
        with self._lock:
            turn = self._turns[tuple(command)]
        with turn:
            yield tuple(command) in self._succeeded

    def run(self, command: Sequence[str], output: TextIO) -> int:
        """Run ``python ...`` with this interpreter, its output appended to a file, and return the exit code."""
        with self._lock:
            if self._error is not None:
                return -signal.SIGTERM
            child = subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=self.folder,
                env={**os.environ, THREADS: self.threads} if self.jobs > 1 else None,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._children.add(child)
        code = child.wait()
        with self._lock:
            self._children.discard(child)
            if not code:
                self._succeeded.add(tuple(command))
        return code

    def run_all(self, function: Callable[..., Any], tasks: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """Call ``function(*task)`` of every task, ``jobs`` at a time, and yield tasks in order of completion.

        After an error, Ctrl-C or SIGTERM, tasks that wait are canceled and the commands that run are asked to stop;
        a training saves its state then.

        Raises:
            SystemExit: this process received SIGTERM.
        """
        with _exit_on_sigterm(), ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._attempt, function, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    if self._error is not None:
                        raise self._error
                    yield futures[future]
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end(error)
                raise

    def _attempt(self, function: Callable[..., Any], task: Sequence[Any]) -> None:
        """Call a function of a task unless another one has failed, whose error is the one to report."""
        if self._error is not None:
            return
        try:
            function(*task)
        except BaseException as error:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
                for child in self._children:
                    child.terminate()

    @property
    def threads(self) -> str:
        """Return the CPU threads of each child, on which the rounding of sums can depend."""
        share = max(1, available_cores() // self.jobs) if self.jobs > 1 else torch.get_num_threads()
        return os.environ.get(THREADS) or str(share)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what is running can be ended."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if listens else None
    try:
        yield
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)
