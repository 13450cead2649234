"""EdgeConv of DGCNN (arXiv:1801.07829) without edge tensors.

A textbook EdgeConv builds [x_j - x_i ; x_i] for all k neighbours j of every point i, a tensor of N * k edges, and runs
a 1x1 convolution, batch norm, a leaky ReLU and a maximum over it. With the weight split as W = [A B] the convolution is
``h_ij = a_j + c_i`` with ``a = A x`` and ``c = (B - A) x``: two products over N points. Batch norm followed by a leaky
ReLU is monotone in each channel, so the maximum over j moves inside (the minimum where the gain is negative), and the
batch statistics of all edges follow from sums over points. Nothing here is an approximation.

Inside, clouds are rows: (B, N, C), or (B * N, C) with neighbour indices into all rows of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.blocks import blocks_of_rows, in_degree, neighbour_max, neighbour_sum, transposed_sum, whole_clouds
from models.kernels import kernels_for
from models.layers import max_over_points
from models.norm import (
    Moments,
    across_processes,
    gradient_of_statistics,
    merge_moments,
    scale_and_shift,
    shares_statistics,
    sign_of_gain,
    update_running_statistics,
    uses_batch_statistics,
)
from models.pooling import leaky_relu_gradient
from models.precision import at_least_float32, without_autocast

# Elements of one block of edges in a two-layer EdgeConv.
_EDGE_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 25}


def edge_terms(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of ``weight [x_j - x_i ; x_i] = a_j + c_i``.

    Args:
        x: (P, C) rows.
        weight: (C_out, 2 C), of a 1x1 convolution without bias (batch norm follows).

    Returns:
        a, c: each (P, C_out).
    """
    neighbour, centre = weight.split(x.shape[1], dim=1)
    return F.linear(x, neighbour), F.linear(x, centre - neighbour)


def edge_moments(a: Tensor, c: Tensor, neighbours: Tensor, degree: Tensor) -> Moments:
    """Moments of ``h_ij = a_j + c_i`` over all edges, from sums over points, without gradient.

    With a and c centred, so that no large mean cancels, d_j how often j is chosen and S_i = sum_j a_j over the
    neighbours j of i: sum (h - mean)^2 = sum_j d_j a_j^2 + 2 sum_i c_i S_i + k sum_i c_i^2.

    Args:
        a: (P, C).
        c: (P, C).
        neighbours: (P, k).
        degree: (P,) d_j.
    """
    points, k = neighbours.shape
    mean_a, mean_c = degree @ a / (points * k), c.mean(0)
    scatter = torch.zeros_like(mean_a)
    for rows in blocks_of_rows(a):
        centred_a, centred_c = a[rows] - mean_a, c[rows] - mean_c
        scatter += degree[rows] @ centred_a.square_()
        twice = neighbour_sum(a, neighbours[rows]).sub_(mean_a, alpha=k).mul_(2).add_(centred_c, alpha=k)
        scatter += twice.mul_(centred_c).sum(0)
    return Moments(a.new_full((), points * k), mean_a + mean_c, scatter.clamp_min_(0))


class _EdgeMoments(torch.autograd.Function):
    """Mean and scatter of ``edge_moments``, with gradient.

    The derivatives of the scatter are 2 (d_j a_j + T_j) for a_j, with T_j = sum of the c_i that chose j, and
    2 (S_i + k c_i) for c_i, a and c centred.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, c: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        degree = in_degree(neighbours).to(a.dtype)
        moments = edge_moments(a, c, neighbours, degree)
        ctx.save_for_backward(a, c, neighbours, degree, moments.mean)
        return moments.mean, moments.scatter

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_scatter: Tensor) -> tuple[Tensor, Tensor, None]:
        a, c, neighbours, degree, mean = ctx.saved_tensors
        points, k = neighbours.shape
        slope = 2 * grad_scatter
        return *gradients_of_all_edges(a, c, neighbours, degree, slope, grad_mean / (points * k) - slope * mean), None


def gradients_of_all_edges(
    a: Tensor, c: Tensor, neighbours: Tensor, degree: Tensor, slope: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a and c where that with respect to each edge is ``slope * (a_j + c_i) + constant``.

    Args:
        a: (P, C).
        c: (P, C).
        neighbours: (P, k).
        degree: (P,) how often each row is a neighbour.
        slope: (C,).
        constant: (C,).

    Returns:
        ``slope (d_j a_j + T_j) + d_j constant``, T_j being the sum of the c_i that chose j, and
        ``slope (S_i + k c_i) + k constant``, S_i being the sum of the neighbours' a_j; each (P, C).
    """
    k = neighbours.shape[1]
    grad_a, grad_c = transposed_sum(c, neighbours), neighbour_sum(a, neighbours)
    for rows in blocks_of_rows(a):
        grad_a[rows].mul_(slope).addcmul_(degree[rows, None], torch.addcmul(constant, a[rows], slope))
        grad_c[rows].add_(c[rows], alpha=k).mul_(slope).add_(constant, alpha=k)
    return grad_a, grad_c


