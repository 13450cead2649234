"""Which precision a computation takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which operations take their inputs' own precision; nothing where autocast is off.

    (torch.export of PyTorch 2.4 cannot record the context.)
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which float32 matrix products on a GPU keep float32's digits, where the environment allows TF32.

    TF32 keeps 10 bits of each factor, and other points become the nearest. ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` (set in
    NGC containers) and ``torch.set_float32_matmul_precision`` switch it on.
    """
    return _without_tf32() if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch 2.9's newer name, which the older one does not read
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
