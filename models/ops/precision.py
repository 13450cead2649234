"""Which precision a computation takes."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of ``x`` is computed in: the dtype of autocast where that is on, or its own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which operations take their inputs' own precision; nothing where autocast is off.

    (torch.export of PyTorch 2.4 cannot record the context.)
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
