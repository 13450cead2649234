"""The space in which pretraining compares clouds and pictures: a run's encoders with their projection heads."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.pair_sources import PairSource
from datasets.shapenet_part import draw_rows
from datasets.transforms import NormalizeToUnitSphere, RenderPixels, plain_images
from datasets.untrusted import decode_image
from downstream.features import evaluating
from downstream.retrieval import chance_scores, match_ranks, recall_scores
from engine.device import resolve_device
from engine.load_model import crossnet_from_checkpoint
from models.base import pooled_features
from utils.errors import DataError
from utils.progress import progress

MEAN = "both"  # the branch that stands for the mean projection of color and gray
Scores = dict[str, float]


class PairSpace:
    """Projects clouds and pictures as a pretraining run did, without augmentation.

    Args:
        path: checkpoint of ``train_crossnet_con.py``.
        device: see ``--device``.

    Attributes:
        model: the run's model, in evaluation mode.
        flags: of the run, by name.
        held_out: ids of the pairs that the run has not trained on, with ``--val_fraction``; else empty.
        branches: image branches of the run; of two, their mean comes first.

    Raises:
        CheckpointError: the file is not such a checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: str = "auto") -> None:
        model, payload = crossnet_from_checkpoint(path)
        self.device = resolve_device(device)
        self.model, self.flags = model.eval().to(self.device), payload["arguments"]
        self.held_out: list[str] = payload.get("held_out", [])
        self.image_size = int(self.flags["image_size"])
        self.pixels = RenderPixels(self.image_size, background=self.flags.get("background", "black"))
        own = list(model.image_encoders)
        self.branches = [MEAN, *own] if len(own) > 1 else own

    def features_of(self, clouds: np.ndarray) -> np.ndarray:
        """Return pooled features (n, D) of clouds (n, N, 3), which are centered and scaled to the unit sphere."""
        points = NormalizeToUnitSphere()(torch.from_numpy(clouds).to(self.device, torch.float32))
        with evaluating(self.model):
            return pooled_features(self.model.point_encoder, points).float().cpu().numpy()

    def project_features(self, features: np.ndarray) -> np.ndarray:
        """Project pooled features (n, D) of clouds -> (n, 256) float32."""
        with evaluating(self.model):
            return self.model.point_head(torch.from_numpy(features).to(self.device)).float().cpu().numpy()

    def project_pictures(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Project pictures of any size and mode; transparency is composited on the run's background.

        Returns:
            By branch: (n, 256) float32.
        """
        parts: dict[str, list[Tensor]] = {}
        for picture in pictures:
            pixels = self.pixels(picture)[None].to(self.device)  # (1, H, W, 3)
            for name, image in plain_images(pixels, self.image_size).items():
                parts.setdefault(name, []).append(image)
        with evaluating(self.model):
            found = {
                name: self.model.project_images(name, torch.cat(parts[name])).float().cpu().numpy()
                for name in self.model.image_encoders
            }
        return {MEAN: sum(found.values()) / 2, **found} if len(found) > 1 else found


class PairProjections(NamedTuple):
    """Projections of pairs: row i of every array belongs to pair i."""

    rows: list[int]  # numbers of the pairs in their source
    clouds: np.ndarray  # (n, 256)
    pictures: dict[str, np.ndarray]  # by branch: (n, 256)
    skipped: dict[str, str]  # why pairs could not be read, by id


class PairReader:
    """Reads one cloud and one picture of each pair; which ones is a function of the pair's name and the seed.

    Args:
        source: the pairs.
        num_points: points of a cloud, drawn from those it has, which repeat where they are too few.
        seed: of the draws.
    """

    def __init__(self, source: PairSource, *, num_points: int, seed: int = 1) -> None:
        self.source, self.num_points, self.seed = source, num_points, seed

    def cloud(self, i: int) -> np.ndarray:
        """Return the cloud (num_points, 3) of pair i.

        Raises:
            DataError: it cannot be read.
        """
        points = self.source.points(i)
        return points[draw_rows(len(points), self.num_points, self._generator(i, 0))]

    def picture(self, i: int) -> Image.Image:
        """Return the picture of pair i.

        Raises:
            DataError: it cannot be read.
        """
        view = int(self._generator(i, 1).integers(len(self.source.view_names(i))))
        return decode_image(self.source.image_file(i, view), self.source.where(i, view))

    def _generator(self, i: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.source.ids[i].encode()), purpose])


def project_pairs(space: PairSpace, read: PairReader, rows: Sequence[int], *, batch_size: int = 32) -> PairProjections:
    """Project pairs; those that cannot be read are left out.

    Raises:
        DataError: none can be read.
    """
    skipped: dict[str, str] = {}

    def readable() -> Iterator[tuple[int, np.ndarray, Image.Image]]:
        for i in progress(rows, text="projecting pairs", unit="pairs"):
            try:
                yield i, read.cloud(i), read.picture(i)
            except DataError as error:
                skipped[read.source.ids[i]] = str(error)

    kept: list[int] = []
    clouds: list[np.ndarray] = []
    pictures: dict[str, list[np.ndarray]] = {branch: [] for branch in space.branches}
    items = readable()
    while batch := list(itertools.islice(items, batch_size)):
        numbers, points, images = zip(*batch, strict=True)
        kept += numbers
        clouds.append(space.project_features(space.features_of(np.stack(points))))
        for branch, projected in space.project_pictures(images).items():
            pictures[branch].append(projected)
    if not kept:
        raise DataError(f"none of the pairs could be read: {'; '.join(list(skipped.values())[:3])}")
    joined = {branch: np.concatenate(parts) for branch, parts in pictures.items()}
    return PairProjections(kept, np.concatenate(clouds), joined, skipped)


def pair_scores(pairs: PairProjections) -> dict[str, dict[str, Scores] | Scores]:
    """Score how well pictures find their shapes and shapes their pictures, among all pairs, by cosine.

    Returns:
        ``image_to_shape`` and ``shape_to_image`` by branch, and ``chance``; each with ``recall_at_1``, ``_5`` and
        ``_10`` in percent and the ``median_rank``.
    """
    return {
        "image_to_shape": {b: recall_scores(match_ranks(z, pairs.clouds)) for b, z in pairs.pictures.items()},
        "shape_to_image": {b: recall_scores(match_ranks(pairs.clouds, z)) for b, z in pairs.pictures.items()},
        "chance": chance_scores(len(pairs.rows)),
    }
