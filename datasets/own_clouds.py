"""Labeled clouds of any classes: user files in class folders, or HDF5 files.

Class folders are ``<root>/<split>/<class>/*`` or, like ModelNet's, ``<root>/<class>/<split>/*``, with the splits
``train`` and ``test`` and files in any format that ``datasets.shape_reader`` reads.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.hdf5 import CHECK_COMMAND, SPLITS, CloudArrays, ReadClouds, read_class_names, read_hdf5_clouds
from datasets.shape_reader import DEFAULT_POINTS, SHAPE_SUFFIXES, Reader, read_shape, read_shapes
from utils.errors import DataError, UserError
from utils.files import check_name, data_files, has_data_files

FOLDER_LAYOUT = "<split>/<class>/<file>"
LABELED_FOLDER = "labeled_hdf5"  # where data.prepare_meshes writes labeled clouds, beside the pairs
PREPARE_COMMAND = "python -m data.prepare_clouds --clouds DIR --out data/mine"


class ClassFolders(NamedTuple):
    """Files in class folders.

    Attributes:
        root: parent of the folders.
        folders: (class, split) -> folder.
        class_names: sorted; a label is an index into it.
    """

    root: Path
    folders: dict[tuple[str, str], Path]
    class_names: tuple[str, ...]

    def files(self, split: str) -> tuple[list[Path], np.ndarray]:
        """Return the files of one split, class by class, and their labels, (n,) int64.

        Raises:
            DataError: the split has no files, or a name is not UTF-8.
        """
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            folder = self.folders.get((name, split))
            found = shape_files(folder) if folder else []
            for file in found:
                check_name(str(file.relative_to(self.root)), file)
            files += found
            labels += [label] * len(found)
        if not files:
            raise DataError(
                f"no clouds of the {split} split in {self.root}; expected {split}/<class>/* or <class>/{split}/* with "
                f"files ending in {', '.join(SHAPE_SUFFIXES)}"
            )
        return files, np.array(labels, dtype=np.int64)


def shape_files(folder: Path) -> list[Path]:
    """List the clouds and meshes below a folder."""
    return [path for path in data_files(folder, "**/*") if path.suffix.lower() in SHAPE_SUFFIXES and path.is_file()]


def find_class_folders(root: str | Path) -> ClassFolders | None:
    """Find class folders with a train and a test split below ``root``; return None if there are none.

    Split names may be in upper or lower case.
    """
    root = Path(root)
    top = {folder.name.lower(): folder for folder in _folders(root)}
    found: dict[tuple[str, str], Path] = {}
    if all(split in top for split in SPLITS):
        found = {(class_name(folder), split): folder for split in SPLITS for folder in _folders(top[split])}
    else:
        for folder in _folders(root):
            inner = {entry.name.lower(): entry for entry in _folders(folder)}
            found |= {(class_name(folder), split): inner[split] for split in SPLITS if split in inner}
    names = sorted({name for name, _ in found})
    return ClassFolders(root, found, tuple(names)) if {split for _, split in found} == set(SPLITS) else None


def _folders(folder: Path) -> list[Path]:
    return [path for path in data_files(folder) if path.is_dir()]


def class_name(folder: Path) -> str:
    """Return the name of a class folder in NFC; macOS stores file names in another Unicode form than other systems."""
    return unicodedata.normalize("NFC", folder.name)


def class_folder_clouds(
    found: ClassFolders, split: str, *, num_points: int | None, layout: str = FOLDER_LAYOUT, read: Reader = read_shape
) -> CloudArrays:
    """Read one split of class folders.

    Args:
        found: the folders.
        split: ``"train"`` or ``"test"``.
        num_points: points of a cloud; None means 2,048.
        layout: name of the layout in messages, results and the cache key.
        read: reads one file.

    Raises:
        DataError: a file is missing or cannot be read.
        UserError: ``num_points`` is below 1.
    """
    files, labels = found.files(split)
    wanted = DEFAULT_POINTS if num_points is None else num_points
    if wanted < 1:
        raise UserError(f"the number of points must be at least 1, got {wanted}")
    rows = max(wanted, DEFAULT_POINTS)
    points, sizes = read_shapes(files, folder=found.root, rows=rows, split=split, how=layout, read=read)
    return CloudArrays(points[:, :wanted], labels, found.class_names, (found.root,), layout, found.root, sizes)


def own_hdf5_files(root: str | Path) -> dict[str, list[Path]] | None:
    """Return the files ``*train*.h5`` and ``*test*.h5`` in ``root`` by split, or None unless both exist."""
    found = {
        split: sorted(data_files(root, f"*{split}*.h5"), key=lambda file: (len(file.name), file.name))
        for split in SPLITS
    }
    return found if all(found.values()) else None


class OwnClouds(ReadClouds):
    """Labeled clouds of any classes.

    In their folder are class folders, or HDF5 files ``*train*.h5`` and ``*test*.h5`` with ``data`` and ``label``, and
    class names in ``shape_names.txt``.

    Shape:
        each item: points (N, 3) float32, label int
    """

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        if found := find_class_folders(root):
            return class_folder_clouds(found, split, num_points=num_points)
        files = own_hdf5_files(root)
        if files is None:
            raise DataError(f"no labeled clouds in {root}; {_expected(root)}")
        get = f"see docs/datasets.md, or {CHECK_COMMAND} --data_root {root}"
        return read_hdf5_clouds(files[split], class_names=read_class_names(root), num_points=num_points, get=get)


def _expected(root: Path) -> str:
    if has_data_files(root, "*/*") and any(shape_files(folder) for folder in _folders(root)[:5]):
        divide = PREPARE_COMMAND.replace("DIR", str(root))
        return (
            f"its folders hold clouds but are not split into train and test; split them: {divide} --test_fraction 0.2"
        )
    return (
        "expected train/<class>/* and test/<class>/* with files ending in "
        f"{', '.join(SHAPE_SUFFIXES)}, or *train*.h5 and *test*.h5 with the arrays 'data' and 'label'"
    )
