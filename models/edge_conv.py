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
from torch.utils.checkpoint import checkpoint

from models.blocks import blocks_of_rows, in_degree, neighbour_max, neighbour_sum, transposed_sum
from models.layers import max_over_points
from models.norm import (
    Moments,
    across_processes,
    merge_moments,
    scale_and_shift,
    sign_of_gain,
    update_running_statistics,
    uses_batch_statistics,
)
from models.pooling import leaky_relu_gradient
from models.precision import at_least_float32, without_autocast

# Elements of one block of edges in a two-layer EdgeConv.
_EDGE_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 25}


def edge_terms(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The terms of ``conv([x_j - x_i ; x_i]) = a_j + c_i``.

    Args:
        x: (P, C) rows.
        conv: 1x1 convolution of 2 C channels, without bias (batch norm follows).

    Returns:
        a, c: each (P, C_out).
    """
    weight = conv.weight.flatten(1)
    neighbour, centre = weight.split(x.shape[1], dim=1)
    return F.linear(x, neighbour), F.linear(x, centre - neighbour)


class _EdgeMoments(torch.autograd.Function):
    """Mean and centred sum of squares of ``h_ij = a_j + c_i`` over all edges, from sums over points.

    With a and c centred, so that no large mean cancels, d_j how often j is chosen and S_i = sum_j a_j:
    sum (h - mean)^2 = sum_j d_j a_j^2 + 2 sum_i c_i S_i + k sum_i c_i^2.
    The derivatives are 2 (d_j a_j + T_j) for a_j, with T_j = sum of the c_i that chose j, and 2 (S_i + k c_i) for c_i.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, c: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        points, k = neighbours.shape
        degree = in_degree(neighbours).to(a.dtype)
        mean_a, mean_c = degree @ a / (points * k), c.mean(0)
        scatter = torch.zeros_like(mean_a)
        for rows in blocks_of_rows(a):
            centred_a, centred_c = a[rows] - mean_a, c[rows] - mean_c
            scatter += degree[rows] @ centred_a.square_()
            twice = neighbour_sum(a, neighbours[rows]).sub_(mean_a, alpha=k).mul_(2).add_(centred_c, alpha=k)
            scatter += twice.mul_(centred_c).sum(0)
        ctx.save_for_backward(a, c, neighbours, degree, mean_a + mean_c)
        return mean_a + mean_c, scatter.clamp_min_(0)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_scatter: Tensor) -> tuple[Tensor, Tensor, None]:
        a, c, neighbours, degree, mean = ctx.saved_tensors
        points, k = neighbours.shape
        twice = 2 * grad_scatter
        grad_a, grad_c = transposed_sum(c, neighbours), neighbour_sum(a, neighbours)
        constant_a = grad_mean / (points * k) - twice * mean
        constant_c = grad_mean / points - twice * mean * k
        for rows in blocks_of_rows(a):
            grad_a[rows].mul_(twice).addcmul_(degree[rows, None], torch.addcmul(constant_a, a[rows], twice))
            grad_c[rows].add_(c[rows], alpha=k).mul_(twice).add_(constant_c)
        return grad_a, grad_c, None


class _LargestEdge(torch.autograd.Function):
    """Maximum over neighbours j of ``act(scale * (a_j + c_i) + shift)``: extreme, affine map and activation in one.

    Only a_extreme + c and the places of the extremes are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, c: Tensor, scale: Tensor, shift: Tensor, neighbours: Tensor, slope: float
    ) -> Tensor:
        edge, chosen = neighbour_max(a, neighbours, sign_of_gain(scale))
        out = torch.empty_like(edge)
        for rows in blocks_of_rows(edge):
            edge[rows].add_(c[rows])
            out[rows] = F.leaky_relu_(torch.addcmul(shift, edge[rows], scale), slope)
        ctx.save_for_backward(edge, chosen, scale, shift)
        ctx.slope = slope
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        edge, chosen, scale, shift = ctx.saved_tensors
        grad_a, grad_c = torch.zeros_like(grad), torch.empty_like(grad)
        grad_scale, grad_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        for rows in blocks_of_rows(edge):
            inner = leaky_relu_gradient(grad[rows], torch.addcmul(shift, edge[rows], scale), ctx.slope)
            grad_shift += inner.sum(0)
            grad_scale += (inner * edge[rows]).sum(0)
            grad_c[rows] = inner.mul_(scale)
            grad_a.scatter_add_(0, chosen[rows].to(torch.int64), inner)
        return grad_a, grad_c, grad_scale, grad_shift, None, None


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
    conv, norm = block[0], block[1]
    if not uses_batch_statistics(norm):
        return *edge_terms(x, conv), *scale_and_shift(norm, norm.running_mean, norm.running_var)
    # For any m the layer is W [x_j - x_i ; x_i - m] + B m, and with the mean as m no large offset costs digits.
    offset = x.detach().mean(0)
    a, c = edge_terms(x - offset, conv)
    constant = F.linear(offset, conv.weight.flatten(1)[:, len(offset) :])
    mean, scatter = _EdgeMoments.apply(a, c, neighbours)
    moments = across_processes(Moments(a.new_full((), neighbours.numel()), mean + constant, scatter), norm)
    variance = moments.scatter / moments.count
    update_running_statistics(norm, moments.mean, variance, moments.count)
    return a, c, *scale_and_shift(norm, moments.mean - constant, variance)


def edge_conv(x: Tensor, neighbours: Tensor, block: nn.Sequential) -> Tensor:
    """One-layer EdgeConv: max over neighbours j of ``block([x_j - x_i ; x_i])``.

    Args:
        x: (P, C) rows.
        neighbours: (P, k) indices into the rows.
        block: Conv2d (1x1, 2 C channels), batch norm, leaky ReLU.

    Returns:
        (P, C_out), at least float32: a_j + c_i is a small difference of large numbers, which half precision would lose.
    """
    with without_autocast(x.device):
        a, c, scale, shift = first_edge_layer(at_least_float32(x), neighbours, block)
        return _LargestEdge.apply(a, c, scale, shift, neighbours, block[2].negative_slope)


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
