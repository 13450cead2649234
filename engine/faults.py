"""What can end a run: signals, and data workers that are killed."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from engine.data_workers import data_loader, is_handover_error
from engine.task import Run, Task
from utils.cli import EXIT_TERMINATED
from utils.errors import UserError

logger = logging.getLogger("crossnet")


@contextlib.contextmanager
def postponed(number: int | None) -> Iterator[None]:
    """Defer a signal, if there is one, until the block exits.

    When a data worker dies, PyTorch raises from its SIGCHLD handler, at whatever line is running.
    """
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def remember(*_: object) -> None:
        nonlocal received
        received = True

    before = signal.signal(number, remember)
    try:
        yield
    finally:
        signal.signal(number, before)
        if received and callable(before):
            before(number, None)


def worker_gone(error: Exception) -> UserError:
    """Return the error for a data worker that died."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return UserError(
        f"a process that reads data is gone ({reason}), perhaps for want of memory, shared memory (/dev/shm; in a "
        "container: docker run --shm-size=8g) or open files (ulimit -n): continue with --resume and fewer --workers"
    )


def batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the batches of a loader.

    Raises:
        UserError: the workers cannot start, one of them is killed, or a batch cannot be handed over.
    """
    iterator = None
    while True:
        try:
            if iterator is None:
                iterator = iter(loader)  # starts the workers
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            if not loader.num_workers or not is_handover_error(error):
                raise
            raise worker_gone(error) from error
        yield batch


def stop_workers(loader: DataLoader) -> None:
    """End the data workers now: the traceback of an error would keep their iterator alive."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


@contextlib.contextmanager
def data_workers(task: Task) -> Iterator[DataLoader]:
    """Yield a loader over the task's sampler; its ``config.workers`` processes end with the block."""
    workers = task.config.workers
    loader = data_loader(
        task.dataset,
        batch_sampler=task.sampler,
        collate=task.collate,
        workers=workers,
        device=task.device,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
    )
    try:
        yield loader
    finally:
        stop_workers(loader)


class Stop:
    """Whether this process has received SIGTERM."""

    requested = False


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Record SIGTERM instead of dying from it; explain PyTorch's error about a killed data worker."""
    stop = Stop()

    def request(*_: object) -> None:
        stop.requested = True

    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, request) if listens else None
    try:
        yield stop
    except RuntimeError as error:
        # Raised by PyTorch's SIGCHLD handler, at whatever line is running.
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_gone(error) from error
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)


def exit_after_sigterm(run: Run) -> NoReturn:
    """Exit after SIGTERM to any of the processes; everything has been saved.

    Raises:
        SystemExit: always, with the exit code of a process that SIGTERM ended.
    """
    last = run.folder / "last.pth"
    logger.warning("stopped by SIGTERM at step %d; continue from %s with --resume", run.progress.step, last)
    raise SystemExit(EXIT_TERMINATED)


def log_interrupt(run: Run) -> None:
    """Log how to continue after Ctrl-C, if the run has written a checkpoint; call it before ``discard_start``."""
    if run.folder.has_checkpoint():
        step, folder = run.progress.step, run.folder.path
        logger.warning("interrupted at step %d; continue from the newest checkpoint in %s with --resume", step, folder)
