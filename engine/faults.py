"""What can end a run: signals, and data workers that are killed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from engine.data_workers import is_handover_error
from utils.errors import UserError


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
    """End the data workers: after an error its traceback keeps their iterator alive, which would end them late."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
