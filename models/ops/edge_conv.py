"""EdgeConv of DGCNN (arXiv:1801.07829) without edge tensors.

A textbook EdgeConv builds [x_j - x_i ; x_i] for all k neighbors j of every point i, a tensor of N * k edges, and runs
a 1x1 convolution, batch norm, a leaky ReLU and a maximum over it. With the weight split as W = [A B] the convolution is
``h_ij = a_j + c_i`` with ``a = A x`` and ``c = (B - A) x``: two products over N points. Batch norm followed by a leaky
ReLU is monotone in each channel, so the maximum over j moves inside (the minimum where the gain is negative), and the
batch statistics of all edges follow from sums over points. Nothing here is an approximation.

The points of a batch are rows (P, C) with P = B * N, and neighbors are indices (P, k) into all rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.ops.backend import backend_for
from models.ops.batch_norm import (
    Moments,
    across_processes,
    gradient_of_statistics,
    merge_moments,
    running_statistics,
    scale_and_shift,
    shares_statistics,
    sign_of_gain,
    update_running_statistics,
    uses_batch_statistics,
)
from models.ops.layers import max_over_points, parts_of
from models.ops.pooling import leaky_relu_gradient
from models.ops.precision import at_least_float32, exact_matmul, exact_products, without_autocast
from models.ops.tiles import (
    in_degree,
    is_exporting,
    neighbor_max,
    neighbor_sum,
    tiles_of_rows,
    transposed_sum,
    whole_clouds,
)

# Elements per tile of edges in a two-layer EdgeConv.
_EDGE_TILE = {"cpu": 1 << 22, "cuda": 1 << 25}


def edge_terms(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the terms of ``weight [x_j - x_i ; x_i] = a_j + c_i``.

    Args:
        x: (P, C) rows.
        weight: (C_out, 2 C), of a 1x1 convolution without bias (batch norm follows).

    Returns:
        a, c: each (P, C_out).
    """
    neighbor, center = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
    return exact_matmul(x, neighbor.T), exact_matmul(x, (center - neighbor).T)


def center_of(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean m of rows (P, C), without gradient, and B m for a weight [A B], (C_out,).

    For any m an EdgeConv equals ``W [x_j - x_i ; x_i - m] + B m``; with the mean, a large offset costs no digits.
    """
    mean = x.detach().mean(0)
    return mean, exact_matmul(mean[None], weight[:, len(mean) :].T)[0]


def edge_moments(a: Tensor, c: Tensor, neighbors: Tensor, degree: Tensor) -> Moments:
    """Compute the moments of ``h_ij = a_j + c_i`` over all edges from sums over points, without gradient.

    Let a and c be centered (a large mean would cancel digits), d_j the number of points that have j as a neighbor, and
    S_i the sum of a_j over the neighbors j of i. Then
    sum (h - mean)^2 = sum_j d_j a_j^2 + 2 sum_i c_i S_i + k sum_i c_i^2.

    Args:
        a: (P, C).
        c: (P, C).
        neighbors: (P, k).
        degree: (P,) d_j.
    """
    points, k = neighbors.shape
    mean_a, mean_c = degree @ a / (points * k), c.mean(0)
    scatter = torch.zeros_like(mean_a)
    for rows in tiles_of_rows(a):
        centered_a, centered_c = a[rows] - mean_a, c[rows] - mean_c
        scatter += degree[rows] @ centered_a.square_()
        twice = neighbor_sum(a, neighbors[rows]).sub_(mean_a, alpha=k).mul_(2).add_(centered_c, alpha=k)
        scatter += twice.mul_(centered_c).sum(0)
    return Moments(a.new_full((), points * k), mean_a + mean_c, scatter.clamp_min_(0))


class _EdgeMoments(torch.autograd.Function):
    """Mean and scatter of ``edge_moments``, with gradient.

    With a and c centered, the derivatives of the scatter are 2 (d_j a_j + T_j) with respect to a_j, T_j being the sum
    of c_i over the points i that have j as a neighbor, and 2 (S_i + k c_i) with respect to c_i.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, c: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
        degree = in_degree(neighbors).to(a.dtype)
        moments = edge_moments(a, c, neighbors, degree)
        ctx.save_for_backward(a, c, neighbors, degree, moments.mean)
        return moments.mean, moments.scatter

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_scatter: Tensor) -> tuple[Tensor, Tensor, None]:
        a, c, neighbors, degree, mean = ctx.saved_tensors
        points, k = neighbors.shape
        grad_scale = 2 * grad_scatter
        constant = grad_mean / (points * k) - grad_scale * mean
        return *gradients_of_all_edges(a, c, neighbors, degree, grad_scale, constant), None


