"""The last pointwise layer of an encoder fused with its pooling.

The layer maps every point to a wide embedding of which only the maximum and the mean over the cloud are used. Plain
modules save three tensors of B * N * E numbers for the backward pass (product, batch norm, activation); this one saves
the product and recomputes the rest tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from models.ops.batch_norm import (
    Moments,
    across_processes,
    gradient_of_statistics,
    running_statistics,
    scale_and_shift,
    update_running_statistics,
    uses_batch_statistics,
)
from models.ops.compiled import fused
from models.ops.layers import apply_to_rows, parts_of
from models.ops.precision import at_least_float32, autocast_dtype
from models.ops.tiles import ELEMENTWISE_TILE, is_exporting, tiles_of_clouds


def leaky_relu_gradient(grad: Tensor, before: Tensor, negative_slope: float) -> Tensor:
    """Return the gradient with respect to the input ``before`` of a leaky ReLU."""
    return torch.ops.aten.leaky_relu_backward(grad, before, negative_slope, False)


# Points per group: the maximum is searched among the maxima of groups first.
_GROUP = 16


def _joined(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """Concatenate channels, (b, n, C_i) -> (b, n, sum of C_i), and cast."""
    return torch.cat(parts, dim=2).to(dtype)


def _reduced(
    y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, negative_slope: float, with_mean: bool
) -> tuple[Tensor, ...]:
    """Compute maxima over groups of points before the activation, (b, n, E) -> (b, groups, E).

    ``with_mean`` adds the sums over points of the activation's slope and of slope times centered y, each (b, E).
    """
    value = at_least_float32(y) - mean  # (b, n, E)
    before = torch.addcmul(shift, value, scale)
    sums: tuple[Tensor, ...] = ()
    if with_mean:
        one = mean.new_ones(())
        sums = (
            leaky_relu_gradient(one.expand_as(value), before, negative_slope).sum(1),
            leaky_relu_gradient(value, before, negative_slope).sum(1),
        )
    if rest := before.shape[1] % _GROUP:  # pad the last group of a cloud
        before = F.pad(before, (0, 0, 0, _GROUP - rest), value=float("-inf"))
    return before.unflatten(1, (-1, _GROUP)).amax(2), *sums


def _gradient(
    y: Tensor,
    slope_y: Tensor,
    constant: Tensor,
    scale: Tensor,
    shift: Tensor,
    grad_mean: Tensor,
    negative_slope: float,
    with_mean: bool,
) -> Tensor:
    """Compute the gradient with respect to y (b, n, E), except for the part through the maximum."""
    value = at_least_float32(y)
    grad = torch.addcmul(constant, value, slope_y)
    if with_mean:
        before = torch.addcmul(shift, value, scale)
        grad += leaky_relu_gradient(grad_mean.expand_as(value), before, negative_slope)
    return grad


def _add_at(grad: Tensor, index: Tensor, addend: Tensor, inside: Tensor) -> Tensor:
    """Add (b, E) values to (b, n, E) at one point per channel, if that point is ``inside`` the tile."""
    index = index.clamp(0, grad.shape[1] - 1)
    return grad.scatter_add_(1, index, addend[:, None] * inside)


def _whole_gradient(index: Tensor, addend: Tensor, y: Tensor, *rest: Any) -> Tensor:
    """Compute ``_gradient`` and ``_add_at`` in a form that fuses into one pass, in the dtype of y."""
    grad = _gradient(y, *rest)
    rows = torch.arange(y.shape[1], device=y.device)[:, None]
    return torch.where(rows == index, grad + addend[:, None], grad).to(y.dtype)


class _Pool(torch.autograd.Function):
    """Autograd function of ``pool_pointwise``, differentiable with respect to weight, gain, bias and rows.

    Let y = W x, and z the activation of the normalized s y + t. The gradient with respect to s y + t is that of the
    mean, which all points of a cloud share, times the slope d of the activation at the point, plus that of the maximum
    at one point. The backward pass of batch norm then needs two sums over all points: of this gradient, and of it times
    y. They follow from the sums of d and d y over each cloud, which the forward pass computes, since they do not depend
    on the gradient and also give the mean of z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        norm: _BatchNorm,
        negative_slope: float,
        clouds: int,
        with_mean: bool,
        trains: bool,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        points, width = len(rows[0]) // clouds, len(weight)
        compute_dtype = autocast_dtype(rows[0])
        kernel = weight.to(compute_dtype).T  # (sum of C_i, E)
        batch = uses_batch_statistics(norm)
        keep = batch or trains
        y = rows[0].new_empty((clouds, points, width) if keep else (0,), dtype=compute_dtype)
        exact = torch.promote_types(compute_dtype, torch.float32)
        join = fused(_joined, y)

        def product(c: slice, r: slice) -> Tensor:
            x = join(compute_dtype, *(part.view(clouds, points, -1)[c, r] for part in rows))
            if keep:  # without a copy: tiles are contiguous
                y[c, r].flatten(0, 1).addmm_(x.flatten(0, 1), kernel, beta=0)
                return y[c, r]
            return x @ kernel

        count = None
        if batch:
            for c, r in _tiles(clouds, points, width, weight.device):
                product(c, r)
            running = weight.new_zeros(2, width, dtype=exact)  # unused, but the result takes its dtype
            mean, variance = torch.batch_norm_update_stats(y.flatten(0, 1), running[0], running[1], 1.0)
            count = mean.new_full((), clouds * points)
            moments = across_processes(Moments(count, mean, variance * count), norm)
            mean, variance, count = moments.mean, moments.scatter / moments.number, moments.number
            update_running_statistics(norm, mean, variance, count)
        else:
            mean, variance = running_statistics(norm)
        mean, variance = mean.to(exact), variance.to(exact)
        scale, shift = scale_and_shift(norm, torch.zeros_like(mean), variance)  # of the centered y
        groups = -(-points // _GROUP)
        maxima = mean.new_empty((clouds, groups, width))  # (B, groups, E)
        sum_slope, sum_slope_y = (mean.new_zeros(clouds, width) for _ in range(2))  # (B, E) each
        reduce = fused(_reduced, y)
        for c, r in _tiles(clouds, points, width, weight.device):
            tile = y[c, r] if batch else product(c, r)
            of_groups, *sums = reduce(tile, mean, scale, shift, negative_slope, with_mean)
            if with_mean:
                sum_slope[c] += sums[0]
                sum_slope_y[c] += sums[1]
            first = r.start // _GROUP
            maxima[c, first : first + of_groups.shape[1]] = of_groups
        if not keep:
            pooled, argmax = maxima.amax(1), None
        else:
            pooled, group = maxima.max(1)
            inside = torch.arange(_GROUP, device=y.device)[None, :, None]
            candidates = (group[:, None] * _GROUP + inside).clamp_max(points - 1)  # (B, 16, E)
            values = torch.addcmul(shift, at_least_float32(y.gather(1, candidates)) - mean, scale)
            argmax = candidates.gather(1, values.argmax(1, keepdim=True))  # (B, 1, E)
        ctx.save_for_backward(
            *(y, argmax, pooled, sum_slope, sum_slope_y, scale, shift, mean, variance, count, weight, gain, bias, *rows)
        )
        ctx.norm, ctx.negative_slope, ctx.with_mean = norm, negative_slope, with_mean
        means = (sum_slope_y * scale + sum_slope * shift) / points  # (B, E)
        return F.leaky_relu(pooled, negative_slope), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_max: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        y, argmax, pooled, sum_slope, sum_slope_y, scale, shift, mean, variance, count, weight, gain, bias, *rows = (
            ctx.saved_tensors
        )
        clouds, points, width = y.shape
        compute_dtype = y.dtype
        kernel = weight.to(compute_dtype)
        grad_mean = grad_mean / points
        grad_at_argmax = leaky_relu_gradient(grad_max, pooled, ctx.negative_slope)  # (B, E)
        best = at_least_float32(y.gather(1, argmax)[:, 0]) - mean  # (B, E)
        sum_grad = grad_at_argmax.sum(0) + (grad_mean * sum_slope).sum(0)  # (E,)
        sum_grad_y = (grad_at_argmax * best).sum(0) + (grad_mean * sum_slope_y).sum(0)
        slope_y, constant, grad_gain = gradient_of_statistics(
            ctx.norm, sum_grad, sum_grad_y, scale=scale, mean=mean, variance=variance, count=count
        )
        grad_at_argmax, grad_mean = grad_at_argmax * scale, (grad_mean * scale)[:, None]
        shift = shift - mean * scale
        grad_rows = [torch.empty_like(part) for part in rows]
        grad_weight = torch.zeros_like(weight, dtype=scale.dtype)
        join = fused(_joined, y)
        sizes = [part.shape[1] for part in rows]
        for c, r in _tiles(clouds, points, width, weight.device):
            tile = (y[c, r], slope_y, constant, scale, shift, grad_mean[c], ctx.negative_slope, ctx.with_mean)
            index = argmax[c] - r.start  # (b, 1, E)
            if (whole := fused(_whole_gradient, y)) is _whole_gradient:
                inside = (argmax[c] >= r.start) & (argmax[c] < r.stop)
                grad = _add_at(_gradient(*tile), index, grad_at_argmax[c], inside).to(compute_dtype)
            else:
                grad = whole(index, grad_at_argmax[c], *tile)
            grad = grad.flatten(0, 1)  # (b * n, E)
            x = join(compute_dtype, *(part.view(clouds, points, -1)[c, r] for part in rows)).flatten(0, 1)
            if compute_dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, x)
            else:
                grad_weight += grad.T @ x
            pieces = (grad @ kernel).unflatten(0, tile[0].shape[:2]).split(sizes, dim=2)
            for target, piece in zip(grad_rows, pieces, strict=True):
                target.view(clouds, points, -1)[c, r] = piece
        return (
            *(None, None, None, None, None, grad_weight.to(weight.dtype)),
            None if gain is None else grad_gain.to(gain.dtype),
            None if bias is None else sum_grad.to(bias.dtype),
            *grad_rows,
        )


