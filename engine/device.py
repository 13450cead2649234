"""Choice of the device."""

from __future__ import annotations

import logging
import os

import torch

from models.ops.backend import check_choice
from utils.errors import UserError

logger = logging.getLogger("crossnet")


def resolve_device(name: str = "auto") -> torch.device:
    """Resolve the ``--device`` flag to the CPU, or to a GPU with its index, which becomes the current GPU.

    Several processes on a machine get one GPU each. ``auto`` picks a GPU only if a small kernel runs on it; otherwise
    a single process warns and falls back to the CPU.

    Raises:
        UserError: the device is unknown, missing or not supported, several processes would share it, the launcher does
            not say which GPU this process gets, or the environment asks for kernels that the device cannot run
            (``models.ops.backend``).
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(kind)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only CPUs and CUDA GPUs are supported")
        if device.type == "cuda":
            device = _own_gpu(device)
            torch.cuda.set_device(device)
            _check_that_it_computes(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if name != "auto" or _one_of_several():
            raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from error
        logger.warning("the GPU cannot be used (%s): running on the CPU", reason)
        device = torch.device("cpu")
    check_choice(device)
    return device


def _one_of_several() -> bool:
    """Return whether a launcher started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _own_gpu(device: torch.device) -> torch.device:
    """Return a CUDA device with its index: the requested one, the local rank, or the current GPU.

    Raises:
        UserError: several processes would share a GPU, or the launcher does not set LOCAL_RANK.
    """
    count = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and (device.index is not None or processes > count):
        raise UserError(
            f"{processes} processes on this machine need a GPU each, it has {count} and --device is {device}: use "
            "torchrun --nproc_per_node with at most the number of GPUs and --device cuda, or --device cpu"
        )
    if device.index is not None:
        return device
    if "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if _one_of_several():
        raise UserError(
            "the launcher sets RANK and WORLD_SIZE but not LOCAL_RANK, so this process cannot tell which GPU it gets: "
            "start it with torchrun, or set LOCAL_RANK (its number on its machine, from 0) and LOCAL_WORLD_SIZE"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _check_that_it_computes(device: torch.device) -> None:
    """Run one small kernel: it may fail although ``is_available`` (old driver, or a card this PyTorch left behind)."""
    if torch.ones(2, device=device).sum().item() != 2:
        raise RuntimeError(f"{device} computes wrong sums")
