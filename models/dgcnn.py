"""DGCNN encoders (Wang et al., arXiv:1801.07829) in the three common layouts.

Parameter names (``conv1.0.weight``, ``conv1.1.running_mean``, ...) are those of the published DGCNN repositories.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import PointEncoder
from models.ops.edge_conv import edge_conv, edge_conv_two_layers
from models.ops.knn import flatten_neighbors, knn
from models.ops.layers import LEAKY_SLOPE, edge_block, point_block
from models.ops.pooling import pool_pointwise
from models.ops.precision import at_least_float32, exact_matmul, without_autocast


class TransformNet(nn.Module):
    """Spatial transformer of DGCNN part segmentation: predicts a 3x3 matrix that aligns the cloud.

    It is initialized to the identity. Parameter names are those of the published DGCNN repositories.

    Shape:
        points (B, N, 3), neighbors (B * N, k) -> (B, 3, 3)
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

    def forward(self, points: Tensor, neighbors: Tensor) -> Tensor:
        """Return a matrix (B, 3, 3) for each cloud (B, N, 3), given its neighbors (B * N, k)."""
        rows = edge_conv_two_layers(points.flatten(0, 1), neighbors, self.conv1, self.conv2)  # (B * N, 128)
        x, _ = pool_pointwise([rows], points.shape[0], self.conv3)  # (B, 1024)
        x = F.leaky_relu(self.bn3(self.linear1(x)), LEAKY_SLOPE)  # (B, 512)
        x = F.leaky_relu(self.bn4(self.linear2(x)), LEAKY_SLOPE)  # (B, 256)
        return self.transform(x).unflatten(1, (3, 3))  # (B, 3, 3)


class _DGCNN(PointEncoder):
    """Base class of the layouts: arguments and neighbor search."""

    published_aliases = re.compile(r"^(bn\d+|transform_net\.bn[12]|transform_net\.conv3\.1)\.")

    def __init__(self, *, k: int, emb_dims: int, in_channels: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k = {k}: expected 1 or more, since every point is its own neighbor")
        self.k, self.emb_dims, self.in_channels = k, emb_dims, in_channels

    def neighbors(self, points: Tensor) -> Tensor:
        """Return the indices (B * N, k) of the nearest rows of points or features (B, N, C)."""
        return flatten_neighbors(knn(points, self.k))  # (B, N, k) -> (B * N, k)


class DGCNNCls(_DGCNN):
    """Classification layout: EdgeConvs of 64, 64, 128 and 256 channels, then an embedding.

    Args:
        k: number of neighbors per point, itself included.
        emb_dims: width E of the embedding.

    Shape:
        (B, 3, N) -> pooled (B, 2 E): maximum and mean over points; local (B, 512, N)
    """

    embedding = "conv5.0.weight"
    published_heads = re.compile(r"^(inv_head|linear\d|bn[67])\b")

    def __init__(self, *, k: int = 20, emb_dims: int = 1024) -> None:
        super().__init__(k=k, emb_dims=emb_dims, in_channels=3)
        self.conv1 = edge_block(6, 64)
        self.conv2 = edge_block(128, 64)
        self.conv3 = edge_block(128, 128)
        self.conv4 = edge_block(256, 256)
        self.conv5 = point_block(512, emb_dims)
        self.feature_dim, self.local_dim = 2 * emb_dims, 512

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, 3) to pooled features (B, 2 E) and four layers of rows (B * N, C_i)."""
        shape, rows, layers = points.shape, points.flatten(0, 1), []
        for block in (self.conv1, self.conv2, self.conv3, self.conv4):
            rows = edge_conv(rows, self.neighbors(rows.unflatten(0, shape[:2])), block, clouds=points.shape[0])
            layers.append(rows)  # (B * N, C_i)
        return torch.cat(pool_pointwise(layers, points.shape[0], self.conv5, with_mean=True), dim=1), layers


class _DGCNNSeg(_DGCNN):
    """Segmentation layouts: EdgeConvs of two, two and one layers of 64 channels, then an embedding."""

    embedding = "conv6.0.weight"

    def __init__(self, *, k: int, emb_dims: int, in_channels: int) -> None:
        super().__init__(k=k, emb_dims=emb_dims, in_channels=in_channels)
        self.conv1 = edge_block(2 * in_channels, 64)
        self.conv2 = edge_block(64, 64)
        self.conv3 = edge_block(128, 64)
        self.conv4 = edge_block(64, 64)
        self.conv5 = edge_block(128, 64)
        self.conv6 = point_block(192, emb_dims)
        self.feature_dim, self.local_dim = emb_dims, 192

    def edge_convs(self, points: Tensor, first_neighbors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, C) and the first layer's neighbors (B * N, k) to (B, E) and three layers of rows (B * N, 64)."""
        shape = points.shape
        x1 = edge_conv_two_layers(points.flatten(0, 1), first_neighbors, self.conv1, self.conv2)  # (B * N, 64)
        x2 = edge_conv_two_layers(x1, self.neighbors(x1.unflatten(0, shape[:2])), self.conv3, self.conv4)
        x3 = edge_conv(x2, self.neighbors(x2.unflatten(0, shape[:2])), self.conv5, clouds=points.shape[0])
        layers = [x1, x2, x3]
        pooled, _ = pool_pointwise(layers, points.shape[0], self.conv6)  # (B, E)
        return pooled, layers


class DGCNNPartSeg(_DGCNNSeg):
    """Part-segmentation layout: a spatial transformer aligns the cloud first.

    Args:
        k: number of neighbors per point, itself included.
        emb_dims: width E of the embedding.

    Shape:
        (B, 3, N) -> pooled (B, E): maximum over points; local (B, 192, N)
    """

    published_heads = re.compile(r"^(inv_head|conv([7-9]|1[01])|linear\d)\b")

    def __init__(self, *, k: int = 20, emb_dims: int = 1024) -> None:
        super().__init__(k=k, emb_dims=emb_dims, in_channels=3)
        self.transform_net = TransformNet()

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, 3) to pooled features (B, E) and three layers of rows (B * N, 64)."""
        matrices = self.transform_net(points, self.neighbors(points))  # (B, 3, 3)
        with without_autocast(points.device):  # rounding the coordinates would change the neighbors
            points = at_least_float32(points)
            aligned = exact_matmul(points, matrices.to(points.dtype))  # (B, N, 3)
        return self.edge_convs(aligned, self.neighbors(aligned))


class DGCNNSemSeg(_DGCNNSeg):
    """Semantic-segmentation layout.

    Args:
        k: number of neighbors per point, itself included.
        emb_dims: width E of the embedding.
        in_channels: 3 for xyz, or 9 for S3DIS blocks (xyz, rgb, room-normalized xyz); with 9 the first neighbors are
            those in room-normalized coordinates ``x[:, 6:9]``, as in the published weights.

    Shape:
        (B, in_channels, N) -> pooled (B, E): maximum over points; local (B, 192, N)
    """

    published_heads = re.compile(r"^(inv_head|conv[7-9]|linear\d)\b")

    def __init__(self, *, k: int = 20, emb_dims: int = 1024, in_channels: int = 3) -> None:
        if in_channels not in (3, 9):
            raise ValueError(f"in_channels = {in_channels}: expected 3 (xyz) or 9 (xyz, rgb, room-normalized xyz)")
        super().__init__(k=k, emb_dims=emb_dims, in_channels=in_channels)

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, in_channels) to pooled features (B, E) and three layers of rows (B * N, 64)."""
        return self.edge_convs(points, self.neighbors(points[..., 6:9] if self.in_channels == 9 else points))
