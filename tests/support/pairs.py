"""Tiny pretraining pairs in the released folder layout, and a tiny labeled set."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from plyfile import PlyData, PlyElement

from tests.support.files import write_h5

MODES = ("RGBA", "RGB", "L", "P")
SIZES = ((20, 20), (33, 17), (8, 40))


def cloud(seed: int, size: int = 48) -> np.ndarray:
    """(size, 3) float32: an ellipsoid whose axes depend on the seed, off the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(size, 3)) * rng.uniform(0.2, 2, 3) + 0.1).astype(np.float32)


def write_ply(path: Path, points: np.ndarray, *, text: bool = False, axes: str = "xyz") -> None:
    """Write a PLY file of float coordinates, ascii or binary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(points), [(axis, "f4") for axis in axes])
    for axis, column in zip(axes, points.T, strict=False):
        rows[axis] = column
    PlyData([PlyElement.describe(rows, "vertex")], text=text).write(path)


def png(seed: int, mode: str = "RGB", size: tuple[int, int] = (20, 20)) -> bytes:
    """Return an encoded picture of smooth colors; RGBA and P have a transparent border."""
    rng = np.random.default_rng(seed)
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colors = rng.uniform(0, 255, (3, 2))
    values = np.stack([a + (b - a) * (x + y) / 2 for a, b in colors], axis=2).astype(np.uint8)
    alpha = np.full((height, width, 1), 255, np.uint8)
    alpha[:2], alpha[:, -2:] = 0, 128
    image = Image.fromarray(np.concatenate([values, alpha], axis=2))
    options = {}
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        options["transparency"] = 3
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def cloud_path(root: Path, name: str) -> Path:
    """Return the cloud file of shape ``<synset>/<model_id>``."""
    return root / "ShapeNet" / f"{name}.ply"


def view_path(root: Path, name: str, view: int = 0) -> Path:
    """Return the file of one rendering."""
    return root / "ShapeNetRendering" / name / "rendering" / f"{view:02d}.png"


def write_pairs(root: Path, shapes: int = 12, *, points: int = 48, views: int = 2, unpaired: int = 0) -> list[str]:
    """Write shapes with ascii and binary clouds and ``views`` to ``views + 2`` pictures of several modes and sizes.

    Returns:
        Sorted ids of the shapes with a rendering; ``unpaired`` more have none.
    """
    names = [f"{'02691156' if i % 2 else '03001627'}/shape{i:02d}" for i in range(shapes + unpaired)]
    for i, name in enumerate(names):
        write_ply(cloud_path(root, name), cloud(i, points), text=i % 2 == 0)
        if i >= shapes:
            continue
        for view in range(views + i % 3):
            path = view_path(root, name, view)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(100 * i + view, MODES[(i + view) % 4], SIZES[i % 3]))
        (path.parent / "rendering_metadata.txt").write_text("0 0 0 1 25\n")
    return sorted(names[:shapes])


def write_demo_set(root: Path, *, points: int = 40, train: int = 10, test: int = 4) -> None:
    """Write a labeled set of balls, plates and rods, read as ``demo``, with ``train`` and ``test`` clouds per class."""
    folder = root / "demo_hdf5"
    stretch = np.array([[1, 1, 1], [1, 0.1, 1], [0.1, 1, 0.1]])
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        labels = np.arange(3 * count) % 3
        clouds = np.random.default_rng(seed).normal(size=(len(labels), points, 3)) * stretch[labels][:, None] / 3
        write_h5(folder / f"ply_data_{split}0.h5", data=clouds.astype("f4"), label=labels[:, None].astype("u1"))
        (folder / f"{split}_files.txt").write_text(f"ply_data_{split}0.h5\n")
    (folder / "shape_names.txt").write_text("ball\nplate\nrod\n")


_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


@contextlib.contextmanager
def files_opened() -> Iterator[list[str]]:
    """Yield the list of paths that Python code opens inside the block, in order, with repetitions."""
    global _opened
    if not getattr(_note_opened, "installed", False):
        sys.addaudithook(_note_opened)  # cannot be taken back; silent outside the block
        _note_opened.installed = True
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None
