"""CrossNet: a point encoder trained jointly with a color and a gray image encoder (Wu et al., IEEE TMM 2023)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.base import PointEncoder, pooled_features
from models.image import build_image_encoder
from models.losses import OBJECTIVES, RELEASED_TEMPERATURE, Losses, crossnet_objective
from models.projection_heads import HIDDEN_DIM, image_projection, point_projection

MODALITIES = ("both", "rgb", "gray")


class Projections(NamedTuple):
    """Inputs of the losses: (B, 256) each; None if the branch does not exist."""

    view1: Tensor
    view2: Tensor
    rgb: Tensor | None
    gray: Tensor | None


class CrossNet(nn.Module):
    """The pretraining model: encoders, projection heads and objective.

    Args:
        point_encoder: module (B, 3, N) -> PointFeatures, with ``feature_dim``; its ``emb_dims``, if any, sets the
            width of the point head's hidden layer.
        image_model: ResNet of the image branches, one of ``models.image.IMAGE_ENCODERS``.
        image_modality: image branches to build: ``both``, ``rgb`` or ``gray``.
        objective: ``con`` or ``ave``, as in ``models.losses.crossnet_objective``.
        alpha: weight of the cross-modal term.
        intra_weight: weight of the term between the views.
        temperature: temperature of NT-Xent; None means the released value, 0.2 for ``con`` and 0.1 for ``ave``.
        mask_same_object: ablation of ``con``, as in ``models.losses.crossnet_objective``.

    Raises:
        ValueError: the modality, the objective or the image model is unknown.
    """

    def __init__(
        self,
        point_encoder: PointEncoder,
        *,
        image_model: str = "resnet50",
        image_modality: str = "both",
        objective: str = "con",
        alpha: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float | None = None,
        mask_same_object: bool = False,
    ) -> None:
        super().__init__()
        if image_modality not in MODALITIES:
            raise ValueError(f"unknown image modality {image_modality!r}: expected one of {', '.join(MODALITIES)}")
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
        self.objective, self.alpha, self.intra_weight = objective, alpha, intra_weight
        self.temperature = RELEASED_TEMPERATURE[objective] if temperature is None else temperature
        self.mask_same_object = mask_same_object
        self.point_encoder = point_encoder
        hidden = getattr(point_encoder, "emb_dims", HIDDEN_DIM)
        self.point_head = point_projection(point_encoder.feature_dim, hidden)
        self.image_encoders, self.image_heads = nn.ModuleDict(), nn.ModuleDict()
        for modality, channels in (("rgb", 3), ("gray", 1)):
            if image_modality in ("both", modality):
                encoder = build_image_encoder(image_model, in_channels=channels)
                self.image_encoders[modality] = encoder
                self.image_heads[modality] = image_projection(encoder.feature_dim)

    def project_points(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Project two views, each (B, 3, N) -> (B, 256), as one batch of 2B, so that they share batch statistics."""
        features = pooled_features(self.point_encoder, torch.cat([view1.mT, view2.mT]))  # (2B, feature_dim)
        z1, z2 = self.point_head(features).chunk(2)  # (B, 256) each
        return z1, z2

    def project_images(self, modality: str, images: Tensor | None) -> Tensor | None:
        """Project renders (B, channels, H, W) -> (B, 256); return None if the branch does not exist."""
        if modality not in self.image_encoders:
            return None
        if images is None:
            raise ValueError(f"the model has a {modality} branch but got no {modality} images")
        return self.image_heads[modality](self.image_encoders[modality](images))  # (B, 256)

    def project(
        self, view1: Tensor, view2: Tensor, *, rgb: Tensor | None = None, gray: Tensor | None = None
    ) -> Projections:
        """Apply encoders and heads; arguments as in ``forward``."""
        return Projections(
            *self.project_points(view1, view2), self.project_images("rgb", rgb), self.project_images("gray", gray)
        )

    def losses(self, projections: Projections) -> Losses:
        """Compute the objective from projections."""
        view1, view2, rgb, gray = projections
        return crossnet_objective(
            (view1, view2),
            rgb=rgb,
            gray=gray,
            objective=self.objective,
            alpha=self.alpha,
            intra_weight=self.intra_weight,
            temperature=self.temperature,
            mask_same_object=self.mask_same_object,
        )

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        *,
        rgb: Tensor | None = None,
        gray: Tensor | None = None,
        only_project: bool = False,
    ) -> Losses | Projections:
        """Compute the losses of a batch.

        Args:
            view1: first augmented views (B, 3, N).
            view2: second augmented views (B, 3, N) of the same clouds, in the same order.
            rgb: color renders (B, 3, H, W) of the same objects; required if that branch exists.
            gray: gray renders (B, 1, H, W); required if that branch exists.
            only_project: return the projections instead of the losses; ``engine.grad_cache`` calls ``forward`` for
                them because DistributedDataParallel wraps no other method.

        Raises:
            ValueError: renders for a branch are missing.
        """
        projections = self.project(view1, view2, rgb=rgb, gray=gray)
        return projections if only_project else self.losses(projections)
