"""Augmentations of the pretraining pairs (settings in ``docs/fidelity.md``).

Point transforms are pure functions of whole batches (B, N, 3) on the batch's device, with one random stream per sample.
Renderings are decoded one at a time in the data-loading processes, and augmented in batches in the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from datasets.streams import SampleStreams, Stream

PointTransform = Callable[[Tensor, SampleStreams], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Color behind transparent pixels; None drops alpha like the released reader, which reveals the hidden color.
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (127, 127, 127), "released": None}


@dataclass(frozen=True)
class RandomSubset:
    """Keep ``num_points`` random points; return a cloud of that size unchanged.

    Raises:
        ValueError: the clouds have fewer points.
    """

    num_points: int

    def __call__(self, points: Tensor, streams: SampleStreams, counts: Tensor | None = None) -> Tensor:
        """(B, N, 3) -> (B, num_points, 3).

        Args:
            points: clouds.
            streams: random numbers.
            counts: (B,) points of each cloud that are not repetitions; repetitions are drawn only if these are too few.
                None: no point is a repetition.
        """
        n = points.shape[1]
        if n < self.num_points:
            raise ValueError(f"cannot draw {self.num_points} points from clouds of {n}")
        if n == self.num_points:
            return points
        order = streams.uniform(n)  # (B, N) in 0..1
        if counts is not None:
            order = order - (torch.arange(n, device=order.device) >= counts[:, None]).to(order.dtype)
        chosen = order.topk(self.num_points, dim=1).indices  # (B, num_points)
        return points.gather(1, chosen[:, :, None].expand(-1, -1, points.shape[2]))


@dataclass(frozen=True)
class NormalizeToUnitSphere:
    """Center each cloud on its mean and scale its farthest point to distance 1."""

    def __call__(self, points: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        points = points - points.mean(1, keepdim=True)
        radius = points.norm(dim=2).amax(1)[:, None, None]  # (B, 1, 1)
        return points / radius.clamp_min(torch.finfo(points.dtype).tiny)


@dataclass(frozen=True)
class RandomScale:
    """Scale all axes by one factor, uniform in [low, high)."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points * streams.uniform(1, 1, low=self.low, high=self.high)


@dataclass(frozen=True)
class RandomScaleAxes:
    """Scale each axis by a separate factor, uniform in [low, high)."""

    low: float = 2 / 3
    high: float = 3 / 2

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points * streams.uniform(1, 3, low=self.low, high=self.high)


@dataclass(frozen=True)
class RandomShift:
    """Shift along each axis by up to ``distance`` in either direction, regardless of the cloud's size."""

    distance: float = 0.2

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        return points + streams.uniform(1, 3, low=-self.distance, high=self.distance)


@dataclass(frozen=True)
class RandomRotateY:
    """Rotate about the y axis (up) by an angle uniform in [0, 2 pi)."""

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        angle = streams.uniform(1, high=2 * math.pi)  # (B, 1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        x, y, z = points.unbind(2)  # each (B, N)
        return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=2)


@dataclass(frozen=True)
class RandomTranslate:
    """Shift along each axis by up to ``fraction`` of the cloud's extent in either direction."""

    fraction: float = 0.5

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        extent = points.amax(1, keepdim=True) - points.amin(1, keepdim=True)  # (B, 1, 3)
        return points + extent * streams.uniform(1, 3, low=-self.fraction, high=self.fraction)


@dataclass(frozen=True)
class RandomJitter:
    """Add Gaussian noise, clipped at +-clip, to every coordinate."""

    std: float = 0.01
    clip: float = 0.05

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        noise = self.std * streams.normal(*points.shape[1:])  # (B, N, 3)
        return points + noise.clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class RandomInputDropout:
    """Replace a ratio of the points, uniform in [0, max_ratio), by copies of point 0."""

    max_ratio: float = 0.875

    def __call__(self, points: Tensor, streams: SampleStreams) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        ratio = streams.uniform(1, high=self.max_ratio)
        dropped = streams.uniform(points.shape[1]) < ratio  # (B, N)
        return torch.where(dropped[:, :, None], points[:, :1], points)


@dataclass(frozen=True)
class PointAugmentation:
    """Apply point transforms in sequence.

    Args:
        transforms: applied in order.
    """

    transforms: Sequence[PointTransform]

    def __call__(self, points: Tensor, streams: SampleStreams, counts: Tensor | None = None) -> Tensor:
        """(B, N, 3) -> (B, M, 3); ``counts`` as for :class:`RandomSubset`."""
        for transform in self.transforms:
            known = {"counts": counts} if isinstance(transform, RandomSubset) else {}
            points = transform(points, streams, **known)
        return points


# Random transforms of the views, in the released order; the names are those of --without.
POINT_AUGMENTATIONS: Mapping[str, Callable[[], PointTransform]] = {
    "scale": RandomScale,
    "rotate": RandomRotateY,
    "translate": RandomTranslate,
    "jitter": RandomJitter,
    "dropout": RandomInputDropout,
}
AUGMENTATIONS = (*POINT_AUGMENTATIONS, "color", "flip")