def edge_extremes(
    a: Tensor, c: Tensor, neighbours: Tensor, sign: Tensor, *, with_moments: bool
) -> tuple[Tensor, Tensor, Moments | None]:
    """Extremes over the neighbours j of ``h_ij = a_j + c_i``, and its moments, without gradient.

    Args:
        a: (P, C).
        c: (P, C).
        neighbours: (P, k).
        sign: (C,) of 1 and -1, where the minimum is wanted.
        with_moments: whether those are wanted.

    Returns:
        Extremes (P, C), the rows j that they come from (P, C), and the moments over all edges or None.
    """
    if kernels := kernels_for(a):
        about = a.mean(0) + c.mean(0) if with_moments else None  # close to the mean, so that no digits cancel
        extremes, places, total, squares = kernels.edge_extremes(a, c, neighbours, sign, about=about)
        if about is None:
            return extremes, places, None
        offset = total / neighbours.numel()
        scatter = (squares - total * offset).clamp_min_(0)
        return extremes, places, Moments(a.new_full((), neighbours.numel()), about + offset, scatter)
    moments = edge_moments(a, c, neighbours, in_degree(neighbours).to(a.dtype)) if with_moments else None
    largest, places = neighbour_max(a, neighbours, sign)
    return largest.add_(c), places, moments