def gradients_of_all_edges(
    a: Tensor, c: Tensor, neighbors: Tensor, degree: Tensor, grad_scale: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a and c if that of each edge is ``grad_scale * (a_j + c_i) + constant``.

    Args:
        a: (P, C).
        c: (P, C).
        neighbors: (P, k).
        degree: (P,) how often each row is a neighbor.
        grad_scale: (C,).
        constant: (C,).

    Returns:
        ``grad_scale (d_j a_j + T_j) + d_j constant`` and ``grad_scale (S_i + k c_i) + k constant``, each (P, C), where
        T_j sums c_i over the points i that have j as a neighbor, and S_i sums a_j over the neighbors j of i.
    """
    k = neighbors.shape[1]
    grad_a, grad_c = transposed_sum(c, neighbors), neighbor_sum(a, neighbors)
    for rows in tiles_of_rows(a):
        grad_a[rows].mul_(grad_scale).addcmul_(degree[rows, None], torch.addcmul(constant, a[rows], grad_scale))
        grad_c[rows].add_(c[rows], alpha=k).mul_(grad_scale).add_(constant, alpha=k)
    return grad_a, grad_c


def edge_extremes(
    a: Tensor, c: Tensor, neighbors: Tensor, sign: Tensor, *, with_moments: bool
) -> tuple[Tensor, Tensor, Moments | None]:
    """Compute the extremes of ``h_ij = a_j + c_i`` over the neighbors j, and its moments, without gradient.

    Args:
        a: (P, C).
        c: (P, C).
        neighbors: (P, k).
        sign: (C,) of 1 and -1; -1 computes the minimum instead of the maximum.
        with_moments: whether to compute the moments.

    Returns:
        Extremes (P, C), the rows j that they come from (P, C), and the moments over all edges or None.
    """
    if kernels := backend_for(a):
        about = a.mean(0) + c.mean(0) if with_moments else None  # near the mean, so that no digits cancel
        extremes, argmax, total, squares = kernels.edge_extremes(a, c, neighbors, sign, about=about)
        if about is None:
            return extremes, argmax, None
        offset = total / neighbors.numel()
        scatter = (squares - total * offset).clamp_min_(0)  # (C,)
        return extremes, argmax, Moments(a.new_full((), neighbors.numel()), about + offset, scatter)
    moments = edge_moments(a, c, neighbors, in_degree(neighbors).to(a.dtype)) if with_moments else None
    largest, argmax = neighbor_max(a, neighbors, sign)
    return largest.add_(c), argmax, moments


def edge_gradients(
    a: Tensor,
    c: Tensor,
    neighbors: Tensor,
    grad_scale: Tensor,
    constant: Tensor,
    grad_at_argmax: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute ``gradients_of_all_edges``, plus ``grad_at_argmax`` (P, C) at the edges to the rows ``argmax``."""
    if kernels := backend_for(a):
        return kernels.edge_gradients(a, c, neighbors, grad_scale, constant, grad_at_argmax, argmax)
    grad_a, grad_c = gradients_of_all_edges(a, c, neighbors, in_degree(neighbors).to(a.dtype), grad_scale, constant)
    return grad_a.scatter_add_(0, argmax.to(torch.int64), grad_at_argmax), grad_c.add_(grad_at_argmax)


class _EdgeConv(torch.autograd.Function):
    """Autograd function of ``edge_conv``, differentiable with respect to rows, weight, gain and bias.

    It processes a tile of clouds at a time, so that a and c stay in a cache. For the backward pass it saves only the
    extremes ``e_i = a_j + c_i`` and their argmax; a and c are two small products and are recomputed.

    The gradient with respect to h_ij is ``grad_scale * h_ij + constant`` through the batch statistics, plus
    ``scale * g_i`` if h_ij is an extreme, g being the gradient with respect to the normalized value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        norm: nn.BatchNorm2d,
        negative_slope: float,
        neighbors: Tensor,
        clouds: int,
        trains: bool,
    ) -> Tensor:
        batch, tiles = uses_batch_statistics(norm), whole_clouds(x, clouds, len(weight))
        offset, constant = center_of(x, weight)
        sign = sign_of_gain(weight.new_ones(len(weight)) if gain is None else gain).to(x.dtype)  # (C_out,)
        extremes = x.new_empty(len(x), len(weight))  # (P, C_out)
        longest = max(rows.stop - rows.start for rows in tiles)
        argmax = (
            torch.empty_like(extremes, dtype=torch.int16 if longest <= 1 << 15 else torch.int32) if trains else None
        )
        parts = []
        for rows in tiles:
            local_neighbors = neighbors[rows] - rows.start
            a, c = edge_terms(x[rows] - offset, weight)  # (p, C_out) each
            extremes[rows], chosen, moments = edge_extremes(a, c, local_neighbors, sign, with_moments=batch)
            parts.append(moments)
            if argmax is not None:
                argmax[rows] = chosen
        if batch:
            moments = merge_moments(*map(torch.stack, zip(*parts, strict=True)))
            moments = across_processes(moments._replace(mean=moments.mean + constant), norm)
            mean, variance, count = moments.mean, moments.scatter / moments.number, moments.number
            update_running_statistics(norm, mean, variance, count)
        else:
            (mean, variance), count = running_statistics(norm), None
        mean = mean - constant
        scale, shift = scale_and_shift(norm, mean, variance)  # (C_out,) each
        out = torch.empty_like(extremes) if trains else extremes
        for rows in tiles_of_rows(out):
            out[rows] = F.leaky_relu_(torch.addcmul(shift, extremes[rows], scale), negative_slope)
        if trains:
            ctx.save_for_backward(
                x, weight, gain, bias, neighbors, extremes, argmax, offset, scale, shift, mean, variance, count
            )
            ctx.norm, ctx.negative_slope, ctx.clouds = norm, negative_slope, clouds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with exact_products(grad.device):
            return _EdgeConv.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of every input of ``forward``."""
        x, weight, gain, bias, neighbors, extremes, argmax, offset, scale, shift, mean, variance, count = (
            ctx.saved_tensors
        )

        def normalized_gradient(rows: slice) -> Tensor:
            return leaky_relu_gradient(grad[rows], torch.addcmul(shift, extremes[rows], scale), ctx.negative_slope)

        sum_grad, sum_grad_h = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows in tiles_of_rows(extremes):
            inner = normalized_gradient(rows)  # (p, C_out)
            sum_grad += inner.sum(0)
            sum_grad_h += inner.mul_(extremes[rows] - mean).sum(0)
        grad_scale, constant, grad_gain = gradient_of_statistics(
            ctx.norm, sum_grad, sum_grad_h, scale=scale, mean=mean, variance=variance, count=count
        )
        width = x.shape[1]
        of_neighbor, of_center = weight[:, :width], weight[:, width:] - weight[:, :width]  # (C_out, C) each
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sum_a, sum_c = (weight.new_zeros(len(weight), width) for _ in range(2))
        # Batch norm makes this gradient sum to zero over its batch; rounding errors would be multiplied by the offset.
        sums_to_zero = count is not None and not shares_statistics(ctx.norm)
        total = torch.zeros_like(scale)
        for rows in whole_clouds(x, ctx.clouds, len(weight)):
            centered = x[rows] - offset  # (p, C)
            grad_c = normalized_gradient(rows).mul_(scale)  # (p, C_out)
            if count is None:
                grad_a = torch.zeros_like(grad_c).scatter_add_(0, argmax[rows].to(torch.int64), grad_c)
            else:
                local_neighbors = neighbors[rows] - rows.start
                a, c = edge_terms(centered, weight)
                grad_a, grad_c = edge_gradients(a, c, local_neighbors, grad_scale, constant, grad_c, argmax[rows])
            if not sums_to_zero:
                total += grad_c.sum(0)
            sum_a.addmm_(grad_a.T, centered)  # (C_out, C)
            sum_c.addmm_(grad_c.T, centered)
            if grad_x is not None:
                grad_x[rows] = (grad_a @ of_neighbor).addmm_(grad_c, of_center)  # (p, C)
        grad_weight = torch.cat([sum_a - sum_c, sum_c + torch.outer(total, offset)], dim=1)
        return (
            *(grad_x, grad_weight, None if gain is None else grad_gain, None if bias is None else sum_grad),
            *(None, None, None, None, None),
        )


def first_edge_layer(x: Tensor, neighbors: Tensor, block: nn.Sequential) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the first layer of an EdgeConv as terms per point, without building edges.

    Args:
        x: (P, C) rows.
        neighbors: (P, k).
        block: Conv2d (1x1, 2 C channels), batch norm, activation; running statistics are updated as in the module.

    Returns:
        a (P, C_out), c (P, C_out), scale (C_out,), shift (C_out,) such that the normalized value of edge ij is
        ``scale * (a_j + c_i) + shift``.
    """
    weight, norm, _ = parts_of(block)
    if not uses_batch_statistics(norm):
        return *edge_terms(x, weight), *scale_and_shift(norm, *running_statistics(norm))
    offset, constant = center_of(x, weight)
    a, c = edge_terms(x - offset, weight)  # (P, C_out) each
    mean, scatter = _EdgeMoments.apply(a, c, neighbors)
    moments = across_processes(Moments(a.new_full((), neighbors.numel()), mean + constant, scatter), norm)
    variance = moments.scatter / moments.number
    update_running_statistics(norm, moments.mean, variance, moments.number)
    return a, c, *scale_and_shift(norm, moments.mean - constant, variance)


def _edge_conv_of_plain_operations(x: Tensor, neighbors: Tensor, block: nn.Sequential) -> Tensor:
    """Compute ``edge_conv`` with running statistics, in operations that torch.export traces for any number of rows."""
    weight, norm, activation = parts_of(block)
    offset, constant = center_of(x, weight)
    a, c = edge_terms(x - offset, weight)  # (P, C_out) each
    mean, variance = running_statistics(norm)
    scale, shift = scale_and_shift(norm, mean - constant, variance)
    sign = sign_of_gain(scale)
    extremes = F.embedding(neighbors, a * sign).amax(1) * sign + c  # (P, k, C_out) -> (P, C_out)
    return activation(torch.addcmul(shift, extremes, scale))


def edge_conv(x: Tensor, neighbors: Tensor, block: nn.Sequential, *, clouds: int = 1) -> Tensor:
    """Apply a one-layer EdgeConv: max over neighbors j of ``block([x_j - x_i ; x_i])``.

    Args:
        x: (P, C) rows.
        neighbors: (P, k) indices of rows of the same cloud.
        block: Conv2d (1x1, 2 C channels), batch norm, leaky ReLU; running statistics are updated as in the module.
        clouds: number of clouds, of P / clouds rows each.

    Returns:
        (P, C_out), at least float32: a_j + c_i is a small difference of large numbers, which half precision would lose.

    Raises:
        ValueError: the rows do not divide into clouds of equal size.
    """
    if x.shape[0] % clouds:
        raise ValueError(f"{len(x)} rows are not {clouds} clouds of equal size")
    weight, norm, activation = parts_of(block)
    with without_autocast(x.device), exact_products(x.device):
        x = at_least_float32(x)
        if is_exporting() and not uses_batch_statistics(norm):
            return _edge_conv_of_plain_operations(x, neighbors, block)
        return _EdgeConv.apply(
            *(x, weight, norm.weight, norm.bias),
            *(norm, activation.negative_slope, neighbors, clouds, torch.is_grad_enabled()),
        )


def edge_conv_two_layers(x: Tensor, neighbors: Tensor, first: nn.Sequential, second: nn.Sequential) -> Tensor:
    """Apply a two-layer EdgeConv: max over neighbors j of ``second(first([x_j - x_i ; x_i]))``.

    The first layer needs no edges. The second is computed in tiles of points, which the backward pass recomputes. Its
    batch statistics cover all edges: an extra pass over the tiles accumulates the mean m and the scatter S of the first
    layer's output y, so that W2 y has the mean W2 m and the centered sum of squares diag(W2 S W2^T).

    Args:
        x: (P, C) rows.
        neighbors: (P, k).
        first: Conv2d (1x1, 2 C channels), batch norm, activation.
        second: Conv2d (1x1), batch norm, monotone activation.

    Returns:
        (P, C_out), at least float32.
    """
    with without_autocast(x.device), exact_products(x.device):
        a, c, scale, shift = first_edge_layer(at_least_float32(x), neighbors, first)
        weight, norm, activation = parts_of(second)
        # Folding the first norm into a and c leaves one gather, one sum and the activation per edge.
        a, c = a * scale, torch.addcmul(shift, c, scale)
        width = max(weight.shape)
        rows = max(1, _EDGE_TILE.get(x.device.type, 1 << 24) // (neighbors.shape[1] * width))
        tiles = [(c, neighbors)] if is_exporting() else list(zip(c.split(rows), neighbors.split(rows), strict=True))

        def hidden(center: Tensor, index: Tensor) -> Tensor:  # (p, C1), (p, k) -> (p * k, C1)
            edges = F.embedding(index, a) + center[:, None, :]  # (p, k, C1)
            return first[2](edges).flatten(0, 1)

        def tile_moments(center: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            h = hidden(center, index)  # (p * k, C1)
            mean = h.mean(0)
            h = h - mean
            return mean, exact_matmul(h.T, h)  # (C1,), (C1, C1)

        def tile_extreme(center: Tensor, index: Tensor) -> Tensor:
            y = exact_matmul(hidden(center, index), (weight * sign[:, None]).T)  # (p * k, C_out)
            return max_over_points(y.unflatten(0, index.shape))  # (p, C_out)

        def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
            if is_exporting():
                return function(*inputs)
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

        if uses_batch_statistics(norm):
            parts = [recomputed(tile_moments, center, index) for center, index in tiles]
            counts = torch.stack([a.new_full((), index.numel()) for _, index in tiles])
            means, scatters = (torch.stack(part) for part in zip(*parts, strict=True))
            moments = across_processes(merge_moments(counts, means, scatters), norm)
            mean = weight @ moments.mean  # (C_out,)
            variance = (exact_matmul(weight, moments.scatter) * weight).sum(1).clamp_min(0) / moments.number
            update_running_statistics(norm, mean, variance, moments.number)
        else:
            mean, variance = running_statistics(norm)
        scale, shift = scale_and_shift(norm, mean, variance)  # (C_out,) each
        sign = sign_of_gain(scale)
        extreme = torch.cat([recomputed(tile_extreme, center, index) for center, index in tiles]) * sign
        return activation(torch.addcmul(shift, extreme, scale))
