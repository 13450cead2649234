"""Run jobs in worker processes, and count the cores for them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from utils.errors import UserError

Result = TypeVar("Result")


def available_cores() -> int:
    """Return the cores that this process may use; under Slurm and ``taskset`` fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_pool(
    workers: int,
    context: BaseContext | None = None,
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] = (),
) -> ProcessPoolExecutor:
    """Return a pool whose processes end with this one, even if it is killed; by default they would wait forever.

    Args:
        workers: number of processes, at least 1.
        context: how to start them; None: the platform's default.
        initializer: called with ``initargs`` in each process.
        initargs: picklable.
    """
    return ProcessPoolExecutor(workers, context, _start_watched, (initializer, initargs))


def _start_watched(initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"
    parent.join()
    os._exit(1)


def run_jobs(
    function: Callable[..., Result],
    jobs: Iterable[Sequence[Any]],
    *,
    workers: int,
    context: BaseContext | None = None,
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield ``function(*job)`` of every job, in order of completion. After an error, jobs that wait are canceled.

    ``multiprocessing.Pool`` would wait forever for the job of a worker that was killed.

    Args:
        function: of a module, with picklable arguments and results.
        jobs: arguments of each call.
        workers: number of processes, at least 1.
        context: how to start them; None: the platform's default.
        initializer: called with ``initargs`` in each process.
        initargs: picklable.

    Raises:
        UserError: a worker was killed.
    """
    with worker_pool(workers, context, initializer, initargs) as pool:
        try:
            futures = [pool.submit(function, *job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely because memory ran out: start again with fewer --workers; "
                "what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
