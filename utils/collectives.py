"""Communication between processes. In a single process every function is a no-op and returns its local result."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


_alone = False


def is_distributed() -> bool:
    """Return whether a process group is initialized, and this is not a computation of one process alone."""
    return dist.is_available() and dist.is_initialized() and not _alone


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Act as a single process inside; otherwise a collective that the other ranks do not join would wait forever."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is rank 0, the process that writes files and shows progress."""
    return rank() == 0


class _SumAcrossProcesses(torch.autograd.Function):
    """All-reduce whose backward is also an all-reduce, since each rank's loss depends on all ranks' inputs."""

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
    """Return the differentiable sum of ``x`` over all processes; ``x`` itself in a single process."""
    return _SumAcrossProcesses.apply(x) if world_size() > 1 else x


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradient.

    Shape:
        (B, ...) with the same B everywhere -> (processes * B, ...)
    """
    if world_size() == 1:
        return x
    # Each rank fills in its rows and leaves zeros elsewhere, so the differentiable sum is a gather.
    before, after = (x.new_zeros((n * len(x), *x.shape[1:])) for n in (rank(), world_size() - 1 - rank()))
    return all_reduce_sum(torch.cat([before, x, after]))  # (world * B, ...)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank. Waits for the other processes, not for the device."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def broadcast_from_rank0(compute: Callable[[], Result]) -> Result:
    """Call ``compute`` on rank 0 only, as a single process, and return its result on every rank."""
    if world_size() == 1:
        return compute()
    box = [None]
    if is_main():
        with alone():
            box = [compute()]
    dist.broadcast_object_list(box)
    return box[0]


def main_only(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a function to run on rank 0 only, such as one that writes files."""

    @functools.wraps(function)
    def in_main(*args: Any, **kwargs: Any) -> None:
        if is_main():
            function(*args, **kwargs)

    return in_main


def gather_to_rank0(value: Result) -> list[Result]:
    """Return every rank's value in rank order on rank 0, an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.gather_object(value, values if is_main() else None)
    return values if is_main() else []


def all_gather_strings(messages: list[str]) -> list[str]:
    """Return the messages of all ranks on every rank; cheap if there are none."""
    if world_size() == 1 or not any_rank(bool(messages)):
        return messages
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, messages)
    return sum(lists, [])


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the rows of all ranks on every rank, without gradient.

    Args:
        rows: (sizes[rank], ...).
        sizes: number of rows of each rank.
    """
    if world_size() == 1:
        return [rows]
    padded = torch.cat([rows, rows.new_zeros((max(sizes) - len(rows), *rows.shape[1:]))])
    slots = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(slots, padded)
    return [slot[:size] for slot, size in zip(slots, sizes, strict=True)]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values to all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Return the module to call in training steps; its backward pass averages gradients over the processes.

    ``model`` keeps its parameters and their names, and must be identical on all ranks.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Buffers are identical under sync batch norm; otherwise the loop broadcasts them every epoch.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # PyTorch 2.14 and newer
    no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # average gradients in place
        **no_buffers,
    )


def sync_gradients_if(network: nn.Module, when: bool) -> contextlib.AbstractContextManager:
    """Return a context for the backward pass; unless ``when``, a ``wrap_ddp`` module does not average gradients."""
    alone = when or not isinstance(network, DistributedDataParallel)
    return contextlib.nullcontext() if alone else network.no_sync()
