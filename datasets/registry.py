"""Open classification sets by name, and find those that are present."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.hdf5 import SPLITS, LabeledClouds
from datasets.modelnet import (
    DEMO_FOLDER,
    MESHES,
    MODELNET10_LABELS,
    RELEASED,
    RESAMPLED,
    DemoShapes,
    ModelNet10,
    ModelNet40,
    find_modelnet,
    find_modelnet_itself,
    listed_files,
)
from datasets.own_clouds import OwnClouds, find_class_folders, own_hdf5_files
from datasets.scanobjectnn import ScanObjectNN, candidate_files
from utils.errors import DataError, UserError

CLASSIFICATION_SETS = ("modelnet40", "modelnet10", "scanobjectnn", "demo", "folder")


def open_classification_set(
    name: str, root: str | Path, split: str, *, variant: str = "OBJ_BG", num_points: int | None = None
) -> LabeledClouds:
    """Open one split of a classification set by its command-line name.

    Args:
        name: one of ``CLASSIFICATION_SETS``.
        root: folder that holds the set.
        split: ``"train"`` or ``"test"``.
        variant: of ScanObjectNN; ignored for other sets.
        num_points: keep the first rows of every cloud; None keeps all.

    Raises:
        ValueError: the name is unknown.
        DataError: a file is missing or wrong.
        UserError: ``num_points`` is larger than the clouds, or the variant is unknown.
    """
    if name == "scanobjectnn":
        return ScanObjectNN(root, split, variant=variant, num_points=num_points)
    readers = {"modelnet40": ModelNet40, "modelnet10": ModelNet10, "demo": DemoShapes, "folder": OwnClouds}
    if name not in readers:
        raise ValueError(f"classification set must be one of {CLASSIFICATION_SETS}, got {name!r}")
    return readers[name](root, split, num_points=num_points)


def find_datasets(data_root: str | Path) -> list[str]:
    """Return the names of the classification sets present in ``data_root``, in the order of the results table.

    Only file locations are checked, with one exception: files in ModelNet40's HDF5 layout with ModelNet10's classes
    alone count as ``modelnet10`` only. ScanObjectNN needs its OBJ_BG variant; ``folder`` is returned only if no other
    set is found.
    """

    def complete(folder: Path | None, prefix: str = "ply_data_") -> bool:
        try:
            return folder is not None and all(listed_files(folder, split, prefix=prefix) for split in SPLITS)
        except DataError:
            return False

    found = []
    forty, ten = find_modelnet_itself(data_root), find_modelnet(data_root, "modelnet10")
    if forty is not None and forty.name in (RESAMPLED, MESHES):
        found += ["modelnet40", "modelnet10"]
    elif forty is not None and complete(forty.folder, "ply_data_" if forty.name == RELEASED else "*"):
        try:
            labels = np.unique(ModelNet40(data_root, "test", num_points=1).labels)
        except UserError:
            labels = np.array([])  # opening the set reports a damaged file
        if not np.isin(labels, MODELNET10_LABELS).all() or not len(labels):
            found.append("modelnet40")
        found.append("modelnet10")
    elif ten is not None:
        found.append("modelnet10")
    if all(any(file.is_file() for file in candidate_files(data_root, split, "OBJ_BG")) for split in SPLITS):
        found.append("scanobjectnn")
    demo = Path(data_root) / DEMO_FOLDER
    if demo.is_dir() and complete(demo):
        found.append("demo")
    if not found and (find_class_folders(data_root) or own_hdf5_files(data_root)):
        found.append("folder")
    return found
