"""Augmentations of the pretraining pairs (settings in ``docs/fidelity.md``).

Point transforms are pure functions of whole batches (B, N, 3), on the batch's device, with one random stream per
sample. Renderings are decoded one at a time, by the processes that read data, and augmented in batch likewise.
"""

from __future__ import annotations

import functools
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
# What transparent pixels are composited on; None drops alpha, as the released reader does, and shows the hidden color.
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (127, 127, 127), "released": None}


class RandomSubset:
    """Keep ``num_points`` points at random; a cloud of that size is left as it is.

    Raises:
        ValueError: the clouds have fewer points.
    """

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points

    def __call__(self, points: Tensor, streams: SampleStreams, counts: Tensor | None = None) -> Tensor:
        """(B, N, 3) -> (B, num_points, 3).

        Args:
            points: clouds.
            streams: random numbers.
            counts: (B,) points of each cloud that are not repetitions; repetitions are drawn only where these are too
                few. None: all.
        """
        n = points.shape[1]
        if n < self.num_points:
            raise ValueError(f"{self.num_points} points were asked of clouds of {n}")
        if n == self.num_points:
            return points
        order = streams.uniform(n)  # (B, N) in 0..1
        if counts is not None:
            order = order - (torch.arange(n, device=order.device) >= counts[:, None]).to(order.dtype)
        chosen = order.topk(self.num_points, dim=1).indices
        return points.gather(1, chosen[:, :, None].expand(-1, -1, points.shape[2]))

    def __repr__(self) -> str:
        return f"RandomSubset({self.num_points})"


class NormalizeToUnitSphere:
    """Center each cloud on its mean and scale it so that its farthest point has distance 1."""

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

    def __call__(self, points: Tensor, streams: SampleStreams, counts: Tensor | None = None) -> Tensor:
        """(B, N, 3) -> (B, M, 3); ``counts`` as for :class:`RandomSubset`."""
        for transform in self.transforms:
            known = {"counts": counts} if isinstance(transform, RandomSubset) else {}
            points = transform(points, streams, **known)
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


class RenderPixels:
    """A decoded rendering -> its pixels (H, W, 3) uint8. What is left to do is done in batches: ``RenderAugmentation``.

    Args:
        size: a rendering with more than size x size pixels is resized to that here, as the augmentation would do first;
            a smaller one is left to it, because fewer pixels are quicker to move.
        background: what becomes of transparent pixels, a key of ``BACKGROUNDS``.
    """

    def __init__(self, size: int = 224, *, background: str = "black") -> None:
        self.size, self.background = size, background

    def flatten(self, image: Image.Image) -> Image.Image:
        """Any PNG mode -> RGB on the chosen background."""
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would cut off at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        color = BACKGROUNDS[self.background]
        if color and ("A" in image.getbands() or "transparency" in image.info):
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (*color, 255))
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")

    def __call__(self, image: Image.Image) -> Tensor:
        """(H, W, 3) uint8."""
        image = self.flatten(image)
        if image.width * image.height > self.size * self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))

    def __repr__(self) -> str:
        return f"RenderPixels({self.size}, background={self.background!r})"


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) float32 of whole numbers 0 to 255 -> (B, 1, H, W) likewise, ITU-R 601, rounded as Pillow does.

    The weights are in 65536ths: every intermediate is a whole number below 2^24, hence exact on any device.
    """
    red, green, blue = images.split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(1 << 15).mul_(2.0**-16).floor_()


def jitter_colors(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation, for every image in an order of its own.

    Each mixes the image with a gray one, f image + (1 - f) gray: black for brightness, the image's mean luminance for
    contrast, its luminance for saturation. After each the values are cut off and rounded down, as Pillow's are.

    Args:
        images: (B, 3, H, W) float32, whole numbers 0 to 255.
        factors: (B, 3) f of brightness, contrast and saturation.
        order: (B, 3) numbers of the three in the order in which they are applied.

    Returns:
        As ``images``.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for which in order[:, :, None, None, None].unbind(1):  # (B, 1, 1, 1)
        gray = luminance(images)
        # Summed in double precision, which is exact: a sample must not depend on the batch it is in.
        mean = gray.mean((2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().to(gray.dtype)
        gray = torch.where(which == 1, mean, gray).mul_(which != 0)
        factor = factors.gather(1, which.flatten(1))[:, :, None, None]
        images.sub_(gray).mul_(factor).add_(gray).clamp_(0, 255).floor_()
    return images


def resize_and_flip(images: Tensor, size: int, flip: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, size, size) uint8, bilinear; mirrored left to right where ``flip`` (B,) says so."""
    if images.shape[2:] != (size, size):
        images = v2.functional.resize(images, [size, size], antialias=True)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def normalize_images(images: Tensor) -> Tensor:
    """(B, C, H, W) of 0 to 255 -> by ImageNet's mean and deviation of the first C of red, green and blue."""
    scale, shift = _imagenet_constants(images.shape[1], images.device)
    return torch.addcmul(shift, images, scale)


