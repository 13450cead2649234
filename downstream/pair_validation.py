"""Judge pretraining without labels: loss, retrieval, alignment and uniformity on pairs held out of training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.sampler import SampleKey
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from downstream.features import evaluating
from downstream.retrieval import match_ranks, recall_scores
from engine.data_workers import data_loader
from engine.faults import batches
from models.crossnet import CrossNet, Projections
from models.ops.precision import at_least_float32
from utils.collectives import all_gather_strings, broadcast_from_rank0, gather_to_rank0, rank, world_size

logger = logging.getLogger("crossnet")
Batch = dict[str, Any]


def recall_at_1(queries: np.ndarray, gallery: np.ndarray) -> float:
    """Return the percentage of queries (n, C) whose nearest item of the gallery by cosine is their own, row for row."""
    return recall_scores(match_ranks(queries, gallery))["recall_at_1"]


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere (Wang and Isola, arXiv:2005.10242); less is better.

    Args:
        a: (n, C), not normalized.
        b: (n, C); row i belongs to row i of ``a``.
    """
    return (F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)).square().sum(1).mean().item()


def uniformity(x: Tensor, *, block: int = 1024) -> float:
    """Logarithm of the mean of exp(-2 d^2) over pairs of rows (Wang and Isola, arXiv:2005.10242); less is better.

    Args:
        x: (n, C) with n > 1, not normalized; d is the distance on the unit sphere.
        block: rows per pass; memory is about 20 x block x n bytes.
    """
    x = F.normalize(x.double(), dim=1)
    # d^2 = 2 - 2 cos; a row with itself gives exp(0) = 1.
    total = sum((4 * (rows @ x.T) - 4).exp().sum() for rows in x.split(block)) - len(x)
    return (total / (len(x) * (len(x) - 1))).log().item()


def view_scores(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return ``val_view_to_view_r1``, ``val_alignment`` and ``val_uniformity`` of projections (n, C) of two views."""
    a, b = first.numpy(), second.numpy()
    return {
        "val_view_to_view_r1": (recall_at_1(a, b) + recall_at_1(b, a)) / 2,
        "val_alignment": alignment(first, second),
        "val_uniformity": (uniformity(first) + uniformity(second)) / 2,
    }


def _copied(batch: Batch) -> Batch:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


class PairValidation:
    """Loss and retrieval on held-out pairs, the same augmented ones in every epoch and every run of the same seed.

    They are read once and stay in memory: with pictures of 137 x 137 about 80 KB each.

    Args:
        pairs: held out of training.
        batch_size: pairs per forward pass; affects speed and memory only.
        workers: processes that read the pairs.

    Raises:
        DataError: several pairs in a row are unreadable, or one with a strict data set.
    """

    # Pairs that are each other's negatives: all up to this number, since memory grows with its square. Larger sets are
    # split into equal groups of at most this size.
    GROUP = 1024

    def __init__(self, pairs: ShapeNetRender, *, batch_size: int, workers: int = 0) -> None:
        self.count = len(pairs)
        own = np.array_split(np.arange(len(pairs)), world_size())[rank()]
        keys = [
            [SampleKey(0, int(index)) for index in part]
            for part in np.array_split(own, -(-len(own) // batch_size) or 1)
            if len(part)
        ]
        host = torch.device("cpu")
        loader = data_loader(pairs, batch_sampler=keys, collate=collate_pairs, workers=workers, device=host)
        # Copies: each tensor from a worker occupies /dev/shm and an open file for as long as it lives.
        self.batches: Sequence[Batch] = [_copied(batch) for batch in batches(loader)]
        for message in all_gather_strings([message for batch in self.batches for message in batch["bad"]]):
            logger.warning("held-out pair replaced by another one: %s", message)

    def __call__(
        self,
        model: CrossNet,
        *,
        inputs_of: Callable[[Batch], dict[str, Tensor]],
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> dict[str, float]:
        """Score the model in eval mode: each rank projects its share of the pairs, rank 0 compares them.

        Args:
            model: in any mode, which is kept.
            inputs_of: turns a batch into what the model takes; the same at every call.
            precision: context of the forward passes, for autocast.

        Returns:
            ``val_loss``, ``val_loss_intra`` and ``val_loss_cross``: the objective with all held-out pairs in one batch,
            whatever the batch size in training; ``val_image_to_cloud_r1`` and ``val_cloud_to_image_r1`` in percent,
            by cosine of the mean projection of both views and the mean projection of the images;
            ``val_view_to_view_r1`` the same of the two views, mean of both directions; ``val_alignment`` and
            ``val_uniformity`` of the projections of two views.
        """
        parts = []
        with evaluating(model):
            for batch in self.batches:
                with precision():
                    projections = model.project(**inputs_of(batch))
                parts.append([None if z is None else at_least_float32(z).cpu() for z in projections])
        every = gather_to_rank0(parts)

        def score() -> dict[str, float]:
            columns = zip(*(part for of_rank in every for part in of_rank), strict=True)
            return self.score(model, Projections(*(None if rows[0] is None else torch.cat(rows) for rows in columns)))

        return broadcast_from_rank0(score)

    def score(self, model: CrossNet, projections: Projections) -> dict[str, float]:
        """Return the scores, see ``__call__``, given the projections of all pairs (n, C)."""
        number = -(-self.count // self.GROUP)
        # Strided: shapes are sorted by category, and neighbors would make a group of hard negatives.
        groups = [Projections(*(None if z is None else z[i::number] for z in projections)) for i in range(number)]
        losses = np.mean([[part.item() for part in model.losses(group)] for group in groups], axis=0)
        clouds = (projections.view1 + projections.view2) / 2
        images = torch.stack([z for z in (projections.rgb, projections.gray) if z is not None]).mean(0)
        return {
            **dict(zip(("val_loss", "val_loss_intra", "val_loss_cross"), losses.tolist(), strict=True)),
            "val_image_to_cloud_r1": recall_at_1(images.numpy(), clouds.numpy()),
            "val_cloud_to_image_r1": recall_at_1(clouds.numpy(), images.numpy()),
            **view_scores(projections.view1, projections.view2),
        }
