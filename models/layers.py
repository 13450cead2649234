"""Layers of DGCNN (arXiv:1801.07829): exact k nearest neighbours and EdgeConv without edge tensors.

A textbook EdgeConv builds [x_j - x_i ; x_i] for all k neighbours j of every point i, a tensor of N * k edges, and runs
a 1x1 convolution, batch norm, a leaky ReLU and a maximum over it. With the weight split as W = [A B] the convolution is
``h_ij = a_j + c_i`` with ``a = A x`` and ``c = (B - A) x``: two products over N points. Batch norm followed by a leaky
ReLU is monotone in each channel, so the maximum over j moves inside (the minimum where the gain is negative), and the
batch statistics of all edges follow from sums over points. Nothing here is an approximation.

Inside, clouds are rows: (B, N, C), or (B * N, C) with neighbour indices into all rows of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.norm import (
    Moments,
    across_processes,
    merge_moments,
    scale_and_shift,
    sign_of_gain,
    update_running_statistics,
    uses_batch_statistics,
)

# Elements of one block of the distance matrix: small enough for a CPU's cache, large enough to fill a GPU.
_KNN_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 27}
# Elements of one block of edges in a two-layer EdgeConv.
_EDGE_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 27}
LEAKY_SLOPE = 0.2


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def knn(points: Tensor, k: int) -> Tensor:
    """Indices of the k nearest points of every point, itself included, in no particular order.

    Distances are taken in at least float32, also under autocast: in bfloat16 about 5 % of the neighbours change.
    The cloud is centred first, so that a far-away cloud loses no digits.

    Args:
        points: (B, N, C).
        k: number of neighbours, 1 to N.

    Returns:
        (B, N, k) int64.

    Raises:
        ValueError: k is not between 1 and N.
    """
    b, n, _ = points.shape
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} neighbours of a cloud of {n} points: k must lie between 1 and the number of points")
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        x = at_least_float32(points.detach())
        x = x - x.mean(dim=1, keepdim=True)
        half_norm = x.square().sum(2)[:, None, :] / 2
        index = torch.empty(b, n, k, dtype=torch.int64, device=x.device)
        budget = _KNN_BLOCK.get(x.device.type, 1 << 24)
        clouds, rows = max(1, budget // (n * n)), max(1, min(n, budget // n))
        for i in range(0, b, clouds):
            for j in range(0, n, rows):
                # x_i . x_j - |x_j|^2 / 2 orders the j as the distance does, largest first.
                block = x[i : i + clouds]
                closeness = torch.baddbmm(half_norm[i : i + clouds], block[:, j : j + rows], block.mT, beta=-1)
                index[i : i + clouds, j : j + rows] = closeness.topk(k, dim=2, sorted=False).indices
    return index


def flatten_neighbours(index: Tensor) -> Tensor:
    """(B, N, k) indices within each cloud -> (B * N, k) indices into the rows of the whole batch."""
    b, n, k = index.shape
    return (index + torch.arange(b, device=index.device)[:, None, None] * n).reshape(b * n, k)


class _NeighbourSum(torch.autograd.Function):
    """Sum of the rows that each point's neighbour list names; the backward runs over the transposed lists."""

    @staticmethod
    def forward(ctx, table: Tensor, neighbours: Tensor) -> Tensor:
        ctx.save_for_backward(neighbours)
        return F.embedding_bag(neighbours, table, mode="sum")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (neighbours,) = ctx.saved_tensors
        points, k = neighbours.shape
        flat = neighbours.flatten()
        degree = torch.bincount(flat, minlength=points)
        chosen_by = torch.argsort(flat, stable=True) // k
        offsets = degree.cumsum(0) - degree
        return F.embedding_bag(chosen_by, grad.contiguous(), offsets, mode="sum"), None


def neighbour_sum(table: Tensor, neighbours: Tensor) -> Tensor:
    """Sum over neighbours: (P, C), (P, k) -> (P, C)."""
    return _NeighbourSum.apply(table, neighbours)


class _NeighbourMax(torch.autograd.Function):
    """Maximum over neighbours; the backward is one scatter (the library's own goes channel by channel on a CPU)."""

    @staticmethod
    def forward(ctx, table: Tensor, neighbours: Tensor) -> Tensor:
        points, k = neighbours.shape
        starts = torch.arange(0, points * k, k, device=table.device)
        largest, _, _, chosen = torch.embedding_bag(table, neighbours.flatten(), starts, mode=2)
        ctx.save_for_backward(chosen)
        return largest

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter_add_(0, chosen.to(torch.int64), grad), None


def neighbour_max(table: Tensor, neighbours: Tensor) -> Tensor:
    """Maximum over neighbours, per channel: (P, C), (P, k) -> (P, C)."""
    return _NeighbourMax.apply(table, neighbours)


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


