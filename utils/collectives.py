"""What processes exchange. Everything here is valid in a single process too, where it does nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


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
    # Each process fills its own rows; the differentiable sum then is a gather with the right gradient.
    before, after = (x.new_zeros((n * len(x), *x.shape[1:])) for n in (rank(), world_size() - 1 - rank()))
    return all_reduce_sum(torch.cat([before, x, after]))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. Waits for the other processes, not for the device."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def broadcast_from_rank0(compute: Callable[[], Result]) -> Result:
    """What ``compute`` returns in the main process, in all of them; only that process calls it."""
    if world_size() == 1:
        return compute()
    box = [compute() if is_main() else None]
    dist.broadcast_object_list(box)
    return box[0]


def main_only(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator of what the other processes skip: whatever writes files."""

    @functools.wraps(function)
    def in_main(*args: Any, **kwargs: Any) -> None:
        if is_main():
            function(*args, **kwargs)

    return in_main


def gather_to_rank0(value: Result) -> list[Result]:
    """Every process's value in rank order, in the main process; an empty list in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.gather_object(value, values if is_main() else None)
    return values if is_main() else []


def all_gather_strings(messages: list[str]) -> list[str]:
    """Every process's messages, in all processes; cheap where there are none."""
    if world_size() == 1 or not any_rank(bool(messages)):
        return messages
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, messages)
    return sum(lists, [])


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Every process's rows, in all processes, without gradient.

    Args:
        rows: (sizes[rank], ...).
        sizes: how many rows each process has.
    """
    if world_size() == 1:
        return [rows]
    padded = torch.cat([rows, rows.new_zeros((max(sizes) - len(rows), *rows.shape[1:]))])
    slots = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(slots, padded)
    return [slot[:size] for slot, size in zip(slots, sizes, strict=True)]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the main one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The module to call in training steps: its backward pass averages the gradients over the processes.

    The model's parameters stay where they are, under their names; it must be the same in all processes.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # the same everywhere with shared statistics; else the loop broadcasts them each epoch
        gradient_as_bucket_view=True,  # gradients are averaged where they lie
    )


def sync_gradients_if(network: nn.Module, when: bool) -> contextlib.AbstractContextManager:
    """Context of a backward pass: without ``when`` a ``wrap_ddp`` module keeps its gradients to this process."""
    alone = when or not isinstance(network, DistributedDataParallel)
    return contextlib.nullcontext() if alone else network.no_sync()