@functools.cache
def _imagenet_constants(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand (C, 1, 1) that bring 0 to 255 to mean 0 and deviation 1; kept, copying them takes time."""
    mean, std = (torch.tensor(x[:channels], device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return 1 / (255 * std), -mean / std


class RenderAugmentation:
    """Pixels of a batch of renderings -> color images (B, 3, S, S) and gray images (B, 1, S, S) on the device.

    Color: resize, color jitter, horizontal flip, ImageNet normalization. Gray: luminance, resize, horizontal flip of
    its own, first channel's normalization, no jitter.

    Args:
        size: S in pixels.
        modality: ``both``, ``rgb`` or ``gray``; what is not wanted is not computed.
        strength: of the jitter; its factors are uniform in [1 - strength, 1 + strength).
    """

    # Images taken together on a CPU: so many stay in its cache. A GPU takes all at once.
    CPU_CHUNK = 4

    def __init__(self, size: int = 224, *, modality: str = "both", strength: float = 0.4) -> None:
        self.size, self.modality, self.strength = size, modality, strength

    def __call__(self, pixels: Tensor, sizes: Tensor, streams: SampleStreams) -> dict[str, Tensor]:
        """Augment; draws the same numbers whatever is wanted.

        Args:
            pixels: (B, H, W, 3) uint8 on the device wanted.
            sizes: (B, 2) height and width of each rendering; what lies beyond is not looked at. In host memory, since
                the shapes of what follows depend on it.
            streams: of the batch's samples, on the same device as ``pixels``.

        Returns:
            ``rgb`` and ``gray``, float32, as far as wanted.
        """
        device = pixels.device
        factors = streams.uniform(3, low=1 - self.strength, high=1 + self.strength)
        order = streams.uniform(3).argsort(1)
        flips = streams.uniform(2) < 0.5
        out = {
            name: torch.empty(len(pixels), channels, self.size, self.size, device=device)
            for name, channels in (("rgb", 3), ("gray", 1))
            if self.modality in ("both", name)
        }
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, (height, width) in enumerate(sizes.tolist()):
            rows_of.setdefault((height, width), []).append(row)
        for (height, width), numbers in rows_of.items():
            # Mostly all renderings have one size, and nothing is copied to the device.
            every = torch.arange(len(pixels), device=device)
            if len(rows_of) > 1:
                every = torch.tensor(numbers).to(device, non_blocking=True)
            for rows in every.split(self.CPU_CHUNK if device.type == "cpu" else len(every)):
                images = pixels[rows, :height, :width].permute(0, 3, 1, 2)
                if "rgb" in out:
                    rgb = resize_and_flip(images, self.size, flips[rows, 0]).float()
                    out["rgb"][rows] = normalize_images(jitter_colors(rgb, factors[rows], order[rows]))
                if "gray" in out:
                    gray = resize_and_flip(luminance(images.float()).byte(), self.size, flips[rows, 1])
                    out["gray"][rows] = normalize_images(gray.float())
        return out

    def __repr__(self) -> str:
        return f"RenderAugmentation({self.size}, modality={self.modality!r}, strength={self.strength})"