def edge_moments(a: Tensor, c: Tensor, neighbours: Tensor) -> tuple[Moments, Tensor, Tensor]:
    """Moments of ``h_ij = a_j + c_i`` over all edges, from sums over points.

    With a and c centred first, so that no large mean cancels:
    sum (h - mean)^2 = sum_j d_j a_j^2 + 2 sum_i c_i S_i + k sum_i c_i^2, d_j how often j is chosen, S_i = sum_j a_j.

    Returns:
        The moments, a minus its mean over edges, c minus its mean.
    """
    points, k = neighbours.shape
    degree = torch.bincount(neighbours.flatten(), minlength=points).to(a.dtype)
    edges = points * k
    mean_a, mean_c = degree @ a / edges, c.mean(0)
    a, c = a - mean_a, c - mean_c
    scatter = degree @ a.square() + 2 * (c * neighbour_sum(a, neighbours)).sum(0) + k * c.square().sum(0)
    return Moments(a.new_tensor(float(edges)), mean_a + mean_c, scatter.clamp_min(0)), a, c


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
    a, c = edge_terms(x, conv)
    if not uses_batch_statistics(norm):
        return a, c, *scale_and_shift(norm, norm.running_mean, norm.running_var)
    own, a, c = edge_moments(a, c, neighbours)
    moments = across_processes(own)
    variance = moments.scatter / moments.count
    update_running_statistics(norm, moments.mean, variance, moments.count)
    return a, c, *scale_and_shift(norm, moments.mean - own.mean, variance)


def edge_conv(x: Tensor, neighbours: Tensor, block: nn.Sequential) -> Tensor:
    """One-layer EdgeConv: max over neighbours j of ``block([x_j - x_i ; x_i])``.

    Args:
        x: (P, C) rows.
        neighbours: (P, k) indices into the rows.
        block: Conv2d (1x1, 2 C channels), batch norm, monotone activation.

    Returns:
        (P, C_out), at least float32: a_j + c_i is a small difference of large numbers, which half precision would lose.
    """
    with torch.autocast(x.device.type, enabled=False):
        a, c, scale, shift = first_edge_layer(at_least_float32(x), neighbours, block)
        sign = sign_of_gain(scale)
        extreme = neighbour_max(a * sign, neighbours) * sign
        return block[2](torch.addcmul(shift, extreme + c, scale))


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
    with torch.autocast(x.device.type, enabled=False):
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
            counts = a.new_tensor([float(index.numel()) for _, index in blocks])
            means, scatters = (torch.stack(part) for part in zip(*parts, strict=True))
            moments = across_processes(merge_moments(counts, means, scatters))
            mean = weight @ moments.mean
            variance = ((weight @ moments.scatter) * weight).sum(1).clamp_min(0) / moments.count
            update_running_statistics(norm, mean, variance, moments.count)
        else:
            mean, variance = norm.running_mean, norm.running_var
        scale, shift = scale_and_shift(norm, mean, variance)
        sign = sign_of_gain(scale)
        extreme = torch.cat([recomputed(block_extreme, centre, index) for centre, index in blocks]) * sign
        return second[2](torch.addcmul(shift, extreme, scale))


def edge_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution over edges, batch norm, leaky ReLU: the parameters of one EdgeConv layer.

    For the first layer of an EdgeConv ``in_channels`` is twice the point channels.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE),
    )


def point_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution over points, batch norm, leaky ReLU; applied to rows by ``apply_to_rows``."""
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),  # batch norm keeps its input, not its output, for the backward
    )


def max_over_points(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, C). With indices, so that the backward touches one point per channel, not all."""
    return x.max(dim=1).values


def apply_to_rows(rows: Tensor, conv: nn.Conv1d, *rest: nn.Module) -> Tensor:
    """A 1x1 convolution and what follows it, on (P, C) rows: a matrix product, and batch norm at its fastest."""
    rows = F.linear(rows, conv.weight.flatten(1), conv.bias)
    for module in rest:
        rows = module(rows)
    return rows


class TransformNet(nn.Module):
    """Spatial transformer of DGCNN part segmentation: predicts a 3x3 matrix that aligns the cloud.

    Parameter names are those of the published DGCNN repositories. Starts at the identity.

    Shape:
        (B, N, 3), neighbours (B * N, k) -> (B, 3, 3)
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = edge_block(6, 64)
        self.conv2 = edge_block(64, 128)
        self.conv3 = point_block(128, 1024)
        self.linear1 = nn.Linear(1024, 512, bias=False)
        self.bn3 = nn.BatchNorm1d(512)
        self.linear2 = nn.Linear(512, 256, bias=False)
        self.bn4 = nn.BatchNorm1d(256)
        self.transform = nn.Linear(256, 9)
        nn.init.zeros_(self.transform.weight)
        with torch.no_grad():
            self.transform.bias.copy_(torch.eye(3).flatten())

    def forward(self, points: Tensor, neighbours: Tensor) -> Tensor:
        """See the class for shapes."""
        b, n, _ = points.shape
        rows = edge_conv_two_layers(points.flatten(0, 1), neighbours, self.conv1, self.conv2)
        rows = apply_to_rows(rows, *self.conv3)
        x = max_over_points(rows.unflatten(0, (b, n)))
        x = F.leaky_relu(self.bn3(self.linear1(x)), LEAKY_SLOPE)
        x = F.leaky_relu(self.bn4(self.linear2(x)), LEAKY_SLOPE)
        return self.transform(x).unflatten(1, (3, 3))
