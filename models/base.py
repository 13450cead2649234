"""What every point encoder returns."""

from typing import NamedTuple

from torch import Tensor, nn


class PointFeatures(NamedTuple):
    """Features of a batch of clouds."""

    pooled: Tensor  # (B, feature_dim) one vector per cloud: what the projection head and the linear SVM see
    local: Tensor  # (B, local_dim, N) one vector per point: what segmentation heads add


def pooled_features(encoder: nn.Module, x: Tensor) -> Tensor:
    """Return ``encoder(x).pooled``, by the encoder's method ``pooled`` where it has one.

    That method never concatenates the features per point, which pretraining does not read.

    Args:
        encoder: module (B, C, N) -> PointFeatures.
        x: (B, C, N) clouds.

    Returns:
        (B, feature_dim)
    """
    pooled = getattr(encoder, "pooled", None)
    return encoder(x).pooled if pooled is None else pooled(x)