def _tiles(clouds: int, points: int, width: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield tiles of clouds and points; all but the last tile of a cloud consist of whole groups."""
    budget = ELEMENTWISE_TILE.get(device.type, 1 << 24)
    return tiles_of_clouds(clouds, points, width, budget, multiple=_GROUP)


def pool_pointwise(
    layers: Sequence[Tensor], clouds: int, block: nn.Sequential, *, with_mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply a pointwise layer to the concatenation of ``layers``, then take the maximum and mean over each cloud.

    Equivalent to ``block`` on every point followed by ``max`` and ``mean``, including the running statistics.

    Args:
        layers: rows of the points, each (B * N, C_i).
        clouds: number of clouds, B.
        block: Conv1d (1x1, sum of C_i channels, no bias), batch norm, leaky ReLU.
        with_mean: whether to compute the mean; otherwise it is zero.

    Returns:
        Maximum and mean, each (B, E), at least float32.
    """
    if is_exporting():
        embedded = apply_to_rows(torch.cat(list(layers), dim=1), *block).unflatten(0, (clouds, -1))  # (B, N, E)
        maximum = embedded.amax(1)
        return maximum, embedded.mean(1) if with_mean else torch.zeros_like(maximum)
    weight, norm, activation = parts_of(block)
    return _Pool.apply(
        *(norm, activation.negative_slope, clouds, with_mean, torch.is_grad_enabled(), weight, norm.weight, norm.bias),
        *(part.contiguous() for part in layers),
    )
