"""Fine-tuning heads on a point encoder: part segmentation, semantic segmentation, classification.

Layer names and widths are those of the published DGCNN and PointNet repositories: together, the tensors of an encoder
and its head have the names of published files (``FineTuned.published_state_dict``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.base import PointEncoder, PointFeatures
from models.dgcnn import DGCNNCls, DGCNNPartSeg, DGCNNSemSeg
from models.ops.layers import LEAKY_SLOPE, apply_to_rows, point_block
from models.pointnet import PointNetCls, PointNetPartSeg


def scores_of_points(cloud: Tensor, local: Tensor, conv: nn.Conv1d, *rest: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a 1x1 convolution to ``[cloud repeated at every point ; local]``, then the layers that follow it.

    The product with the cloud's vector is computed once per cloud and broadcast, so that the wide repeated tensor is
    never built.

    Args:
        cloud: (B, D) one vector per cloud.
        local: (B, N, C) one vector per point.
        conv: 1x1 convolution of D + C input channels.
        rest: layers applied to rows (B * N, C_out); the last one returns class scores.

    Returns:
        Scores (B, classes, N).
    """
    of_cloud, of_point = conv.weight.flatten(1).split([cloud.shape[1], local.shape[2]], dim=1)
    # (B, N, C) @ (C, C_out) + (B, D) @ (D, C_out), the latter repeated at every point
    rows = F.linear(local, of_point) + F.linear(cloud, of_cloud, conv.bias)[:, None]  # (B, N, C_out)
    return apply_to_rows(rows.flatten(0, 1), *rest).unflatten(0, local.shape[:2]).mT  # (B, classes, N)


class Head(nn.Module):
    """Base class of the heads, which map an encoder's features to scores.

    Attributes:
        counts: name of the constructor argument that sets the number of scores.
        last: name of the last layer's weight, with one row per score.
    """

    counts: ClassVar[str] = "num_classes"
    last: ClassVar[str]

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor], encoder: PointEncoder) -> dict[str, int]:
        """Infer arguments of the head from a published state dict."""
        return {cls.counts: len(state[cls.last])}


class PointHead(Head):
    """Base class of the heads for points: layers over [pooled ; category, if any ; local].

    Attributes:
        num_categories: length of the one-hot vector, 0 without categories.

    Shape:
        features, and category (B,) if there are categories -> (B, scores, N)
    """

    num_categories: int = 0

    def embed(self, one_hot: Tensor) -> Tensor:
        """Map one-hot categories (B, num_categories) to what the layers take."""
        return one_hot

    def layers(self) -> Sequence[Any]:
        """Return the layers in their order; the first one is a 1x1 convolution."""
        raise NotImplementedError

    def forward(self, features: PointFeatures, *category: Tensor) -> Tensor:
        """Return scores (B, scores, N), given the category (B,) if there are categories."""
        pooled, local = features  # (B, feature_dim), (B, N, local_dim)
        one_hot = [F.one_hot(each, self.num_categories).to(pooled.dtype) for each in category]
        cloud = torch.cat([pooled, *map(self.embed, one_hot)], dim=1)  # (B, D)
        return scores_of_points(cloud, local, *self.layers())


class DGCNNPartHead(PointHead):
    """Part head of DGCNN: 64 channels for the one-hot category, then pointwise 256, 256, 128, parts.

    Args:
        encoder: determines the input widths.
        num_categories: length of the one-hot vector.
        num_parts: number of parts over all categories.
        dropout: probability after conv8 and after conv9.
    """

    counts, last = "num_parts", "conv11.weight"

    def __init__(self, encoder: PointEncoder, *, num_categories: int, num_parts: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.conv7 = point_block(num_categories, 64)
        self.conv8 = point_block(encoder.feature_dim + 64 + encoder.local_dim, 256)
        self.conv9 = point_block(256, 256)
        self.conv10 = point_block(256, 128)
        self.conv11 = nn.Conv1d(128, num_parts, kernel_size=1, bias=False)
        self.dropout8, self.dropout9 = nn.Dropout(dropout), nn.Dropout(dropout)

    def embed(self, one_hot: Tensor) -> Tensor:
        """Map one-hot categories (B, num_categories) to (B, 64)."""
        return apply_to_rows(one_hot, *self.conv7)

    def layers(self) -> Sequence[Any]:
        """Return the layers in their order."""
        return *self.conv8, self.dropout8, *self.conv9, self.dropout9, *self.conv10, self.conv11

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor], encoder: PointEncoder) -> dict[str, int]:
        """Infer arguments of the head from a published state dict."""
        return {"num_categories": state["conv7.0.weight"].shape[1], **super().sizes(state, encoder)}


