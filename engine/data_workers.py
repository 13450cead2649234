"""Data workers whose failures end the run with the reason.

PyTorch moves a batch into shared memory in a thread of the queue between the processes. An error in that thread is
printed and the batch dropped, and the main process waits for it forever.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from utils.errors import UserError

SHARED_MEMORY = "/dev/shm"
WORKER_GRACE = 60  # seconds that a worker outlives SIGTERM if the main process does not end it
EXIT_LOST_BATCH = 75
# Beginnings of PyTorch's and Python's errors about shared memory and open files, in the main process.
_HANDOVER_ERRORS = (
    "DataLoader worker",
    "Pin memory thread",
    "Too many open files",
    "received 0 items of ancdata",
    "unable to ",
)


def data_loader(
    dataset: Dataset, *, workers: int, device: torch.device, collate: Callable | None = None, **settings: Any
) -> DataLoader:
    """Build a loader that neither loses a batch nor draws from PyTorch's global generator.

    Args:
        dataset: what to read.
        workers: processes that read; 0 reads in this one.
        device: where the batches are used; those for a GPU are put into pinned memory.
        collate: turns samples into a batch; None: PyTorch's default.
        settings: further arguments of ``DataLoader``.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=SharedBatches(collate or default_collate),
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        # Each start of a loader draws a seed for its workers. From the global generator, it would shift the dropout of
        # a resumed run. (Samples do not depend on it: they have streams that follow from seed, epoch and index.)
        generator=torch.Generator(),
        **settings,
    )


class SharedBatches:
    """Collate function that moves the batch into shared memory itself, so that a failure reaches the main process.

    Args:
        collate: turns samples into a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """Make a batch.

        Raises:
            UserError: out of shared memory or file descriptors.
        """
        if get_worker_info() is None:
            return self.collate(samples)
        try:
            batch = self.collate(samples)
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            if not _about_shared_memory(error):
                raise
            raise UserError(no_shared_memory(error)) from error
        return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch that are not empty."""
    if isinstance(batch, Tensor):
        if batch.numel():
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _about_shared_memory(error: Exception) -> bool:
    """Return whether an error comes from shared memory rather than from the collate function."""
    return "/torch_" in str(error) or "shared memory" in str(error) or isinstance(error, OSError)


def no_shared_memory(error: Exception) -> str:
    """Return the message for a batch that does not fit into shared memory: reason, size, fix."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
    try:
        space = os.statvfs(SHARED_MEMORY)
        size = f" has {space.f_blocks * space.f_frsize / 1e6:,.1f} MB"
    except (AttributeError, OSError):  # Windows lacks statvfs
        size = " cannot be read"
    return (
        f"a process that reads data cannot hand over a batch ({reason}): {SHARED_MEMORY}{size}. Continue with --resume "
        "and --workers 0, or with fewer --workers; in a container enlarge it: docker run --shm-size=8g (or --ipc=host)"
    )


def start_worker(worker: int) -> None:
    """Set up signals and error handling in a data worker.

    Ctrl-C and SIGTERM reach the whole process group, but the main process ends its workers itself. A worker left over
    exits ``WORKER_GRACE`` seconds after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    # The queue's thread sends batches, another one their file descriptors; neither may lose a batch silently.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _end_worker(error))
    sys.excepthook = lambda kind, error, trace: _end_worker(error)
    threading.excepthook = lambda args: _end_worker(args.exc_value)


def _end_worker(error: BaseException | None) -> None:
    """Exit this worker: the main process notices that, but would wait forever for a missing batch."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(EXIT_LOST_BATCH)


def is_handover_error(error: Exception) -> bool:
    """Return whether an error in the main process concerns the connection to a worker, not the data it read."""
    if str(error).startswith("Caught "):  # raised in the worker; PyTorch prepends this to its traceback
        return False
    return isinstance(error, OSError | EOFError) or str(error).startswith(_HANDOVER_ERRORS)
