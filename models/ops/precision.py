"""Control of the floating-point precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.tiles import runs_eagerly


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64 unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product of ``x``: that of autocast if enabled, otherwise its own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that disables autocast, or a null context if it is off.

    The null context is needed because torch.export of PyTorch 2.4 cannot trace ``torch.autocast``.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that disables TF32 in float32 matrix products on a GPU.

    TF32 rounds the factors to 10 bits of mantissa, which changes the nearest neighbors.
    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` (set in NGC containers) and ``torch.set_float32_matmul_precision`` enable it.
    """
    return _without_tf32() if device.type == "cuda" else contextlib.nullcontext()


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` and its gradients without TF32; a context around the forward pass would miss the gradients.

    Args:
        a: (..., n, m).
        b: (..., m, p), with the leading dimensions of ``a``.
    """
    needs_function = a.is_cuda and torch.is_grad_enabled() and runs_eagerly()
    return _ExactMatmul.apply(a, b) if needs_function else a @ b


class _ExactMatmul(torch.autograd.Function):
    """Matrix product without TF32 in both passes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with exact_products(a.device):
            return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        with exact_products(grad.device):
            return grad @ b.mT if of_a else None, a.mT @ grad if of_b else None


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer API of PyTorch 2.9, which the old one cannot read
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
