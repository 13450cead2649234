"""What every point encoder takes, returns and tells about itself."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class PointFeatures(NamedTuple):
    """Features of a batch of clouds."""

    pooled: Tensor  # (B, feature_dim) one vector per cloud: what the projection head and the linear SVM see
    local: Tensor  # one vector per point: (B, local_dim, N) from ``forward``, (B, N, local_dim) from ``features_of``


class PointEncoder(nn.Module):
    """Base of the encoders: pretraining, heads, checkpoints and published weights need nothing else of them.

    A subclass takes keyword arguments of plain types (bool, int, float, str, tuples of them), keeps each in an
    attribute of its name, sets the attributes below and defines ``pooled_and_layers``.

    Attributes:
        in_channels: values per point, C.
        emb_dims: width of the embedding.
        feature_dim: width of the pooled features.
        local_dim: width of the features per point.
        embedding: name of the tensor in published weights whose first dimension is ``emb_dims``.
        published_heads: matches the names of tensors in published weights that belong to heads.
        published_aliases: matches names under which published weights repeat a tensor.

    Shape:
        (B, C, N) -> PointFeatures
    """

    in_channels: int = 3
    emb_dims: int
    feature_dim: int
    local_dim: int
    embedding: ClassVar[str]
    published_heads: ClassVar[re.Pattern[str]] = re.compile(r"^inv_head\b")
    published_aliases: ClassVar[re.Pattern[str]] = re.compile(r"^$")

    @classmethod
    def arguments(cls) -> dict[str, Any]:
        """Keyword arguments of the constructor, with their defaults (the released values)."""
        parameters = inspect.signature(cls.__init__).parameters
        return {key: p.default for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this encoder."""
        return {key: getattr(self, key) for key in self.arguments()}

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, N, C) -> pooled features (B, feature_dim) and rows (B * N, C_i) whose widths add up to ``local_dim``."""
        raise NotImplementedError

    def features_of(self, points: Tensor) -> PointFeatures:
        """Compute both kinds of features of clouds (B, N, C): pooled (B, feature_dim), local (B, N, local_dim)."""
        pooled, layers = self.pooled_and_layers(self.checked(points))
        return PointFeatures(pooled, torch.cat(layers, dim=1).unflatten(0, points.shape[:2]))

    def pooled_of(self, points: Tensor) -> Tensor:
        """Compute the pooled features alone, (B, N, C) -> (B, feature_dim); those per point are not concatenated."""
        return self.pooled_and_layers(self.checked(points))[0]

    def forward(self, x: Tensor) -> PointFeatures:
        """Compute the features of clouds (B, C, N): pooled (B, feature_dim), local (B, local_dim, N)."""
        if x.ndim != 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (B, {self.in_channels}, N), got {tuple(x.shape)}")
        pooled, local = self.features_of(x.mT)
        return PointFeatures(pooled, local.mT)

    def checked(self, points: Tensor) -> Tensor:
        """Return clouds (B, N, C), contiguous.

        Raises:
            ValueError: they have another shape.
        """
        if points.ndim != 3 or points.shape[2] != self.in_channels:
            raise ValueError(f"expected (B, N, {self.in_channels}), got {tuple(points.shape)}")
        return points.contiguous()


def pooled_features(encoder: nn.Module, points: Tensor) -> Tensor:
    """Compute pooled features (B, feature_dim) of clouds (B, N, C), by any module (B, C, N) -> PointFeatures."""
    return encoder.pooled_of(points) if isinstance(encoder, PointEncoder) else encoder(points.mT).pooled
