"""Data workers: a lost batch never makes a run hang, and loaders do not touch the global generator."""

import multiprocessing
import resource
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from engine.data_workers import data_loader
from engine.faults import batches
from utils.errors import UserError, plain_message

CPU = torch.device("cpu")


class Numbers(Dataset):
    """Data set whose sample i is i repeated 1,000 times, with optional extras."""

    def __init__(self, beside=None):
        self.beside = beside or (lambda index: 0)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"values": torch.full((1000,), index), "beside": self.beside(index)}


def collate(samples):
    return {"values": torch.stack([s["values"] for s in samples]), "beside": [s["beside"] for s in samples]}


@pytest.fixture(autouse=True)
def no_process_left():
    """Kill data workers that hang: PyTorch waits for each when its loader is deleted, whenever that is."""
    yield
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)


def load(dataset, workers=2, collate=collate):
    return list(batches(data_loader(dataset, batch_size=4, workers=workers, device=CPU, collate=collate)))


def unable_to_allocate(index):
    if index == 5:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )
    return 0


def too_few_open_files(index):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return 0


def threads_that_fail(index):
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    time.sleep(60)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_collate_function(workers):
    found = load(Numbers(), workers)
    assert torch.equal(torch.cat([batch["values"][:, 0] for batch in found]), torch.arange(24))
    assert all(batch["values"].is_shared() == (workers > 0) for batch in found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_starting_a_loader_draws_nothing_from_the_global_generator(workers, persistent):
    before = torch.get_rng_state()
    loader = data_loader(
        Numbers(),
        batch_size=4,
        workers=workers,
        device=CPU,
        collate=collate,
        persistent_workers=persistent and workers > 0,
    )
    for _ in range(2):
        list(batches(loader))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (too_few_open_files, r"a process that reads data .*/dev/shm"),
        (lambda index: threading.Lock(), r"a process that reads data is gone .*--resume and fewer --workers"),
        (threads_that_fail, "a process that reads data is gone"),
    ],
    ids=["open files", "cannot be pickled", "a thread fails"],
)
@pytest.mark.timeout(100)
def test_a_batch_that_cannot_be_handed_over_ends_the_run(beside, message):
    with pytest.raises(UserError, match=message):
        load(Numbers(beside))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.timeout(100)
def test_little_shared_memory_is_named(ours, monkeypatch):
    def unable(self):
        unable_to_allocate(5)

    def collate_shared(samples):  # as PyTorch's own collate function, which allocates shared memory itself
        unable_to_allocate(5)

    if ours:
        monkeypatch.setattr(torch.Tensor, "share_memory_", unable)
    with pytest.raises(UserError) as error:
        load(Numbers(), collate=collate if ours else collate_shared)
    message = plain_message(error.value)
    assert message.startswith("a process that reads data cannot hand over a batch (unable to allocate shared memory")
    assert "/dev/shm has" in message and "--workers 0" in message and "--shm-size" in message
    assert "Traceback" not in message


def test_an_error_of_the_data_set_stays_what_it_is():
    with pytest.raises(ZeroDivisionError):
        load(Numbers(lambda index: 1 // (index - 5)))


def test_workers_that_cannot_start_are_a_users_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    loader = data_loader(Numbers(), batch_size=4, workers=2, device=CPU)
    monkeypatch.setattr(type(loader), "__iter__", full)
    with pytest.raises(UserError, match="No space left on device.*/dev/shm"):
        list(batches(loader))
