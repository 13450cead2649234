"""Labeled clouds and meshes as users have them: every format, uneven sizes, ModelNet in all its layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.modelnet import MODELNET40_CLASSES
from tests.support.files import write_h5
from tests.support.pairs import write_ply

STRETCH = {"ball": (1, 1, 1), "plate": (1, 0.1, 1), "rod": (0.1, 1, 0.1), "beam": (1, 0.1, 0.3), "egg": (1, 1.6, 1)}
FORMATS = ("ply", "txt", "xyz", "npy", "pcd", "off")


def stretched(name: str, seed: int, size: int) -> np.ndarray:
    """Return (size, 3) float32 points of a class of ``STRETCH``, off the origin and with random scale."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(size, 3)) * STRETCH[name] * rng.uniform(1, 50) + 3).astype("f4")


def write_shape(path: Path, points: np.ndarray) -> None:
    """Write a cloud in the format of the path's suffix; OFF gets triangles between successive points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    rows = "".join(f"{x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in points)
    if suffix == ".ply":
        write_ply(path, points)
    elif suffix == ".npy":
        np.save(path, points)
    elif suffix == ".off":
        faces = "".join(f"3 {i} {i + 1} {i + 2}\n" for i in range(len(points) - 2))
        path.write_text(f"OFF\n{len(points)} {len(points) - 2} 0\n{rows}{faces}")
    elif suffix == ".pcd":
        header = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        path.write_text(f"{header}WIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA ascii\n{rows}")
    else:
        path.write_text(rows)


def write_class_folders(root: Path, *, train: int = 6, test: int = 3, nested: bool = False) -> None:
    """Write five classes with ``train`` and ``test`` clouds of 20 to 90 points each, cycling through the formats.

    Args:
        root: folder to write into.
        train: training clouds per class.
        test: test clouds per class.
        nested: ``<class>/<split>/*`` instead of ``<split>/<class>/*``.
    """
    number = 0
    for split, count in (("train", train), ("test", test)):
        for name in STRETCH:
            for i in range(count):
                folder = root / name / split if nested else root / split / name
                path = folder / f"{i}.{FORMATS[number % len(FORMATS)]}"
                write_shape(path, stretched(name, number, 20 + number % 71))
                number += 1


# --- ModelNet's layouts: two training clouds and a test cloud of some classes ---

MODELNET_CLASSES = ("airplane", "bathtub", "night_stand", "xbox")


def _members() -> list[tuple[str, str, int]]:
    counts = (("train", 2), ("test", 1))
    return [(split, name, i + 1) for split, count in counts for name in MODELNET_CLASSES for i in range(count)]


def write_resampled(root: Path, *, points: int = 30) -> Path:
    """Write ``modelnet40_normal_resampled``, with the lists of ModelNet10 too."""
    folder = root / "modelnet40_normal_resampled"
    listed: dict[str, list[str]] = {}
    for number, (split, name, i) in enumerate(_members()):
        shape = f"{name}_{i + 2 * (split == 'test'):04d}"
        listed.setdefault(f"modelnet40_{split}.txt", []).append(shape)
        if name in ("bathtub", "night_stand"):
            listed.setdefault(f"modelnet10_{split}.txt", []).append(shape)
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = np.random.default_rng(number).normal(size=(points, 6))
        np.savetxt(folder / name / f"{shape}.txt", rows, fmt="%.6f", delimiter=",")
    for file, shapes in listed.items():
        (folder / file).write_text("\n".join(shapes) + "\n")
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(MODELNET40_CLASSES) + "\n")
    return folder


def write_meshes(root: Path, name: str = "ModelNet40") -> Path:
    """Write folders of OFF meshes like ModelNet's: bars along z, which is up there."""
    chosen = [member for member in _members() if name == "ModelNet40" or member[1] in ("bathtub", "night_stand")]
    for number, (split, label, i) in enumerate(chosen):
        points = np.random.default_rng(number).normal(size=(30, 3)) * (0.1, 0.2, 4) + (5, 0, 0)
        write_shape(root / name / label / split / f"{label}_{i:04d}.off", points)
    return root / name


def write_point_cloud_datasets(root: Path, name: str = "modelnet40", *, points: int = 30) -> Path:
    """Write the HDF5 files of PointCloudDatasets: ``train0.h5``, ``train1.h5``, ``test0.h5``."""
    folder = root / f"{name}_hdf5_2048"
    labels = [MODELNET40_CLASSES.index(label) for label in MODELNET_CLASSES] if name == "modelnet40" else [0, 9]
    for number, file in enumerate(("train0", "train1", "test0")):
        clouds = np.random.default_rng(number).normal(size=(len(labels), points, 3)).astype("f4")
        write_h5(folder / f"{file}.h5", data=clouds, label=np.array(labels, "u1")[:, None])
    return folder
