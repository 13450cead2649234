"""Processes: rank and size from torchrun's environment, and sums across processes with gradient.

Everything here is valid in one process too, where it does nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


class _SumAcrossProcesses(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: every process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over the processes, differentiable; ``x`` itself in a single process."""
    return _SumAcrossProcesses.apply(x) if world_size() > 1 else x


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, with gradient.

    Shape:
        (B, ...) with the same B everywhere -> (processes * B, ...)
    """
    if world_size() == 1:
        return x
    slots = x.new_zeros((world_size(), *x.shape))
    # Each process fills its own slot; the differentiable sum then is a gather with the right gradient.
    slots = slots.index_copy(0, torch.tensor([rank()], device=x.device), x[None])
    return all_reduce_sum(slots).flatten(0, 1)
