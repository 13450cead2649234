"""Augmentations of the pretraining pairs (settings in ``docs/fidelity.md``).

Point transforms are pure functions of whole batches (B, N, 3), on the batch's device, with one random stream per
sample.
Image transforms are torchvision's, one image at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from datasets.streams import SampleStreams

PointTransform = Callable[[Tensor, SampleStreams], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (127, 127, 127)}


class RandomSubset:
    """Keep ``num_points`` points at random; a cloud of that size is left as it is.

    Raises:
        ValueError: the clouds have fewer points.
    """

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, num_points, 3)."""
        n = points.shape[1]
        if n < self.num_points:
            raise ValueError(f"{self.num_points} points were asked of clouds of {n}")
        if n == self.num_points:
            return points
        chosen = streams.uniform(n).topk(self.num_points, dim=1).indices
        return points.gather(1, chosen[:, :, None].expand(-1, -1, points.shape[2]))

    def __repr__(self) -> str:
        return f"RandomSubset({self.num_points})"


class NormalizeToUnitSphere:
    """Centre each cloud on its mean and scale it so that its farthest point has distance 1."""

    def __call__(self, points: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        points = points - points.mean(1, keepdim=True)
        radius = points.norm(dim=2).amax(1)[:, None, None]
        return points / radius.clamp_min(torch.finfo(points.dtype).tiny)

    def __repr__(self) -> str:
        return "NormalizeToUnitSphere()"


class RandomScale:
    """Scale by one factor for all axes, uniform in [low, high)."""

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        self.low, self.high = low, high

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points * streams.uniform(1, 1, low=self.low, high=self.high)

    def __repr__(self) -> str:
        return f"RandomScale({self.low}, {self.high})"


class RandomScaleAxes:
    """Scale each axis by a factor of its own, uniform in [low, high)."""

    def __init__(self, low: float = 2 / 3, high: float = 3 / 2) -> None:
        self.low, self.high = low, high

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points * streams.uniform(1, 3, low=self.low, high=self.high)

    def __repr__(self) -> str:
        return f"RandomScaleAxes({self.low:.4g}, {self.high:.4g})"


class RandomShift:
    """Shift along each axis by up to ``distance`` either way, whatever the cloud's size."""

    def __init__(self, distance: float = 0.2) -> None:
        self.distance = distance

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points + streams.uniform(1, 3, low=-self.distance, high=self.distance)

    def __repr__(self) -> str:
        return f"RandomShift({self.distance})"


class RandomRotateY:
    """Rotate about the y axis (up) by an angle uniform in [0, 2 pi)."""

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        angle = streams.uniform(1, high=2 * math.pi)
        cos, sin = torch.cos(angle), torch.sin(angle)
        x, y, z = points.unbind(2)
        return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=2)

    def __repr__(self) -> str:
        return "RandomRotateY()"


class RandomTranslate:
    """Shift along each axis by up to ``fraction`` of the cloud's extent along it, either way."""

    def __init__(self, fraction: float = 0.5) -> None:
        self.fraction = fraction

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        extent = points.amax(1, keepdim=True) - points.amin(1, keepdim=True)
        return points + extent * streams.uniform(1, 3, low=-self.fraction, high=self.fraction)

    def __repr__(self) -> str:
        return f"RandomTranslate({self.fraction})"


class RandomJitter:
    """Add Gaussian noise to every coordinate, cut off at +-clip."""

    def __init__(self, std: float = 0.01, clip: float = 0.05) -> None:
        self.std, self.clip = std, clip

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        noise = self.std * streams.normal(*points.shape[1:])
        return points + noise.clamp(-self.clip, self.clip)

    def __repr__(self) -> str:
        return f"RandomJitter(std={self.std}, clip={self.clip})"


class RandomInputDropout:
    """Drop points at a ratio uniform in [0, max_ratio); a dropped point becomes a copy of point 0."""

    def __init__(self, max_ratio: float = 0.875) -> None:
        self.max_ratio = max_ratio

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        ratio = streams.uniform(1, high=self.max_ratio)
        dropped = streams.uniform(points.shape[1]) < ratio
        return torch.where(dropped[:, :, None], points[:, :1], points)

    def __repr__(self) -> str:
        return f"RandomInputDropout({self.max_ratio})"


class PointAugmentation:
    """Point transforms one after another.

    Args:
        transforms: applied in order.
    """

    def __init__(self, transforms: Sequence[PointTransform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, M, 3)."""
        for transform in self.transforms:
            points = transform(points, streams)
        return points

    def __repr__(self) -> str:
        return f"PointAugmentation({self.transforms})"


def pretraining_augmentation(num_points: int | None = None) -> PointAugmentation:
    """The augmentation of both views, in the released order.

    Args:
        num_points: size of a view; each view of a larger cloud is a random subset of its own. None keeps every point.
    """
    subset = [] if num_points is None else [RandomSubset(num_points)]
    return PointAugmentation(
        [
            *subset,
            NormalizeToUnitSphere(),
            RandomScale(),
            RandomRotateY(),
            RandomTranslate(),
            RandomJitter(),
            RandomInputDropout(),
        ]
    )


def fine_tuning_augmentation() -> PointAugmentation:
    """The released augmentation of supervised classification: scale each axis, then shift."""
    return PointAugmentation([RandomScaleAxes(), RandomShift()])


class RenderTransform:
    """A decoded render -> colour tensor (3, S, S) and gray tensor (1, S, S).

    Colour: resize, colour jitter, horizontal flip, ImageNet normalisation. Gray: luminance, resize, horizontal flip of
    its own, first channel's normalisation, no jitter.

    Args:
        size: S in pixels.
        background: what transparent pixels are composited on, a key of ``BACKGROUNDS``.
        modality: ``both``, ``rgb`` or ``gray``; what is not wanted is not computed.
    """

    def __init__(self, size: int = 224, *, background: str = "black", modality: str = "both") -> None:
        self.size, self.background, self.modality = size, background, modality
        self.rgb = v2.Compose(
            [
                v2.Resize((size, size), antialias=True),
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        self.gray = v2.Compose(
            [
                v2.Resize((size, size), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN[:1], IMAGENET_STD[:1]),
            ]
        )

    def flatten(self, image: Image.Image) -> Image.Image:
        """Any PNG mode -> RGB on the chosen background."""
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would cut off at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (*BACKGROUNDS[self.background], 255))
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")

    def __call__(self, image: Image.Image, seed: int) -> dict[str, Tensor]:
        """Transform with randomness from ``seed`` alone; the caller's random state is left as it was."""
        image = self.flatten(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = {}
            if self.modality in ("both", "rgb"):
                out["rgb"] = self.rgb(image)
            if self.modality in ("both", "gray"):
                out["gray"] = self.gray(image.convert("L"))
        return out

    def __repr__(self) -> str:
        return f"RenderTransform({self.size}, background={self.background!r}, modality={self.modality!r})"
