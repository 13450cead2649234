"""DGCNN (arXiv:1801.07829) as its formulas say it, edge tensors and all: what ``models`` must equal.

Everything here is written for being obviously right: the k nearest points by a full sorted distance matrix, the edges
[x_j - x_i ; x_i] as one tensor (B, 2C, N, k), convolution, batch norm and activation called on it, then the maximum.
Modules carry the parameter names of ``models.dgcnn``, so that each loads the other's state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def textbook_knn(x: Tensor, k: int) -> Tensor:
    """Return the indices of the k nearest points of every point, itself included: (B, C, N) -> (B, N, k)."""
    square = x.square().sum(dim=1)
    distance = square[:, :, None] - 2 * x.transpose(1, 2) @ x + square[:, None, :]
    return distance.topk(k, dim=2, largest=False).indices


def edge_features(x: Tensor, index: Tensor) -> Tensor:
    """[x_j - x_i ; x_i] for all neighbors j of i: (B, C, N), (B, N, k) -> (B, 2C, N, k)."""
    points = x.transpose(1, 2)
    cloud = torch.arange(len(x), device=x.device)[:, None, None]
    neighbor = points[cloud, index]  # (B, N, k, C)
    center = points[:, :, None, :].expand_as(neighbor)
    return torch.cat([neighbor - center, center], dim=3).permute(0, 3, 1, 2).contiguous()


def textbook_edge_conv(x: Tensor, index: Tensor, *blocks: nn.Module) -> Tensor:
    """EdgeConv of one or more layers: (B, C, N), (B, N, k) -> (B, C_out, N)."""
    edges = edge_features(x, index)
    for block in blocks:
        edges = block(edges)
    return edges.max(dim=3).values


def conv_bn_act(in_channels: int, out_channels: int, dimensions: int) -> nn.Sequential:
    """1x1 convolution over points (1 dimension) or edges (2), batch norm, leaky ReLU of slope 0.2."""
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dimensions]
    return nn.Sequential(conv(in_channels, out_channels, 1, bias=False), norm(out_channels), nn.LeakyReLU(0.2))


class TextbookDGCNNCls(nn.Module):
    """Classification layout: (B, 3, N) -> pooled (B, 2 E), local (B, 512, N)."""

    def __init__(self, *, k: int = 20, emb_dims: int = 1024) -> None:
        super().__init__()
        self.k = k
        self.conv1 = conv_bn_act(6, 64, 2)
        self.conv2 = conv_bn_act(128, 64, 2)
        self.conv3 = conv_bn_act(128, 128, 2)
        self.conv4 = conv_bn_act(256, 256, 2)
        self.conv5 = conv_bn_act(512, emb_dims, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled (B, 2 E) and local (B, 512, N) features of clouds (B, 3, N)."""
        x1 = textbook_edge_conv(x, textbook_knn(x, self.k), self.conv1)
        x2 = textbook_edge_conv(x1, textbook_knn(x1, self.k), self.conv2)
        x3 = textbook_edge_conv(x2, textbook_knn(x2, self.k), self.conv3)
        x4 = textbook_edge_conv(x3, textbook_knn(x3, self.k), self.conv4)
        local = torch.cat([x1, x2, x3, x4], dim=1)
        embedded = self.conv5(local)
        return torch.cat([embedded.max(dim=2).values, embedded.mean(dim=2)], dim=1), local


class TextbookTransformNet(nn.Module):
    """Spatial transformer of the part layout: (B, 3, N) -> (B, 3, 3)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv1 = conv_bn_act(6, 64, 2)
        self.conv2 = conv_bn_act(64, 128, 2)
        self.conv3 = conv_bn_act(128, 1024, 1)
        self.linear1 = nn.Linear(1024, 512, bias=False)
        self.bn3 = nn.BatchNorm1d(512)
        self.linear2 = nn.Linear(512, 256, bias=False)
        self.bn4 = nn.BatchNorm1d(256)
        self.transform = nn.Linear(256, 9)

    def forward(self, x: Tensor) -> Tensor:
        """Return a matrix (B, 3, 3) for each cloud (B, 3, N)."""
        features = self.conv3(textbook_edge_conv(x, textbook_knn(x, self.k), self.conv1, self.conv2))
        features = features.max(dim=2).values
        features = F.leaky_relu(self.bn3(self.linear1(features)), 0.2)
        features = F.leaky_relu(self.bn4(self.linear2(features)), 0.2)
        return self.transform(features).view(len(x), 3, 3)


class TextbookDGCNNSemSeg(nn.Module):
    """Semantic-segmentation layout: (B, 3 or 9, N) -> pooled (B, E), local (B, 192, N)."""

    def __init__(self, *, k: int = 20, emb_dims: int = 1024, in_channels: int = 3) -> None:
        super().__init__()
        self.k = k
        self.conv1 = conv_bn_act(2 * in_channels, 64, 2)
        self.conv2 = conv_bn_act(64, 64, 2)
        self.conv3 = conv_bn_act(128, 64, 2)
        self.conv4 = conv_bn_act(64, 64, 2)
        self.conv5 = conv_bn_act(128, 64, 2)
        self.conv6 = conv_bn_act(192, emb_dims, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled (B, E) and local (B, 192, N) features of clouds (B, 3 or 9, N)."""
        graph = x[:, 6:9] if x.shape[1] == 9 else x  # the room-normalized coordinates of an S3DIS block
        x1 = textbook_edge_conv(x, textbook_knn(graph, self.k), self.conv1, self.conv2)
        x2 = textbook_edge_conv(x1, textbook_knn(x1, self.k), self.conv3, self.conv4)
        x3 = textbook_edge_conv(x2, textbook_knn(x2, self.k), self.conv5)
        local = torch.cat([x1, x2, x3], dim=1)
        return self.conv6(local).max(dim=2).values, local


class TextbookDGCNNPartSeg(TextbookDGCNNSemSeg):
    """Part-segmentation layout: the semantic one after a spatial transformer."""

    def __init__(self, *, k: int = 20, emb_dims: int = 1024) -> None:
        super().__init__(k=k, emb_dims=emb_dims)
        self.transform_net = TextbookTransformNet(k)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled (B, E) and local (B, 192, N) features of clouds (B, 3, N)."""
        aligned = (x.transpose(1, 2) @ self.transform_net(x)).transpose(1, 2)
        return super().forward(aligned)


TEXTBOOK_ENCODERS: dict[str, type[nn.Module]] = {
    "dgcnn_cls": TextbookDGCNNCls,
    "dgcnn_partseg": TextbookDGCNNPartSeg,
    "dgcnn_semseg": TextbookDGCNNSemSeg,
}