def pretraining_augmentation(num_points: int | None = None, *, without: Collection[str] = ()) -> PointAugmentation:
    """Return the augmentation of both views, in the released order.

    Args:
        num_points: points of a view; each view draws a separate random subset of a larger cloud. None keeps every
            point.
        without: names of ``AUGMENTATIONS`` to leave out, for ablations.
    """
    subset = [] if num_points is None else [RandomSubset(num_points)]
    random = [transform() for name, transform in POINT_AUGMENTATIONS.items() if name not in without]
    return PointAugmentation([*subset, NormalizeToUnitSphere(), *random])


def fine_tuning_augmentation() -> PointAugmentation:
    """Return the released augmentation for supervised classification: scale each axis, then shift."""
    return PointAugmentation([RandomScaleAxes(), RandomShift()])


@dataclass(frozen=True)
class RenderPixels:
    """Convert a decoded rendering to pixels (H, W, 3) uint8; ``RenderAugmentation`` does the rest in batches.

    Args:
        size: renderings with more than size x size pixels are resized to it here, as the augmentation would do first.
            Smaller ones are not, because fewer pixels are faster to copy.
        background: a key of ``BACKGROUNDS``, for transparent pixels.
    """

    size: int = 224
    _: KW_ONLY
    background: str = "black"

    def flatten(self, image: Image.Image) -> Image.Image:
        """Convert an image of any PNG mode to RGB on the chosen background."""
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        color = BACKGROUNDS[self.background]
        if color and ("A" in image.getbands() or "transparency" in image.info):
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (*color, 255))
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels, (H, W, 3) uint8."""
        image = self.flatten(image)
        if image.width * image.height > self.size * self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))


def luminance(images: Tensor) -> Tensor:
    """Convert (B, 3, H, W) float32 integers in 0..255 to gray (B, 1, H, W) by ITU-R 601, rounded like Pillow.

    The weights are in 1/65536, so every intermediate is an integer below 2^24 and exact on any device.
    """
    red, green, blue = images.split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(1 << 15).mul_(2.0**-16).floor_()


def jitter_colors(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Jitter brightness, contrast and saturation, in a separate order for each image.

    Each blends the image with a gray one, f image + (1 - f) gray: black for brightness, the image's mean luminance for
    contrast, its luminance for saturation. After each, values are clipped and rounded down, like Pillow's.

    Args:
        images: (B, 3, H, W) float32, integers in 0..255.
        factors: (B, 3) factors f of brightness, contrast and saturation.
        order: (B, 3) order of the three as indices.

    Returns:
        (B, 3, H, W) float32, integers in 0..255.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for which in order[:, :, None, None, None].unbind(1):  # (B, 1, 1, 1)
        gray = luminance(images)  # (B, 1, H, W)
        # Without the exact sum in double precision, a sample would depend on its batch.
        mean = gray.mean((2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().to(gray.dtype)
        gray = torch.where(which == 1, mean, gray).mul_(which != 0)
        factor = factors.gather(1, which.flatten(1))[:, :, None, None]  # (B, 1, 1, 1)
        images.sub_(gray).mul_(factor).add_(gray).clamp_(0, 255).floor_()
    return images


def resize_and_flip(images: Tensor, size: int, flip: Tensor) -> Tensor:
    """Resize (B, C, H, W) uint8 to (B, C, size, size), bilinear, and flip images horizontally where ``flip`` (B,)."""
    if images.shape[2:] != (size, size):
        images = v2.functional.resize(images, [size, size], antialias=True)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def normalize_images(images: Tensor) -> Tensor:
    """Normalize (B, C, H, W) in 0..255 by ImageNet's mean and standard deviation of the first C channels."""
    scale, shift = _imagenet_constants(images.shape[1], images.device)
    return torch.addcmul(shift, images, scale)


