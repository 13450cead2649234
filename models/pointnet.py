"""PointNet encoders (Qi et al., arXiv:1612.00593) in the two layouts used for pretraining.

Parameter names (``conv1.weight``, ``bn1.running_mean``, ``stn.fc1.weight``, ...) are those of published repositories.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import PointEncoder
from models.ops.layers import apply_to_rows, max_over_points


class PointNetCls(PointEncoder):
    """Classification layout without transformers: pointwise layers of 64, 64, 64, 128, E channels, then the maximum.

    Args:
        emb_dims: width E of the embedding.

    Shape:
        (B, 3, N) -> pooled (B, E); local (B, 320, N): the layers before the embedding
    """

    embedding = "conv5.weight"
    published_heads = re.compile(r"^(inv_head|linear\d|bn6)\b")

    def __init__(self, *, emb_dims: int = 1024) -> None:
        super().__init__()
        widths = (3, 64, 64, 64, 128, emb_dims)
        for i in range(5):
            setattr(self, f"conv{i + 1}", nn.Conv1d(widths[i], widths[i + 1], kernel_size=1, bias=False))
            setattr(self, f"bn{i + 1}", nn.BatchNorm1d(widths[i + 1]))
        self.emb_dims, self.feature_dim, self.local_dim = emb_dims, emb_dims, sum(widths[1:5])

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, 3) to pooled features (B, E) and the rows (B * N, C_i) of the layers before the embedding."""
        rows, shape = points.flatten(0, 1), points.shape[:2]
        layers = []
        for i in range(1, 6):
            rows = F.relu(apply_to_rows(rows, getattr(self, f"conv{i}"), getattr(self, f"bn{i}")))  # (B * N, C_i)
            layers.append(rows)
        return max_over_points(rows.unflatten(0, shape)), layers[:4]


class AlignmentNet(nn.Module):
    """PointNet's T-Net: predicts a matrix, as an offset from the identity, that aligns points (C = 3) or features.

    Shape:
        rows (B * N, C), their shape (B, N) -> (B, C, C)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1, self.bn1 = nn.Conv1d(channels, 64, 1), nn.BatchNorm1d(64)
        self.conv2, self.bn2 = nn.Conv1d(64, 128, 1), nn.BatchNorm1d(128)
        self.conv3, self.bn3 = nn.Conv1d(128, 1024, 1), nn.BatchNorm1d(1024)
        self.fc1, self.bn4 = nn.Linear(1024, 512), nn.BatchNorm1d(512)
        self.fc2, self.bn5 = nn.Linear(512, 256), nn.BatchNorm1d(256)
        self.fc3 = nn.Linear(256, channels * channels)

    def forward(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix (B, C, C) for each cloud, given its rows (B * N, C)."""
        rows = F.relu(apply_to_rows(rows, self.conv1, self.bn1))  # (B * N, 64)
        rows = F.relu(apply_to_rows(rows, self.conv2, self.bn2))  # (B * N, 128)
        rows = F.relu(apply_to_rows(rows, self.conv3, self.bn3))  # (B * N, 1024)
        x = max_over_points(rows.unflatten(0, shape))  # (B, 1024)
        x = F.relu(self.bn4(self.fc1(x)))  # (B, 512)
        x = F.relu(self.bn5(self.fc2(x)))  # (B, 256)
        x = self.fc3(x).unflatten(1, (self.channels, self.channels))  # (B, C, C)
        return x + torch.eye(self.channels, device=x.device, dtype=x.dtype)


class PointNetPartSeg(PointEncoder):
    """Part-segmentation layout: input and feature transformers, pointwise layers of 64, 128, 128, 512, E channels.

    Args:
        emb_dims: width E of the embedding; the published supervised layout has 2,048.

    Shape:
        (B, 3, N) -> pooled (B, E): maximum over points; local (B, 832 + E, N): outputs of all pointwise layers
    """

    embedding = "conv5.weight"
    published_heads = re.compile(r"^(inv_head|convs\d|bns\d)\b")

    def __init__(self, *, emb_dims: int = 1024) -> None:
        super().__init__()
        self.stn = AlignmentNet(3)
        self.conv1, self.bn1 = nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64)
        self.conv2, self.bn2 = nn.Conv1d(64, 128, 1), nn.BatchNorm1d(128)
        self.conv3, self.bn3 = nn.Conv1d(128, 128, 1), nn.BatchNorm1d(128)
        self.fstn = AlignmentNet(128)
        self.conv4, self.bn4 = nn.Conv1d(128, 512, 1), nn.BatchNorm1d(512)
        self.conv5, self.bn5 = nn.Conv1d(512, emb_dims, 1), nn.BatchNorm1d(emb_dims)
        self.emb_dims, self.feature_dim, self.local_dim = emb_dims, emb_dims, 64 + 128 + 128 + 512 + emb_dims

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, 3) to pooled features (B, E) and the rows (B * N, C_i) of all pointwise layers."""
        rows, shape = points.flatten(0, 1), points.shape[:2]
        rows = self.align(rows, shape, self.stn)  # (B * N, 3)
        out1 = F.relu(apply_to_rows(rows, self.conv1, self.bn1))  # (B * N, 64)
        out2 = F.relu(apply_to_rows(out1, self.conv2, self.bn2))  # (B * N, 128)
        out3 = F.relu(apply_to_rows(out2, self.conv3, self.bn3))  # (B * N, 128)
        aligned = self.align(out3, shape, self.fstn)  # (B * N, 128)
        out4 = F.relu(apply_to_rows(aligned, self.conv4, self.bn4))  # (B * N, 512)
        out5 = apply_to_rows(out4, self.conv5, self.bn5)  # (B * N, E)
        return max_over_points(out5.unflatten(0, shape)), [out1, out2, out3, out4, out5]

    @staticmethod
    def align(rows: Tensor, shape: torch.Size, net: AlignmentNet) -> Tensor:
        """Multiply each cloud's rows by the matrix that ``net`` predicts for it."""
        matrix = net(rows, shape)  # (B, C, C)
        return (rows.unflatten(0, shape).to(matrix.dtype) @ matrix).flatten(0, 1)  # (B, N, C) -> (B * N, C)
