import logging

import pytest
import torch

from engine import device as module
from engine.device import resolve_device
from utils.errors import UserError


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    names = ["foo", "", "0", "meta", "hpu", "xla", "mps", "cuda:99", "cpu:x"]
    for name in names if torch.cuda.is_available() else [*names, "cuda"]:
        with pytest.raises(UserError, match=f"--device {name} cannot be used here .*--device cpu") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that emulates GPUs and a launcher's variables, and returns the GPUs made current."""

    def pretend(count, current=0, **launcher):
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in launcher.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
        monkeypatch.setattr(module, "_check_that_it_computes", lambda device: None)
        return chosen

    return pretend


TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
ALONE_ON_ITS_NODE = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("current", "launcher", "expected"),
    [
        (0, {}, "cuda:0"),
        (2, {}, "cuda:2"),
        (0, {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, "cuda:0"),
        (0, TORCHRUN, "cuda:1"),
        (0, ALONE_ON_ITS_NODE, "cuda:0"),
        (0, {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, "cuda:1"),
        (0, {"WORLD_SIZE": 8}, "cuda:0"),  # a scheduler's variable: nobody to meet
    ],
)
def test_a_gpu_always_has_an_index_and_becomes_the_current_one(machine, name, current, launcher, expected):
    chosen = machine(4, current, **launcher)
    device = resolve_device(name)
    assert device == torch.device(expected) and chosen == [device.index]


def test_a_gpu_that_is_named_is_taken(machine):
    for launcher in ({}, ALONE_ON_ITS_NODE):
        chosen = machine(2, **launcher)
        assert resolve_device("cuda:1") == torch.device("cuda:1") and chosen == [1]
    chosen = machine(2, **TORCHRUN)
    assert resolve_device("cpu") == torch.device("cpu") and not chosen


def test_processes_on_a_machine_do_not_share_a_gpu(machine):
    machine(4, **TORCHRUN)
    with pytest.raises(UserError, match="4 processes on this machine need a GPU each, it has 4 and --device is cuda:0"):
        resolve_device("cuda:0")
    machine(3, **TORCHRUN)
    with pytest.raises(UserError, match="4 processes .* it has 3 .*--nproc_per_node"):
        resolve_device()


def test_a_launcher_that_does_not_number_the_processes_of_a_machine_is_an_error(machine):
    machine(4, RANK=1, WORLD_SIZE=4)
    with pytest.raises(UserError, match="sets RANK and WORLD_SIZE but not LOCAL_RANK.*torchrun"):
        resolve_device()
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_does_not_take_a_gpu_that_does_not_compute(machine, monkeypatch, caplog):
    def too_old(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    machine(1)
    monkeypatch.setattr(module, "_check_that_it_computes", too_old)
    with caplog.at_level(logging.WARNING, logger="crossnet"):
        assert resolve_device() == torch.device("cpu")
    assert "no kernel image" in caplog.text and "\nand more" not in caplog.text
    with pytest.raises(UserError, match="--device cuda cannot be used here .*no kernel image.*--device cpu"):
        resolve_device("cuda")
    machine(4, **TORCHRUN)
    monkeypatch.setattr(module, "_check_that_it_computes", too_old)
    with pytest.raises(UserError, match="--device auto cannot be used here"):  # the others would wait for this process
        resolve_device()