def edge_gradients(
    a: Tensor, c: Tensor, neighbours: Tensor, slope: Tensor, constant: Tensor, peaks: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """``gradients_of_all_edges``, and at the edge of each extreme (its row j in ``places``) also ``peaks``, (P, C)."""
    if kernels := kernels_for(a):
        return kernels.edge_gradients(a, c, neighbours, slope, constant, peaks, places)
    grad_a, grad_c = gradients_of_all_edges(a, c, neighbours, in_degree(neighbours).to(a.dtype), slope, constant)
    return grad_a.scatter_add_(0, places.to(torch.int64), peaks), grad_c.add_(peaks)


class _EdgeConv(torch.autograd.Function):
    """See ``edge_conv``. Inputs: rows, the convolution's weight, the gain, the bias; the rest has no gradient.

    A block of clouds at a time, so that a and c stay in a cache. Between forward and backward only the extremes
    ``e_i = a_j + c_i`` and their places are kept; a and c are two small products and are taken again.

    The gradient with respect to h_ij is ``scale * g_i`` where ij is an extreme, g being that with respect to the
    normalised value, and everywhere ``slope * h_ij + constant`` from the batch statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        norm: nn.BatchNorm2d,
        slope: float,
        neighbours: Tensor,
        clouds: int,
        trains: bool,
    ) -> Tensor:
        batch, blocks = uses_batch_statistics(norm), whole_clouds(x, clouds, len(weight))
        # For any m the layer is W [x_j - x_i ; x_i - m] + B m, and with the mean as m no large offset costs digits.
        offset = x.mean(0)
        constant = F.linear(offset, weight[:, len(offset) :])
        sign = sign_of_gain(weight.new_ones(len(weight)) if gain is None else gain).to(x.dtype)
        extremes = x.new_empty(len(x), len(weight))
        longest = max(rows.stop - rows.start for rows in blocks)
        places = (
            torch.empty_like(extremes, dtype=torch.int16 if longest <= 1 << 15 else torch.int32) if trains else None
        )
        parts = []
        for rows in blocks:
            near = neighbours[rows] - rows.start
            a, c = edge_terms(x[rows] - offset, weight)
            extremes[rows], chosen, moments = edge_extremes(a, c, near, sign, with_moments=batch)
            parts.append(moments)
            if trains:
                places[rows] = chosen
        if batch:
            moments = merge_moments(*map(torch.stack, zip(*parts, strict=True)))
            moments = across_processes(moments._replace(mean=moments.mean + constant), norm)
            mean, variance, count = moments.mean, moments.scatter / moments.count, moments.count
            update_running_statistics(norm, mean, variance, count)
        else:
            mean, variance, count = norm.running_mean, norm.running_var, None
        mean = mean - constant
        scale, shift = scale_and_shift(norm, mean, variance)
        out = torch.empty_like(extremes) if trains else extremes
        for rows in blocks_of_rows(out):
            out[rows] = F.leaky_relu_(torch.addcmul(shift, extremes[rows], scale), slope)
        if trains:
            ctx.save_for_backward(
                x, weight, gain, bias, neighbours, extremes, places, offset, scale, shift, mean, variance, count
            )
            ctx.norm, ctx.slope, ctx.clouds = norm, slope, clouds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, bias, neighbours, extremes, places, offset, scale, shift, mean, variance, count = (
            ctx.saved_tensors
        )

        def normalised_gradient(rows: slice) -> Tensor:
            return leaky_relu_gradient(grad[rows], torch.addcmul(shift, extremes[rows], scale), ctx.slope)

        sum_grad, sum_grad_h = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows in blocks_of_rows(extremes):
            inner = normalised_gradient(rows)
            sum_grad += inner.sum(0)
            sum_grad_h += inner.mul_(extremes[rows] - mean).sum(0)
        slope, constant, grad_gain = gradient_of_statistics(
            ctx.norm, sum_grad, sum_grad_h, scale=scale, mean=mean, variance=variance, count=count
        )
        width = x.shape[1]
        of_neighbour, of_centre = weight[:, :width], weight[:, width:] - weight[:, :width]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sum_a, sum_c = (weight.new_zeros(len(weight), width) for _ in range(2))
        # What batch norm passes on sums to zero over its batch; rounding would come back times the offset.
        sums_to_zero = count is not None and not shares_statistics(ctx.norm)
        total = torch.zeros_like(scale)
        for rows in whole_clouds(x, ctx.clouds, len(weight)):
            centred = x[rows] - offset
            grad_c = normalised_gradient(rows).mul_(scale)
            if count is None:
                grad_a = torch.zeros_like(grad_c).scatter_add_(0, places[rows].to(torch.int64), grad_c)
            else:
                near = neighbours[rows] - rows.start
                a, c = edge_terms(centred, weight)
                grad_a, grad_c = edge_gradients(a, c, near, slope, constant, grad_c, places[rows])
            if not sums_to_zero:
                total += grad_c.sum(0)
            sum_a.addmm_(grad_a.T, centred)
            sum_c.addmm_(grad_c.T, centred)
            if grad_x is not None:
                grad_x[rows] = (grad_a @ of_neighbour).addmm_(grad_c, of_centre)
        grad_weight = torch.cat([sum_a - sum_c, sum_c + torch.outer(total, offset)], dim=1)
        return (
            *(grad_x, grad_weight, None if gain is None else grad_gain, None if bias is None else sum_grad),
            *(None, None, None, None, None),
        )


def first_edge_layer(x: Tensor, neighbours: Tensor, block: nn.Sequential) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split an EdgeConv's first layer into parts of which no edge is built.

    Args:
        x: (P, C) rows.
        neighbours: (P, k).
        block: Conv2d (1x1, 2 C channels), batch norm, activation. Running statistics are updated as the module would.

    Returns:
        a (P, C_out), c (P, C_out), scale (C_out,), shift (C_out,) such that the normalised value of edge ij is
        ``scale * (a_j + c_i) + shift``.
    """
    weight, norm = block[0].weight.flatten(1), block[1]
    if not uses_batch_statistics(norm):
        return *edge_terms(x, weight), *scale_and_shift(norm, norm.running_mean, norm.running_var)
    # For any m the layer is W [x_j - x_i ; x_i - m] + B m, and with the mean as m no large offset costs digits.
    offset = x.detach().mean(0)
    a, c = edge_terms(x - offset, weight)
    constant = F.linear(offset, weight[:, len(offset) :])
    mean, scatter = _EdgeMoments.apply(a, c, neighbours)
    moments = across_processes(Moments(a.new_full((), neighbours.numel()), mean + constant, scatter), norm)
    variance = moments.scatter / moments.count
    update_running_statistics(norm, moments.mean, variance, moments.count)
    return a, c, *scale_and_shift(norm, moments.mean - constant, variance)


def edge_conv(x: Tensor, neighbours: Tensor, block: nn.Sequential, *, clouds: int = 1) -> Tensor:
    """One-layer EdgeConv: max over neighbours j of ``block([x_j - x_i ; x_i])``.

    Args:
        x: (P, C) rows.
        neighbours: (P, k) indices into the rows; those of a row are of its cloud.
        block: Conv2d (1x1, 2 C channels), batch norm, leaky ReLU. Running statistics are updated as the module would.
        clouds: how many clouds the rows are, each P / clouds of them.

    Returns:
        (P, C_out), at least float32: a_j + c_i is a small difference of large numbers, which half precision would lose.

    Raises:
        ValueError: the rows are not so many clouds of one size.
    """
    if len(x) % clouds:
        raise ValueError(f"{len(x)} rows are not {clouds} clouds of one size")
    conv, norm, activation = block
    with without_autocast(x.device):
        return _EdgeConv.apply(
            *(at_least_float32(x), conv.weight.flatten(1), norm.weight, norm.bias),
            *(norm, activation.negative_slope, neighbours, clouds, torch.is_grad_enabled()),
        )


def edge_conv_two_layers(x: Tensor, neighbours: Tensor, first: nn.Sequential, second: nn.Sequential) -> Tensor:
    """Two-layer EdgeConv: max over neighbours j of ``second(first([x_j - x_i ; x_i]))``.

    The first layer needs no edges. The second is computed in blocks of points that the backward pass computes again;
    its batch statistics cover all edges and come from a first pass over the blocks, which accumulates the mean m and
    the scatter S of the first layer's output: the mean of W2 y is W2 m, its centred sum of squares diag(W2 S W2^T).

    Args:
        x: (P, C) rows.
        neighbours: (P, k).
        first: Conv2d (1x1, 2 C channels), batch norm, activation.
        second: Conv2d (1x1), batch norm, monotone activation.

    Returns:
        (P, C_out), at least float32.
    """
    with without_autocast(x.device):
        a, c, scale, shift = first_edge_layer(at_least_float32(x), neighbours, first)
        weight, norm = second[0].weight.flatten(1), second[1]
        # Folding the first norm into a and c leaves one gather, one sum and the activation per edge.
        a, c = a * scale, torch.addcmul(shift, c, scale)
        width = max(weight.shape)
        rows = max(1, _EDGE_BLOCK.get(x.device.type, 1 << 24) // (neighbours.shape[1] * width))
        blocks = list(zip(c.split(rows), neighbours.split(rows), strict=True))

        def hidden(centre: Tensor, index: Tensor) -> Tensor:  # (p, C1), (p, k) -> (p * k, C1)
            edges = F.embedding(index, a) + centre[:, None, :]
            return first[2](edges).flatten(0, 1)

        def block_moments(centre: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            h = hidden(centre, index)
            mean = h.mean(0)
            h = h - mean
            return mean, h.T @ h

        def block_extreme(centre: Tensor, index: Tensor) -> Tensor:
            y = F.linear(hidden(centre, index), weight * sign[:, None])
            return max_over_points(y.unflatten(0, index.shape))

        def recomputed(function, *inputs):
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

        if uses_batch_statistics(norm):
            parts = [recomputed(block_moments, centre, index) for centre, index in blocks]
            counts = torch.stack([a.new_full((), index.numel()) for _, index in blocks])
            means, scatters = (torch.stack(part) for part in zip(*parts, strict=True))
            moments = across_processes(merge_moments(counts, means, scatters), norm)
            mean = weight @ moments.mean
            variance = ((weight @ moments.scatter) * weight).sum(1).clamp_min(0) / moments.count
            update_running_statistics(norm, mean, variance, moments.count)
        else:
            mean, variance = norm.running_mean, norm.running_var
        scale, shift = scale_and_shift(norm, mean, variance)
        sign = sign_of_gain(scale)
        extreme = torch.cat([recomputed(block_extreme, centre, index) for centre, index in blocks]) * sign
        return second[2](torch.addcmul(shift, extreme, scale))
