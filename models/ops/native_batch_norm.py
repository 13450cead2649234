"""Batch norm over all processes by PyTorch's CUDA kernels, as ``torch.nn.SyncBatchNorm`` does it, without its wait.

Plain operations move an image network's activations about ten times in float32; these kernels move them as they are,
once or twice each way. Where they fail or do not agree with plain formulas in a check at first use, all processes take
the plain operations of ``models.ops.batch_norm``; ``CROSSNET_KERNELS=torch`` asks for those.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from models.ops.backend import wanted
from utils.collectives import any_rank, world_size

logger = logging.getLogger("crossnet.kernels")


def normalizes_natively(x: Tensor) -> bool:
    """Whether all processes take the kernels for tensors like ``x``; at the first call on a GPU they find out."""
    return x.is_cuda and wanted() != "torch" and _all_agree(x.device)


@functools.cache
def _all_agree(device: torch.device) -> bool:
    try:
        _check(device)
        reason = ""
    except Exception as error:  # whatever a build of PyTorch or a device may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("batch norm takes plain operations on %s: %s", device, reason)
    return not any_rank(bool(reason))


def _check(device: torch.device) -> None:
    """Compare with ``F.batch_norm`` in float64 on the CPU, in this process alone and both memory layouts.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 6, 5, 3, generator=generator, device="cpu") for _ in range(2))
    weight, bias = (torch.randn(6, generator=generator, device="cpu") for _ in range(2))
    exact = [part.double().requires_grad_() for part in (x, weight, bias)]
    out = F.batch_norm(exact[0], None, None, exact[1], exact[2], training=True)
    expected = (out, *torch.autograd.grad(out, exact, grad.double()))
    for layout in (torch.contiguous_format, torch.channels_last):
        on_gpu, grad_on_gpu = (part.to(device).contiguous(memory_format=layout) for part in (x, grad))
        weight_on_gpu = weight.to(device)
        mean, rstd, counts = _statistics(on_gpu, None, 0.0, 1e-5, alone=True)
        found = [torch.batch_norm_elemt(on_gpu, weight_on_gpu, bias.to(device), mean, rstd, 1e-5)]
        gradients = _gradients(grad_on_gpu, on_gpu, weight_on_gpu, mean, rstd, counts, alone=True)
        found += [part for part in gradients if part is not None]
        for mine, theirs in zip(found, expected, strict=True):
            error = ((mine.cpu().double() - theirs).abs().max() / theirs.abs().max()).item()
            if not error < 1e-5:
                raise RuntimeError(f"PyTorch's batch-norm kernels differ from the formula by {error:.1e}")


def _group() -> dist.ProcessGroup:
    """The processes, on a communicator of their statistics: these never queue behind a bucket of gradients."""
    return _group_beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_beside(world: object) -> dist.ProcessGroup:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


def count_batch(norm: _BatchNorm) -> float:
    """Count a batch; return the weight of its statistics in the running ones, 1 / batches where momentum is None."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.item()


def _statistics(
    x: Tensor, norm: _BatchNorm | None, momentum: float, eps: float, *, alone: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / standard deviation, and every process's count; the norm's running statistics are updated."""
    mean, rstd = torch.batch_norm_stats(x, eps)
    count = mean.new_full((1,), x.numel() // x.shape[1])  # filled there: a copy would wait for the device
    parts = torch.cat([mean, rstd, count])[None]
    if not alone:
        own, parts = parts, parts.new_empty(world_size(), parts.shape[1])
        dist.all_gather_into_tensor(parts, own, group=_group())
    means, rstds, counts = parts.split([x.shape[1], x.shape[1], 1], dim=1)
    running = (None, None) if norm is None else (norm.running_mean, norm.running_var)
    counts = counts.flatten()
    mean, rstd = torch.batch_norm_gather_stats_with_counts(
        x, means.contiguous(), rstds.contiguous(), *running, momentum, eps, counts
    )
    return mean, rstd, counts.to(torch.int32)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, counts: Tensor, *, alone: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the gain and the bias."""
    has_weight = weight is not None
    sum_grad, sum_grad_x, of_weight, of_bias = torch.batch_norm_backward_reduce(
        grad, x, mean, rstd, weight, True, has_weight, has_weight
    )
    if not alone:
        both = torch.cat([sum_grad, sum_grad_x])
        dist.all_reduce(both, group=_group())
        sum_grad, sum_grad_x = both.chunk(2)
    of_x = torch.batch_norm_backward_elemt(grad, x, mean, rstd, weight, sum_grad, sum_grad_x, counts)
    return of_x, of_weight, of_bias


class NormalizeNatively(torch.autograd.Function):
    """Batch norm by the statistics of all processes; only the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _BatchNorm) -> Tensor:
        """Normalize (B, C, ...) and update the norm's buffers."""
        ctx.layout = torch.contiguous_format
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            ctx.layout = torch.channels_last
        x = x.contiguous(memory_format=ctx.layout)
        momentum = count_batch(norm) if norm.training and norm.running_mean is not None else 0.0
        mean, rstd, counts = _statistics(x, norm if norm.training else None, momentum, norm.eps)
        ctx.save_for_backward(x, weight, mean, rstd, counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Pass on the gradient through the statistics of all processes."""
        x, weight, mean, rstd, counts = ctx.saved_tensors
        return *_gradients(grad.contiguous(memory_format=ctx.layout), x, weight, mean, rstd, counts), None
