"""What every point encoder returns."""

from typing import NamedTuple

from torch import Tensor


class PointFeatures(NamedTuple):
    """Features of a batch of clouds."""

    pooled: Tensor  # (B, feature_dim) one vector per cloud: what the projection head and the linear SVM see
    local: Tensor  # (B, local_dim, N) one vector per point: what segmentation heads add