class PointNetPartHead(PointHead):
    """Part head of PointNet: pointwise 256, 256, 128, parts.

    Args:
        encoder: determines the input widths.
        num_categories: length of the one-hot vector.
        num_parts: number of parts over all categories.
        dropout: unused, since the published layout has none; accepted for a common signature.
    """

    counts, last = "num_parts", "convs4.weight"

    def __init__(self, encoder: PointEncoder, *, num_categories: int, num_parts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.convs1 = nn.Conv1d(encoder.feature_dim + num_categories + encoder.local_dim, 256, kernel_size=1)
        self.convs2 = nn.Conv1d(256, 256, kernel_size=1)
        self.convs3 = nn.Conv1d(256, 128, kernel_size=1)
        self.convs4 = nn.Conv1d(128, num_parts, kernel_size=1)
        self.bns1, self.bns2, self.bns3 = nn.BatchNorm1d(256), nn.BatchNorm1d(256), nn.BatchNorm1d(128)

    def layers(self) -> Sequence[Any]:
        """Return the layers in their order."""
        hidden = (self.convs1, self.bns1), (self.convs2, self.bns2), (self.convs3, self.bns3)
        return *(layer for conv, norm in hidden for layer in (conv, norm, F.relu)), self.convs4

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor], encoder: PointEncoder) -> dict[str, int]:
        """Infer arguments of the head from a published state dict."""
        categories = state["convs1.weight"].shape[1] - encoder.feature_dim - encoder.local_dim
        return {"num_categories": categories, **super().sizes(state, encoder)}


