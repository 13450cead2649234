"""The last pointwise layer of an encoder and its pooling in one: batch norm and activation are never stored.

``fusion`` maps every point to a wide embedding of which only the maximum and the mean over the cloud are used. Plain
modules keep three tensors of B * N * E numbers for the backward pass; here it is one, the product itself, and all else
is computed again, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import ELEMENTWISE_BLOCK, blocks_of_clouds, can_mark, mark_places, unmark
from models.norm import (
    Moments,
    across_processes,
    scale_and_shift,
    sign_of_gain,
    sum_across_processes,
    update_running_statistics,
    uses_batch_statistics,
)
from models.precision import at_least_float32, autocast_dtype


def leaky_relu_gradient(grad: Tensor, before: Tensor, slope: float) -> Tensor:
    """Gradient with respect to the input ``before`` of a leaky ReLU."""
    return torch.ops.aten.leaky_relu_backward(grad, before, slope, False)


class _Pool(torch.autograd.Function):
    """See ``pool_pointwise``. Inputs: module, clouds, whether the mean and gradients are wanted, parameters, rows.

    With y = W x, the normalised s y + t and its activation z: the gradient with respect to s y + t is that of the mean,
    the same for all points of a cloud, times the activation's slope there, plus that of the maximum at one point. Batch
    norm's own backward then needs the sums of it and of it times y over all points.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: nn.Sequential,
        clouds: int,
        with_mean: bool,
        trains: bool,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        norm, slope = block[1], block[2].negative_slope
        points, width = len(rows[0]) // clouds, len(weight)
        half = autocast_dtype(rows[0])
        kernel = weight.to(half).T
        batch = uses_batch_statistics(norm)
        keep = batch or trains
        y = rows[0].new_empty((clouds, points, width) if keep else (0,), dtype=half)
        exact = weight.new_empty(0, dtype=at_least_float32(y).dtype)

        def blocks() -> Iterator[tuple[slice, slice]]:
            return blocks_of_clouds(clouds, points, width, ELEMENTWISE_BLOCK.get(weight.device.type, 1 << 24))

        def product(c: slice, r: slice) -> Tensor:
            x = torch.cat([part.view(clouds, points, -1)[c, r] for part in rows], dim=2).to(half)
            if keep:  # straight to where it stays: blocks are contiguous
                y[c, r].flatten(0, 1).addmm_(x.flatten(0, 1), kernel, beta=0)
                return at_least_float32(y[c, r])
            return at_least_float32(x @ kernel)

        if batch:
            # A mean from the inputs' is close enough to centre with; what it misses is taken off afterwards.
            centre = torch.cat([at_least_float32(part).mean(0) for part in rows]) @ at_least_float32(weight).T
            total, scatter = torch.zeros_like(centre), torch.zeros_like(centre)
            for c, r in blocks():
                offset = product(c, r) - centre
                total += offset.sum((0, 1))
                scatter += offset.square_().sum((0, 1))
            count = centre.new_full((), clouds * points)
            offset = total / count
            own = Moments(count, centre + offset, (scatter - count * offset.square()).clamp_min_(0))
            moments = across_processes(own, norm)
            variance = moments.scatter / moments.count
            update_running_statistics(norm, moments.mean, variance, moments.count)
            mean, count = moments.mean, moments.count
        else:
            mean, variance, count = norm.running_mean, norm.running_var, None
        scale, shift = (value.to(exact.dtype) for value in scale_and_shift(norm, mean, variance))
        sign = sign_of_gain(scale)
        maxima = exact.new_full((clouds, width), float("-inf"))
        places = torch.zeros_like(maxima, dtype=torch.int64)
        means = torch.zeros_like(maxima)
        marks = can_mark(maxima, points)
        marked = maxima.double() if marks else None
        for c, r in blocks():
            value = at_least_float32(y[c, r]) if batch else product(c, r)
            if with_mean:
                means[c] += F.leaky_relu_(torch.addcmul(shift, value, scale), slope).sum(1)
            value = value * sign
            if marks:
                place = torch.arange(r.start, r.stop)[:, None]
                torch.maximum(marked[c], mark_places(value, place).amax(1), out=marked[c])
            else:
                best, place = value.max(1)
                better = best > maxima[c]
                maxima[c] = torch.where(better, best, maxima[c])
                places[c] = torch.where(better, place + r.start, places[c])
        if marks:
            maxima, places = unmark(marked)
            places.clamp_max_(points - 1)
        before = torch.addcmul(shift, maxima * sign, scale)
        ctx.save_for_backward(y, places, scale, shift, mean, variance, count, weight, gain, bias, *rows)
        ctx.norm, ctx.slope = norm, slope
        return F.leaky_relu(before, slope), means / points

    @staticmethod
    def backward(ctx: Any, grad_max: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        y, places, scale, shift, mean, variance, count, weight, gain, bias, *rows = ctx.saved_tensors
        clouds, points, width = y.shape
        half = y.dtype
        kernel = weight.to(half)
        grad_mean = (grad_mean / points)[:, None]

        def blocks() -> Iterator[tuple[slice, slice]]:
            return blocks_of_clouds(clouds, points, width, ELEMENTWISE_BLOCK.get(weight.device.type, 1 << 24))

        best = at_least_float32(y.gather(1, places[:, None])[:, 0])
        peak = leaky_relu_gradient(grad_max, torch.addcmul(shift, best, scale), ctx.slope)
        sum_grad, sum_grad_y = peak.sum(0), (peak * best).sum(0)
        for c, r in blocks():
            value = at_least_float32(y[c, r])
            grad = leaky_relu_gradient(grad_mean[c].expand_as(value), torch.addcmul(shift, value, scale), ctx.slope)
            sum_grad += grad.sum((0, 1))
            sum_grad_y += grad.mul_(value).sum((0, 1))
        rstd = torch.rsqrt(variance + ctx.norm.eps)
        grad_gain = (sum_grad_y - mean * sum_grad) * rstd
        if count is None:
            slope_y = constant = torch.zeros_like(scale)
        else:
            # The mean and the variance depend on every point of every process.
            shared = sum_across_processes(torch.stack([sum_grad, grad_gain]), ctx.norm) / count
            slope_y = -scale * rstd * shared[1]
            constant = -scale * shared[0] - slope_y * mean
        peak, grad_mean = peak * scale, grad_mean * scale
        grad_rows = [torch.empty_like(part) for part in rows]
        grad_weight = torch.zeros_like(weight, dtype=scale.dtype)
        sizes = [part.shape[1] for part in rows]
        for c, r in blocks():
            value = at_least_float32(y[c, r])
            grad = leaky_relu_gradient(grad_mean[c].expand_as(value), torch.addcmul(shift, value, scale), ctx.slope)
            grad.addcmul_(value, slope_y).add_(constant)
            inside = (places[c] >= r.start) & (places[c] < r.stop)
            place = (places[c] - r.start).clamp(0, r.stop - r.start - 1)
            grad.scatter_add_(1, place[:, None], (peak[c] * inside)[:, None])
            grad = grad.to(half).flatten(0, 1)
            x = torch.cat([part.view(clouds, points, -1)[c, r] for part in rows], dim=2).to(half).flatten(0, 1)
            if half == grad_weight.dtype:
                grad_weight.addmm_(grad.T, x)
            else:
                grad_weight += grad.T @ x
            pieces = (grad @ kernel).unflatten(0, value.shape[:2]).split(sizes, dim=2)
            for target, piece in zip(grad_rows, pieces, strict=True):
                target.view(clouds, points, -1)[c, r] = piece
        return (
            *(None, None, None, None, grad_weight.to(weight.dtype)),
            None if gain is None else grad_gain.to(gain.dtype),
            None if bias is None else sum_grad.to(bias.dtype),
            *grad_rows,
        )


def pool_pointwise(
    layers: Sequence[Tensor], clouds: int, block: nn.Sequential, *, with_mean: bool = False
) -> tuple[Tensor, Tensor]:
    """A pointwise layer on the concatenation of ``layers``, then the maximum and the mean over each cloud's points.

    Equal to ``block`` on every point followed by ``max`` and ``mean``; also what happens to the batch norm.

    Args:
        layers: rows of the points, each (B * N, C_i).
        clouds: B.
        block: Conv1d (1x1, sum of C_i channels, no bias), batch norm, leaky ReLU.
        with_mean: whether the mean is wanted; without, it is zero.

    Returns:
        Maximum and mean, each (B, E), at least float32.
    """
    conv, norm = block[0], block[1]
    return _Pool.apply(
        *(block, clouds, with_mean, torch.is_grad_enabled(), conv.weight.flatten(1), norm.weight, norm.bias),
        *(part.contiguous() for part in layers),
    )
