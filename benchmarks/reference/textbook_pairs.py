"""Pretraining pairs in the plain way: what the benchmarks compare the data path with.

As docs/fidelity.md describes the released code: every view reads its own file (two PLY, two PNG a sample), a cloud is
augmented by NumPy and an image by Pillow and torchvision, one sample at a time.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plyfile import PlyData
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def read_cloud(path: Path) -> np.ndarray:
    """(N, 3) float32."""
    vertex = PlyData.read(str(path))["vertex"]
    return np.stack([vertex["x"], vertex["y"], vertex["z"]], axis=1).astype(np.float32)


def augment_cloud(points: np.ndarray) -> Tensor:
    """Normalize, scale, rotate about y, shift, jitter, drop points: (N, 3) -> (N, 3)."""
    points = points - points.mean(axis=0)
    points = points / np.sqrt((points**2).sum(axis=1)).max()
    points = points * np.random.uniform(0.5, 2)
    angle = np.random.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    extent = points.max(axis=0) - points.min(axis=0)
    points = points + extent * np.random.uniform(-0.5, 0.5, 3)
    points = points + np.clip(0.01 * np.random.randn(*points.shape), -0.05, 0.05)
    dropped = np.random.random(len(points)) <= np.random.uniform(0, 0.875)
    points[dropped] = points[0]
    return torch.from_numpy(points.astype(np.float32))


class TextbookPairs(Dataset):
    """(view 1, view 2, color image, gray image) of every shape with a rendering.

    Args:
        root: the released folder layout.
        size: of the images in pixels.
    """

    def __init__(self, root: Path, *, size: int = 224) -> None:
        self.pairs = []
        for cloud in sorted((Path(root) / "ShapeNet").glob("*/*.ply")):
            folder = Path(root) / "ShapeNetRendering" / cloud.parent.name / cloud.stem / "rendering"
            if views := sorted(folder.glob("*.png")):
                self.pairs.append((cloud, views))
        flip, resize = T.RandomHorizontalFlip(), T.Resize((size, size))
        self.rgb = T.Compose(
            [resize, T.ColorJitter(0.4, 0.4, 0.4), flip, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        self.gray = T.Compose(
            [T.Grayscale(1), resize, flip, T.ToTensor(), T.Normalize(IMAGENET_MEAN[:1], IMAGENET_STD[:1])]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cloud, views = self.pairs[i]
        view = random.choice(views)
        return (
            augment_cloud(read_cloud(cloud)),
            augment_cloud(read_cloud(cloud)),
            self.rgb(Image.open(view).convert("RGB")),
            self.gray(Image.open(view).convert("L")),
        )
