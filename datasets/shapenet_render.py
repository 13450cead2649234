"""ShapeNet clouds paired with renderings: the pretraining data set."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.pair_sources import choose_shapes, open_source
from datasets.sampler import SampleKey
from datasets.streams import SampleStreams
from datasets.untrusted import decode_image
from utils.errors import DataError


class ShapeNetRender(Dataset):
    """Pairs of a cloud and a rendering of the same object; each sample reads one cloud and one image file.

    Args:
        root: folder in the released layout, a packed file, or a folder with ``shapenet_render.h5``.
        seed: a sample's view and subset are functions of (seed, epoch, index).
        transform: decoded rendering -> pixels (H, W, 3), such as ``datasets.transforms.RenderPixels``; None: no image.
        only: ids of the shapes to use, as for ``choose_shapes``; None uses all that have a rendering.
        strict: raise if a sample cannot be read. Otherwise substitute the next readable one and explain in the sample's
            ``bad``.
        num_points: points that augmentation will draw per view; None if views keep every point.

    Attributes:
        ids: shapes in use, sorted.
        skipped: shapes of the source without a rendering.
        cloud_size: points of a sample, N: the size of the first cloud, or ``num_points`` if that is larger. Larger
            clouds are cut to a random subset of N; smaller ones repeat points after using each once.
        sizes: points of every cloud, or of the first one only if the sampled clouds have one size.

    Raises:
        DataError: the pairs are missing (``open_source``), or lack a shape of ``only``.
    """

    # Give up after this many consecutive unreadable samples.
    ATTEMPTS = 8

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        seed: int = 1,
        transform: Callable[[Image.Image], Tensor] | None = None,
        only: Iterable[str] | None = None,
        strict: bool = False,
        num_points: int | None = None,
    ) -> None:
        self.source = open_source(root)
        self.seed, self.transform, self.strict = seed, transform, strict
        self._chosen = list(range(len(self.source.ids)))
        if only is not None:
            self._chosen = choose_shapes(self.source.ids, only, where=str(root))
        self.ids = [self.source.ids[i] for i in self._chosen]
        self.skipped = self.source.skipped
        self.sizes = self._look_at_sizes()
        self.root, self.cloud_size = root, self.sizes[0]
        if num_points is not None and max(self.sizes) >= num_points:
            self.cloud_size = max(self.cloud_size, num_points)

    def subset(self, only: Iterable[str]) -> ShapeNetRender:
        """Return a data set of some of these shapes, with the same source and ``cloud_size``."""
        only, part = set(only), copy.copy(self)
        part._chosen = [i for i in self._chosen if self.source.ids[i] in only]
        part.ids = [self.source.ids[i] for i in part._chosen]
        return part

    def check_points(self, num_points: int, *, flag: str) -> None:
        """Check that some clouds have the points that each view draws.

        Raises:
            DataError: none has; the message names the flag.
        """
        if num_points > self.cloud_size:
            raise DataError(f"{flag} {num_points} is more than the clouds of {self.root} have: {max(self.sizes)}")

    def _look_at_sizes(self) -> list[int]:
        """Return the size of the first readable cloud; of all clouds if a sample of them shows that sizes differ."""
        error: DataError | None = None
        first = None
        for i in self._chosen[: self.ATTEMPTS]:
            try:
                first = len(self.source.points(i))
                break
            except DataError as failure:
                error = error or failure
                if self.strict:
                    break
        if first is None:
            raise error
        spread = np.linspace(0, len(self._chosen) - 1, self.ATTEMPTS).round().astype(int)
        if {self.source.size(self._chosen[i]) for i in spread} <= {None, first}:
            return [first]
        sizes = (self.source.size(i) for i in self._chosen)
        return [first, *(size for size in sizes if size is not None)]

    def smaller_than(self, num_points: int) -> int:
        """Return the number of clouds with fewer points; 0 if the sampled clouds have one size."""
        return sum(size < num_points for size in self.sizes[1:])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """Read the sample of (epoch, index); a bare index means epoch 0.

        Returns:
            ``index``: the requested index; ``points``: (N, 3) float32, of which the first ``count`` are not
            repetitions; ``pixels``: from the transform; ``bad``: messages of the unreadable samples that this one
            replaces, usually empty.

        Raises:
            DataError: a sample is unreadable (``strict``), or ``ATTEMPTS`` consecutive ones are.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[dict[str, Any]]:
        """Read the samples of a batch (PyTorch's batched fetch), drawing their random numbers together."""
        keys = [key if isinstance(key, tuple) else SampleKey(0, key) for key in keys]
        for key in keys:
            if not 0 <= key.index < len(self):
                raise IndexError(f"sample {key.index} of {len(self)}")
        draws: dict[SampleKey, float] = {}
        for epoch in {key.epoch for key in keys}:
            of_epoch = [key for key in keys if key.epoch == epoch]
            drawn = self._streams(epoch, [key.index for key in of_epoch]).uniform()
            draws.update(zip(of_epoch, drawn.tolist(), strict=True))
        return [self._sample(key, draws[key]) for key in keys]

    def _streams(self, epoch: int, indices: Sequence[int]) -> SampleStreams:
        return SampleStreams(seed=self.seed, epoch=epoch, index=torch.tensor(indices))

    def _sample(self, key: SampleKey, draw: float) -> dict[str, Any]:
        bad: list[str] = []
        for attempt in range(self.ATTEMPTS):
            try:
                return {**self._read(key, draw, (key.index + attempt) % len(self)), "bad": bad}
            except DataError as error:
                if self.strict or attempt + 1 == self.ATTEMPTS:
                    raise
                bad.append(str(error))
        raise AssertionError("unreachable")

    def _read(self, key: SampleKey, draw: float, stand_in: int) -> dict[str, Any]:
        """Read shape ``stand_in`` with the random numbers of sample ``key``, so that no two samples share them.

        Args:
            key: of the requested sample.
            draw: its first random number, which selects the view.
            stand_in: shape whose files to read.
        """
        i = self._chosen[stand_in]
        points = torch.from_numpy(self.source.points(i))
        count = min(len(points), self.cloud_size)
        if len(points) != self.cloud_size:
            order = self._streams(key.epoch, [key.index]).uniform(1 + len(points))[0, 1:].topk(count).indices
            points = points[order[torch.arange(self.cloud_size) % count]]
        sample = {"index": key.index, "points": points, "count": count}
        if self.transform is not None:
            view = int(draw * len(self.source.view_names(i)))
            image = decode_image(self.source.image_file(i, view), self.source.where(i, view))
            sample["pixels"] = self.transform(image)
        return sample

    def __repr__(self) -> str:
        return f"ShapeNetRender({len(self)} shapes of {self.cloud_size} points, {len(self.skipped)} without rendering)"


def collate_pairs(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Returns:
        ``index`` (B,); ``points`` (B, N, 3); ``counts`` (B,), points of each that are not repetitions; ``bad``, one
        message per replaced sample; and with images ``pixels`` (B, H, W, 3) uint8, padded to the largest height and
        width, and ``sizes`` (B, 2), height and width of each.
    """
    batch = {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "points": torch.stack([sample["points"] for sample in samples]),
        "counts": torch.tensor([sample["count"] for sample in samples]),
        "bad": ["; ".join(sample["bad"]) for sample in samples if sample["bad"]],
    }
    if "pixels" in samples[0]:
        images = [sample["pixels"] for sample in samples]
        sizes = torch.tensor([image.shape[:2] for image in images])
        pixels = torch.zeros(len(images), *sizes.amax(0).tolist(), 3, dtype=torch.uint8)
        for image, canvas in zip(images, pixels, strict=True):
            height, width, _ = image.shape
            canvas[:height, :width] = image
        batch |= {"pixels": pixels, "sizes": sizes}
    return batch