@functools.cache
def _imagenet_constants(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the scale and shift (C, 1, 1) that normalize 0..255; cached, since copying them to a device is slow."""
    mean, std = (torch.tensor(x[:channels], device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return 1 / (255 * std), -mean / std


def plain_images(pixels: Tensor, size: int) -> dict[str, Tensor]:
    """Return the images of :class:`RenderAugmentation` without what is random: no jitter, no flips. For evaluation.

    Args:
        pixels: (B, H, W, 3) uint8, without padding.
        size: S in pixels.

    Returns:
        ``rgb`` (B, 3, S, S) and ``gray`` (B, 1, S, S) float32.
    """
    images = pixels.permute(0, 3, 1, 2)  # (B, 3, H, W)
    keep = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    gray = luminance(images.float()).byte()  # (B, 1, H, W)
    return {
        name: normalize_images(resize_and_flip(part, size, keep).float())
        for name, part in (("rgb", images), ("gray", gray))
    }


@dataclass(frozen=True)
class RenderAugmentation:
    """Augment the pixels of a batch into color images (B, 3, S, S) and gray images (B, 1, S, S).

    Color: resize, color jitter, horizontal flip, ImageNet normalization. Gray: luminance, resize, an independent
    horizontal flip, normalization of the first channel, no jitter.

    Args:
        size: S in pixels.
        modality: ``both``, ``rgb`` or ``gray``; only these are computed.
        strength: of the jitter; its factors are uniform in [1 - strength, 1 + strength).
        flip: probability of a flip.
    """

    # Larger chunks fall out of the CPU's cache; a GPU processes the whole batch at once.
    CPU_CHUNK = 4

    size: int = 224
    _: KW_ONLY
    modality: str = "both"
    strength: float = 0.4
    flip: float = 0.5

    def __call__(self, pixels: Tensor, sizes: Tensor, streams: SampleStreams) -> dict[str, Tensor]:
        """Augment a batch, drawing the same random numbers for every modality.

        Args:
            pixels: (B, H, W, 3) uint8 on the target device.
            sizes: (B, 2) height and width of each rendering; the padding beyond is ignored. In host memory, since
                tensor shapes depend on it.
            streams: of the batch's samples, on the same device as ``pixels``.

        Returns:
            ``rgb`` and ``gray``, float32, as selected by ``modality``.
        """
        device = pixels.device
        factors = streams.uniform(3, low=1 - self.strength, high=1 + self.strength)
        order = streams.uniform(3).argsort(1)
        flips = streams.uniform(2) < self.flip
        out = {
            name: torch.empty(len(pixels), channels, self.size, self.size, device=device)
            for name, channels in (("rgb", 3), ("gray", 1))
            if self.modality in ("both", name)
        }
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, (height, width) in enumerate(sizes.tolist()):
            rows_of.setdefault((height, width), []).append(row)
        for (height, width), numbers in rows_of.items():
            # Usually all renderings have one size; then no index is copied to the device.
            every = torch.arange(len(pixels), device=device)
            if len(rows_of) > 1:
                every = torch.tensor(numbers).to(device, non_blocking=True)
            for rows in every.split(self.CPU_CHUNK if device.type == "cpu" else len(every)):
                images = pixels[rows, :height, :width].permute(0, 3, 1, 2)  # (rows, 3, height, width)
                if "rgb" in out:
                    rgb = resize_and_flip(images, self.size, flips[rows, 0]).float()
                    out["rgb"][rows] = normalize_images(jitter_colors(rgb, factors[rows], order[rows]))
                if "gray" in out:
                    gray = resize_and_flip(luminance(images.float()).byte(), self.size, flips[rows, 1])
                    out["gray"][rows] = normalize_images(gray.float())
        return out


class PairAugmentation:
    """Turn a batch of pairs into the inputs of ``CrossNet``: two views of each cloud, and images.

    Args:
        num_points: see ``pretraining_augmentation``.
        image_size: pixels of an image's side.
        modality: see ``RenderAugmentation``.
        channels_last: memory format of the images.
        without: names of ``AUGMENTATIONS`` to leave out, for ablations.
        seed: with epoch and index of a sample, the seed of its random numbers.
    """

    def __init__(
        self,
        *,
        num_points: int | None = None,
        image_size: int = 224,
        modality: str = "both",
        channels_last: bool = False,
        without: Collection[str] = (),
        seed: int = 1,
    ) -> None:
        self.points = pretraining_augmentation(num_points, without=without)
        left_out = {**({"strength": 0.0} if "color" in without else {}), **({"flip": 0.0} if "flip" in without else {})}
        self.renderings = RenderAugmentation(image_size, modality=modality, **left_out)
        self.channels_last, self.seed = channels_last, seed

    def __call__(self, batch: Mapping[str, Tensor], *, epoch: int, device: torch.device) -> dict[str, Tensor]:
        """Move a batch of ``collate_pairs`` to the device and augment it.

        Returns:
            ``view1`` and ``view2`` (B, 3, N), and the images of ``RenderAugmentation``.
        """
        tensors = {name: batch[name].to(device, non_blocking=True) for name in ("index", "points", "counts", "pixels")}
        keys = {"seed": self.seed, "epoch": epoch, "index": tensors["index"]}
        streams = SampleStreams(**keys, purpose=Stream.RENDERING)
        images = self.renderings(tensors["pixels"], batch["sizes"], streams)
        if self.channels_last:
            images = {name: image.contiguous(memory_format=torch.channels_last) for name, image in images.items()}
        streams = SampleStreams(**keys, purpose=Stream.AUGMENTATION)
        view1 = self.points(tensors["points"], streams, tensors["counts"]).mT
        view2 = self.points(tensors["points"], streams, tensors["counts"]).mT
        return {"view1": view1, "view2": view2, **images}
