"""Interface of the point encoders."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class PointFeatures(NamedTuple):
    """Features of a batch of clouds."""

    pooled: Tensor  # (B, feature_dim) one vector per cloud: input of the projection head and the linear SVM
    local: Tensor  # one vector per point: (B, local_dim, N) from ``forward``, (B, N, local_dim) from ``features_of``


class PointEncoder(nn.Module):
    """Base class of the encoders, with all that pretraining, heads, checkpoints and published weights rely on.

    A subclass takes keyword-only arguments of plain types (bool, int, float, str, tuples of them), stores each in an
    attribute of the same name, sets the attributes below and implements ``pooled_and_layers``.

    Attributes:
        in_channels: number of values per point, C.
        emb_dims: width of the embedding.
        feature_dim: width of the pooled features.
        local_dim: width of the features per point.
        embedding: name of the parameter whose first dimension is ``emb_dims``, to infer it from published weights.
        published_heads: pattern of tensor names in published weights that belong to heads.
        published_aliases: pattern of tensor names under which published weights repeat a tensor.

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
        """Return the keyword arguments of the constructor with their defaults (the released values)."""
        parameters = inspect.signature(cls.__init__).parameters
        return {key: p.default for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def config(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this encoder."""
        return {key: getattr(self, key) for key in self.arguments()}

    def pooled_and_layers(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, N, C) to pooled features (B, feature_dim) and rows (B * N, C_i), ``local_dim`` channels in total."""
        raise NotImplementedError

    def features_of(self, points: Tensor) -> PointFeatures:
        """Compute the features of clouds (B, N, C): pooled (B, feature_dim), local (B, N, local_dim)."""
        pooled, layers = self.pooled_and_layers(self.checked(points))
        return PointFeatures(pooled, torch.cat(layers, dim=1).unflatten(0, points.shape[:2]))

    def pooled_of(self, points: Tensor) -> Tensor:
        """Compute only the pooled features, (B, N, C) -> (B, feature_dim), without concatenating local ones."""
        return self.pooled_and_layers(self.checked(points))[0]

    def forward(self, x: Tensor) -> PointFeatures:
        """Compute the features of clouds (B, C, N): pooled (B, feature_dim), local (B, local_dim, N)."""
        if x.ndim != 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (B, {self.in_channels}, N), got {tuple(x.shape)}")
        pooled, local = self.features_of(x.mT)
        return PointFeatures(pooled, local.mT)

    def checked(self, points: Tensor) -> Tensor:
        """Check the shape of clouds (B, N, C) and return them contiguous.

        Raises:
            ValueError: the shape differs.
        """
        if points.ndim != 3 or points.shape[2] != self.in_channels:
            raise ValueError(f"expected (B, N, {self.in_channels}), got {tuple(points.shape)}")
        return points.contiguous()


def pooled_features(encoder: nn.Module, points: Tensor) -> Tensor:
    """Compute pooled features (B, feature_dim) of clouds (B, N, C) with any module (B, C, N) -> PointFeatures."""
    return encoder.pooled_of(points) if isinstance(encoder, PointEncoder) else encoder(points.mT).pooled
