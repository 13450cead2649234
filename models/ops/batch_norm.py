"""Batch-norm statistics as moments that merge over tiles of edges and over processes.

A layer that never builds its edge tensor cannot call ``nn.BatchNorm2d``. It computes the count, the mean and the
centered sum of squares, and the functions here do the rest of what the module does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from models.ops.native_batch_norm import NormalizeNatively, count_batch, normalizes_natively
from models.ops.precision import at_least_float32, exact_matmul, without_autocast
from utils.collectives import all_reduce_sum, gather_with_grad, world_size


class Moments(NamedTuple):
    """First and second moments of a set of vectors."""

    number: Tensor  # () number of vectors
    mean: Tensor  # (C,)
    scatter: Tensor  # (C,) centered sum of squares, or (C, C) centered sum of outer products


def merge_moments(counts: Tensor, means: Tensor, scatters: Tensor) -> Moments:
    """Merge the moments of R disjoint sets (Chan, Golub and LeVeque, 1983).

    Shape:
        counts (R,), means (R, C), scatters (R, C) or (R, C, C)
    """
    count = counts.sum()
    mean = (counts[:, None] * means).sum(0) / count
    offset = means - mean
    weighted = counts[:, None] * offset
    between = exact_matmul(weighted.T, offset) if scatters.ndim == 3 else (weighted * offset).sum(0)
    return Moments(count, mean, scatters.sum(0) + between)


def shares_statistics(norm: _BatchNorm) -> bool:
    """Return whether ``norm`` computes its batch statistics over several processes."""
    return world_size() > 1 and isinstance(norm, SyncBatchNorm)


def across_processes(moments: Moments, norm: _BatchNorm) -> Moments:
    """Merge the moments of all processes in one differentiable collective if ``norm`` is a ``SyncBatchNorm``.

    With another batch norm, or in a single process, return them unchanged.
    """
    if not shares_statistics(norm):
        return moments
    packed = torch.cat([moments.number.reshape(1).to(moments.mean.dtype), moments.mean, moments.scatter.flatten()])
    channels = len(moments.mean)
    slots = gather_with_grad(packed[None])
    counts, means, scatters = slots.split([1, channels, packed.numel() - 1 - channels], dim=1)
    return merge_moments(counts.flatten(), means, scatters.reshape(-1, *moments.scatter.shape))


def sum_across_processes(x: Tensor, norm: _BatchNorm) -> Tensor:
    """Sum ``x`` over all processes if ``norm`` is a ``SyncBatchNorm``; otherwise return it unchanged."""
    return all_reduce_sum(x) if shares_statistics(norm) else x


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    """Return whether the module normalizes with batch statistics rather than running statistics."""
    return norm.training or norm.running_mean is None


def running_statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance (C,) used for normalization in evaluation mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update the buffers as ``nn.BatchNorm`` does in training mode.

    Args:
        norm: module to update; ``momentum=None`` means the cumulative average, as in PyTorch.
        mean: batch mean (C,).
        variance: biased batch variance (C,).
        count: number of vectors; the buffer stores the unbiased variance.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    factor = count_batch(norm)
    unbiased = variance * (count / (count - 1).clamp_min(1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor)


def scale_and_shift(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each (C,), such that ``norm`` with these statistics is ``x * scale + shift``."""
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


def gradient_of_statistics(
    norm: _BatchNorm,
    sum_grad: Tensor,
    sum_grad_y: Tensor,
    *,
    scale: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the part of batch norm's gradient that flows through the statistics to every input.

    If g is the gradient with respect to ``scale * y + shift``, the gradient with respect to y is
    ``scale * g + slope * y + constant``.

    Args:
        norm: the module; its type decides whether statistics are shared with other processes.
        sum_grad: (C,) sum of g over all y of this process.
        sum_grad_y: (C,) sum of g times the centered y.
        scale: (C,) of ``scale_and_shift``.
        mean: (C,).
        variance: (C,), biased.
        count: number of y in all processes; None with running statistics.

    Returns:
        slope (C,), constant (C,), and the gradient of the gain (C,); the gradient of the bias is ``sum_grad``.
    """
    rstd = torch.rsqrt(variance + norm.eps)
    grad_gain = sum_grad_y * rstd
    if count is None:
        return torch.zeros_like(scale), torch.zeros_like(scale), grad_gain
    # The mean and the variance depend on every y of every process.
    shared = sum_across_processes(torch.stack([sum_grad, grad_gain]), norm) / count
    slope = -scale * rstd * shared[1]
    return slope, -scale * shared[0] - slope * mean, grad_gain


def sign_of_gain(scale: Tensor) -> Tensor:
    """Return +1 where ``x * scale + shift`` is non-decreasing in x (a scale of zero included), -1 elsewhere."""
    return torch.where(scale.detach() < 0, -1.0, 1.0).to(scale.dtype)


class _NormalizeTogether(torch.autograd.Function):
    """Batch norm with the statistics of all processes; the backward pass needs only the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _BatchNorm) -> Tensor:
        values = at_least_float32(x)
        ctx.dims, ctx.norm = [0, *range(2, x.ndim)], norm
        variance, mean = torch.var_mean(values, ctx.dims, correction=0)
        count = values.new_full((), x.numel() // x.shape[1])  # on the device: a copy would synchronize
        moments = across_processes(Moments(count, mean, variance * count), norm)
        variance = moments.scatter / moments.number
        update_running_statistics(norm, moments.mean, variance, moments.number)
        ctx.save_for_backward(x, weight, moments.mean, torch.rsqrt(variance + norm.eps), moments.number)
        return F.batch_norm(values, moments.mean, variance, weight, bias, eps=norm.eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        grad, centered = at_least_float32(grad), at_least_float32(x) - mean.reshape(shape)
        sum_grad, grad_gain = grad.sum(ctx.dims), (grad * centered).sum(ctx.dims) * rstd
        # The mean and the variance depend on every row of every process.
        shared = sum_across_processes(torch.stack([sum_grad, grad_gain]), ctx.norm) / count
        scale = rstd if weight is None else rstd * weight
        grad_x = torch.addcmul(grad - shared[0].reshape(shape), centered, (-shared[1] * rstd).reshape(shape))
        of_weight, of_bias = (None, None) if weight is None else (grad_gain, sum_grad)
        return (grad_x * scale.reshape(shape)).to(x.dtype), of_weight, of_bias, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all processes, on gloo (CPU) as well as on NCCL.

    ``torch.nn.SyncBatchNorm`` does not support CPU tensors. Forward and backward take one collective each. Parameters
    and buffers are named as in ``nn.BatchNorm``, to which this is equal in a single process.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...) over all dimensions but C."""
        if world_size() == 1 or not uses_batch_statistics(self):
            return super().forward(x)
        with without_autocast(x.device):
            together = NormalizeNatively if normalizes_natively(x) else _NormalizeTogether
            return together.apply(x, self.weight, self.bias, self)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Convert every batch norm inside ``module`` to this class in place, with its parameters and buffers.

        EdgeConv blocks do not call their batch norm; its class tells them whether to share statistics.
        """
        for child in module.modules():
            if isinstance(child, _BatchNorm):
                child.__class__ = cls
        return module
