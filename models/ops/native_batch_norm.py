"""Batch norm over all processes with PyTorch's CUDA kernels, like ``torch.nn.SyncBatchNorm`` but without its sync.

Plain operations read and write the activations of an image network about ten times, in float32; these kernels do so
once or twice per pass, in the activations' dtype. If the kernels fail a check against ``F.batch_norm`` at first use in
any process, all processes fall back to the plain operations of ``models.ops.batch_norm``. ``CROSSNET_KERNELS=torch``
selects those everywhere.
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
    """Return whether all processes use the kernels for ``x``; the first call per device checks them."""
    return x.is_cuda and wanted() != "torch" and _all_agree(x.device)


@functools.cache
def _all_agree(device: torch.device) -> bool:
    try:
        _compare_with_formula(device)
        reason = ""
    except Exception as error:  # builds of PyTorch and devices raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("batch norm uses plain operations on %s: %s", device, reason)
    return not any_rank(bool(reason))


def _compare_with_formula(device: torch.device) -> None:
    """Compare with ``F.batch_norm`` in float64 on the CPU, for both memory layouts, without communication.

    Raises:
        RuntimeError: a result differs by more than rounding.
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
    """Return a process group for the statistics alone, which then never queue behind a bucket of gradients."""
    return _group_beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_beside(world: object) -> dist.ProcessGroup:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


def count_batch(norm: _BatchNorm) -> float:
    """Count a batch; return the momentum of its update, which is 1 / number of batches if ``momentum`` is None."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.item()


def _statistics(
    x: Tensor, norm: _BatchNorm | None, momentum: float, eps: float, *, alone: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), 1 / standard deviation (C,) and counts (processes,); update the norm's running statistics."""
    mean, rstd = torch.batch_norm_stats(x, eps)
    count = mean.new_full((1,), x.numel() // x.shape[1])  # on the device: a copy would synchronize
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
    """Compute the gradients of the input, the gain and the bias."""
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
    """Batch norm with the statistics of all processes; the backward pass needs only the input."""

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
        """Backpropagate through the statistics of all processes."""
        x, weight, mean, rstd, counts = ctx.saved_tensors
        return *_gradients(grad.contiguous(memory_format=ctx.layout), x, weight, mean, rstd, counts), None
