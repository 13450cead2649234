"""ModelNet40 and ModelNet10 from ``modelnet40_ply_hdf5_2048``, and the demo set, which has the same layout.

ModelNet: Wu et al., 3D ShapeNets, CVPR 2015. The HDF5 release (2,048 surface points per object, unit sphere, y up) came
with PointNet, Qi et al., CVPR 2017.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.hdf5 import CHECK_COMMAND, LabeledClouds, check_split
from utils.errors import DataError
from utils.files import data_files, read_lines

MODELNET_FOLDER = "modelnet40_ply_hdf5_2048"
MODELNET_GET = f"bash data/download_data.sh modelnet40 (what is there: {CHECK_COMMAND})"
DEMO_FOLDER = "demo_hdf5"
DEMO_GET = f"it is part of the repository: --data_root data/demo, or git checkout -- data/demo ({CHECK_COMMAND})"

MODELNET40_CLASSES = (
    "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain desk door dresser flower_pot "
    "glass_box guitar keyboard lamp laptop mantel monitor night_stand person piano plant radio range_hood sink sofa "
    "stairs stool table tent toilet tv_stand vase wardrobe xbox"
).split()
MODELNET10_LABELS = (1, 2, 8, 12, 14, 22, 23, 30, 33, 35)


def find_hdf5_folder(root: str | Path, name: str) -> Path | None:
    """Find the folder ``name`` in ``root``, or take ``root`` itself if it holds such a set; None if neither does."""
    root = Path(root)
    for folder in (root / name, root):
        lists = [folder / f"{split}_files.txt" for split in ("train", "test")]
        # The part-segmentation release names its files ply_data_train*.h5 as well, beside *_hdf5_file_list.txt.
        ours = data_files(folder, "ply_data_t*.h5") and not data_files(folder, "*_hdf5_file_list.txt")
        if ours or any(file.is_file() for file in lists):
            return folder
    return None


def listed_files(folder: Path, split: str, *, index: str | None = None, get: str = CHECK_COMMAND) -> list[Path]:
    """Files of one split: those of a list, or, where that list is absent, ``ply_data_<split>*.h5`` by number.

    Lines of the list often carry the folder of another machine; only their base names count.

    Args:
        folder: holds the files and the list.
        split: part of the files' names.
        index: name of the list; None means ``<split>_files.txt``.
        get: command named in errors.

    Raises:
        DataError: no file, an empty list, a file listed twice, or a file listed but missing.
    """
    index = folder / (index or f"{split}_files.txt")
    if not index.is_file():
        # By number, so that file 10 comes after file 9.
        files = sorted(data_files(folder, f"ply_data_{split}*.h5"), key=lambda file: (len(file.name), file.name))
        if not files:
            raise DataError(f"{folder} holds neither {index.name} nor ply_data_{split}*.h5. Get them: {get}")
        return files
    try:
        lines = read_lines(index)
    except (OSError, ValueError) as error:
        raise DataError(f"{index} cannot be read as a list of file names ({error}). Get it: {get}") from error
    names = [line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines]
    if not names:
        raise DataError(f"{index} is empty; expected a file name per line, such as ply_data_{split}0.h5. Get it: {get}")
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{index} lists {name} {times} times. Check it: {get}")
        if not os.path.isfile(folder / name):  # False also for a name that no file can have
            raise DataError(f"{folder / name} is missing; {index.name} lists it. Get it: {get}")
    return [folder / name for name in names]


def _read_names(folder: Path) -> list[str] | None:
    """Class names from ``shape_names.txt``, None where there is no such file."""
    path = folder / "shape_names.txt"
    try:
        return read_lines(path) or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of class names ({error})") from error


class _Hdf5Set(LabeledClouds):
    """A set in the layout of ``modelnet40_ply_hdf5_2048``; subclasses name the folder and the classes."""

    folder_name: str
    get: str
    known_classes: Sequence[str] | None = None

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Read one split.

        Args:
            root: the folder that holds the set's folder, or that folder itself.
            split: ``"train"`` or ``"test"``.
            num_points: keep the first rows of every cloud; None keeps all.
            transform: applied to each (N, 3) cloud when it is taken.

        Raises:
            DataError: a file is missing or not what was expected.
            UserError: ``num_points`` is larger than the clouds.
        """
        check_split(split)
        folder = find_hdf5_folder(root, self.folder_name)
        if folder is None:
            expected = f"{Path(root) / self.folder_name}/ply_data_{split}*.h5 beside {split}_files.txt"
            raise DataError(f"no {type(self).__name__} in {root}; expected {expected}. Get it: {self.get}")
        files = listed_files(folder, split, get=self.get)
        names = _read_names(folder)
        if self.known_classes is not None:
            if names is not None and len(names) != len(self.known_classes):
                raise DataError(
                    f"{folder} is no {type(self).__name__}: its shape_names.txt has {len(names)} classes instead of "
                    f"{len(self.known_classes)}. Get it: {self.get}"
                )
            names = self.known_classes
        super().__init__(files, split, class_names=names, num_points=num_points, transform=transform, get=self.get)


class ModelNet40(_Hdf5Set):
    """ModelNet40: 9,840 train and 2,468 test clouds of 2,048 points, 40 classes, unit sphere.

    Shape:
        each item: points (N, 3) float32, label int in 0..39
    """

    folder_name = MODELNET_FOLDER
    get = MODELNET_GET
    known_classes = MODELNET40_CLASSES
    official_sizes = {"train": 9840, "test": 2468}


class ModelNet10(_Hdf5Set):
    """The ten ModelNet10 classes of the ModelNet40 files: 3,991 train and 908 test clouds in the official split.

    Labels keep their ModelNet40 numbers (1, 2, 8, 12, 14, 22, 23, 30, 33, 35), as in the released code, so
    ``class_names`` has 40 entries.
    """

    folder_name = MODELNET_FOLDER
    get = MODELNET_GET
    known_classes = MODELNET40_CLASSES
    official_sizes = {"train": 3991, "test": 908}

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Read one split; see :class:`ModelNet40` for arguments and errors."""
        super().__init__(root, split, num_points=num_points, transform=transform)
        kept = np.isin(self.labels, MODELNET10_LABELS)
        if not kept.any():
            names = ", ".join(str(file) for file in self.files)
            problem = f"no cloud of a ModelNet10 class (labels {MODELNET10_LABELS}) in {names}"
            raise DataError(f"{problem}. Get it: {self.get}")
        self.points, self.labels = self.points[kept], self.labels[kept]


class DemoShapes(_Hdf5Set):
    """The labelled part of the embedded demo set: furniture clouds, class names from ``shape_names.txt``."""

    folder_name = DEMO_FOLDER
    get = DEMO_GET