class DGCNNSemanticHead(PointHead):
    """Semantic head of DGCNN: pointwise 512, 256, classes.

    Args:
        encoder: determines the input widths.
        num_classes: number of classes.
        dropout: probability before the last layer.
    """

    last = "conv9.weight"

    def __init__(self, encoder: PointEncoder, *, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv7 = point_block(encoder.feature_dim + encoder.local_dim, 512)
        self.conv8 = point_block(512, 256)
        self.conv9 = nn.Conv1d(256, num_classes, kernel_size=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def layers(self) -> Sequence[Any]:
        """Return the layers in their order."""
        return *self.conv7, *self.conv8, self.dropout, self.conv9


def feature_norm(channels: int, *, batch_norm: bool) -> nn.Module:
    """Return the layer in front of a linear probe: batch norm without parameters, or nothing.

    It gives all features one scale, so that one learning rate suits every encoder. The probe remains linear, since the
    norm merges with the layer that follows. From the linear probing of MAE (He et al., CVPR 2022, appendix A.1), with
    its eps.
    """
    return nn.BatchNorm1d(channels, affine=False, eps=1e-6) if batch_norm else nn.Identity()


class LinearSemanticHead(PointHead):
    """Linear probe for points: one 1x1 convolution with bias, over normalized features.

    Args:
        encoder: determines the input widths.
        num_classes: number of classes.
        num_categories: length of the one-hot vector.
        batch_norm: whether :func:`feature_norm` normalizes the features.
    """

    def __init__(
        self, encoder: PointEncoder, *, num_classes: int, num_categories: int = 0, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.norm_pooled = feature_norm(encoder.feature_dim, batch_norm=batch_norm)
        self.norm_local = feature_norm(encoder.local_dim, batch_norm=batch_norm)
        self.linear = nn.Conv1d(encoder.feature_dim + num_categories + encoder.local_dim, num_classes, kernel_size=1)

    def layers(self) -> Sequence[Any]:
        """Return the only layer."""
        return (self.linear,)

    def forward(self, features: PointFeatures, *category: Tensor) -> Tensor:
        """Return scores (B, scores, N), given the category (B,) if there are categories."""
        pooled, local = features  # (B, feature_dim), (B, N, local_dim)
        rows = self.norm_local(local.flatten(0, 1))  # (B * N, local_dim)
        normalized = PointFeatures(self.norm_pooled(pooled), rows.unflatten(0, local.shape[:2]))
        return super().forward(normalized, *category)


class LinearPartHead(LinearSemanticHead):
    """Linear probe for parts; arguments ``num_categories``, ``num_parts`` and ``batch_norm``."""

    def __init__(self, encoder: PointEncoder, *, num_categories: int, num_parts: int, batch_norm: bool = True) -> None:
        super().__init__(encoder, num_classes=num_parts, num_categories=num_categories, batch_norm=batch_norm)


class ClassHead(Head):
    """Base class of the classifiers: linear layers; batch norm, activation and dropout after each hidden one.

    Args:
        encoder: determines the input width.
        num_classes: number of classes.
        dropout: probability.

    Attributes:
        hidden: widths of the hidden layers.
        activation: applied after batch norm.

    Shape:
        features -> (B, num_classes)
    """

    hidden: ClassVar[tuple[int, ...]]
    activation: Callable[[Tensor], Tensor]

    def __init__(self, encoder: PointEncoder, *, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        widths = (encoder.feature_dim, *self.hidden, num_classes)
        for i in range(len(self.hidden)):  # published names: linear1, bn6, linear2, bn7, linear3
            setattr(self, f"linear{i + 1}", nn.Linear(widths[i], widths[i + 1], bias=i > 0))
            setattr(self, f"bn{i + 6}", nn.BatchNorm1d(widths[i + 1]))
            setattr(self, f"dropout{i + 1}", nn.Dropout(dropout))
        setattr(self, f"linear{len(self.hidden) + 1}", nn.Linear(widths[-2], widths[-1]))

    def forward(self, features: PointFeatures) -> Tensor:
        """Return scores (B, num_classes)."""
        x = features.pooled  # (B, feature_dim)
        for layer in self.children():
            x = self.activation(layer(x)) if isinstance(layer, _BatchNorm) else layer(x)
        return x


class DGCNNClassHead(ClassHead):
    """Classifier of DGCNN: linear 512, 256, classes."""

    hidden, last = (512, 256), "linear3.weight"
    activation = staticmethod(partial(F.leaky_relu, negative_slope=LEAKY_SLOPE))


class PointNetClassHead(ClassHead):
    """Classifier of PointNet: linear 512, classes."""

    hidden, last = (512,), "linear2.weight"
    activation = staticmethod(F.relu)


class LinearClassHead(Head):
    """Linear probe for clouds: one linear layer with bias over the normalized pooled features.

    Args:
        encoder: determines the input width.
        num_classes: number of classes.
        batch_norm: whether :func:`feature_norm` normalizes the features.

    Shape:
        features -> (B, num_classes)
    """

    def __init__(self, encoder: PointEncoder, *, num_classes: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.norm_pooled = feature_norm(encoder.feature_dim, batch_norm=batch_norm)
        self.linear = nn.Linear(encoder.feature_dim, num_classes)

    def forward(self, features: PointFeatures) -> Tensor:
        """Return scores (B, num_classes)."""
        return self.linear(self.norm_pooled(features.pooled))


HEADS = ("published", "linear")


class FineTuned(nn.Module):
    """An encoder with the head of a task.

    Args:
        encoder: instance of a class in ``heads``.
        head: one of ``HEADS``.
        sizes: keyword arguments of the head.

    Attributes:
        kind: name of the task, as written to checkpoints.
        released_k: number of neighbors in the released script, which its weights do not store.
        heads: published head of each supported encoder.
        linear_head: linear head of these encoders.
        frozen: whether ``freeze_encoder`` was called.

    Raises:
        ValueError: the task has no head for this encoder.
    """

    kind: ClassVar[str]
    released_k: ClassVar[int] = 20
    heads: ClassVar[Mapping[type[PointEncoder], type[Head]]]
    linear_head: ClassVar[type[Head]]
    frozen = False

    def __init__(self, encoder: PointEncoder, *, head: str = "published", **sizes: Any) -> None:
        super().__init__()
        self.encoder, self.head_name, self.sizes = encoder, head, sizes
        self.head = self.head_class(type(encoder), head)(encoder, **sizes)

    @classmethod
    def head_class(cls, encoder: type[PointEncoder], head: str = "published") -> type[Head]:
        """Return the head class for an encoder class.

        Raises:
            ValueError: the task has no head for this encoder, or the name of the head is unknown.
        """
        if encoder not in cls.heads:
            fitting = ", ".join(kind.__name__ for kind in cls.heads)
            raise ValueError(f"{cls.kind} has no head for {encoder.__name__}; expected one of {fitting}")
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; expected one of {', '.join(HEADS)}")
        return cls.linear_head if head == "linear" else cls.heads[encoder]

    def freeze_encoder(self) -> None:
        """Freeze the encoder: no gradients, and evaluation mode even while the head trains."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> FineTuned:
        """Set training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def features(self, points: Tensor) -> PointFeatures:
        """Compute the features of clouds (B, N, C), without gradient if the encoder is frozen."""
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            return self.encoder.features_of(points)

    def scores(self, points: Tensor, *inputs: Tensor) -> Tensor:
        """Compute the scores of ``forward`` from points (B, N, C)."""
        return self.head(self.features(points), *inputs)

    def forward(self, points: Tensor, *inputs: Tensor) -> Tensor:
        """Compute scores from points (B, C, N) and the other inputs of the task."""
        return self.scores(points.mT, *inputs)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of encoder and head under their published names, without prefixes."""
        return {**self.encoder.state_dict(), **self.head.state_dict()}


class PartSegmentation(FineTuned):
    """Predict the part of every point; head arguments ``num_categories``, ``num_parts``, ``dropout``.

    Shape:
        points (B, 3, N), category (B,) int64 -> (B, num_parts, N) scores
    """

    kind = "part segmentation"
    heads = {DGCNNPartSeg: DGCNNPartHead, PointNetPartSeg: PointNetPartHead}
    linear_head = LinearPartHead


class SemanticSegmentation(FineTuned):
    """Predict the class of every point; head arguments ``num_classes``, ``dropout``.

    Shape:
        points (B, in_channels, N) -> (B, num_classes, N) scores
    """

    kind = "semantic segmentation"
    heads = {DGCNNSemSeg: DGCNNSemanticHead}
    linear_head = LinearSemanticHead


class Classification(FineTuned):
    """Predict the class of a cloud; head arguments ``num_classes``, ``dropout``.

    Shape:
        points (B, 3, N) -> (B, num_classes) scores
    """

    kind = "classification"
    released_k = 16
    heads = {DGCNNCls: DGCNNClassHead, PointNetCls: PointNetClassHead}
    linear_head = LinearClassHead


TASKS: dict[str, type[FineTuned]] = {
    task.kind: task for task in (PartSegmentation, SemanticSegmentation, Classification)
}
