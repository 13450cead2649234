"""What can end a run: signals, and data workers that are killed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from utils.errors import UserError

WORKER_GRACE = 60


def leave_signals_to_the_main_process(worker: int) -> None:
    """For data workers: Ctrl-C and SIGTERM reach the whole group, but the main process ends its workers itself.

    A worker that it does not end goes ``WORKER_GRACE`` seconds after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


@contextlib.contextmanager
def postponed(number: int) -> Iterator[None]:
    """Inside, a signal waits for the end: PyTorch answers the end of a data worker by an error, wherever it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def remember(*_: object) -> None:
        nonlocal came
        came = True

    before = signal.signal(number, remember)
    try:
        yield
    finally:
        signal.signal(number, before)
        if came and callable(before):
            before(number, None)


def worker_gone(error: Exception) -> UserError:
    """The error for a killed data worker."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return UserError(
        f"a process that reads data is gone ({reason}), perhaps for want of memory or /dev/shm: go on with "
        "--resume and fewer --workers"
    )


def batches(loader: DataLoader) -> Iterator[Any]:
    """Batches of a loader; a worker that is killed while it hands one over is an error that says so.

    Raises:
        UserError: see above.
    """
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # A worker's own error comes with the text of its traceback; this one is of the pipe to it.
            if not loader.num_workers or str(error).startswith("Caught "):
                raise
            raise worker_gone(error) from error
        yield batch


def stop_workers(loader: DataLoader) -> None:
    """End the data workers: after an error its traceback keeps their iterator alive, which would end them late."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
