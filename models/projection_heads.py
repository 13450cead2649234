"""Projection heads of the contrastive objective, discarded after pretraining."""

from torch import nn

PROJECTION_DIM = 256
HIDDEN_DIM = 1024


def point_projection(in_dim: int, hidden: int = HIDDEN_DIM) -> nn.Sequential:
    """Build the head of points: D -> hidden (batch norm, ReLU) -> 256, with biases. Published as ``inv_head``."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, PROJECTION_DIM)
    )


def image_projection(in_dim: int) -> nn.Sequential:
    """Build the head of images: D -> 512 (batch norm, ReLU) -> 256, without biases."""
    return nn.Sequential(
        nn.Linear(in_dim, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(inplace=True),
        nn.Linear(512, PROJECTION_DIM, bias=False),
    )
