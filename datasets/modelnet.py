"""ModelNet40 and ModelNet10 in all common layouts, and the demo set.

ModelNet: Wu et al., 3D ShapeNets, CVPR 2015. Layouts, in the order of search:

- ``modelnet40_ply_hdf5_2048``: the HDF5 release of PointNet (Qi et al., CVPR 2017), 2,048 surface points per object,
  unit sphere, y up;
- ``modelnet40_hdf5_2048``: the HDF5 files of PointCloudDatasets, the same with all 9,843 training models;
- ``modelnet40_normal_resampled``: the text files of PointNet++ (Qi et al., NeurIPS 2017), 10,000 points and normals per
  object; the first rows are used, as is common practice, and normalized to the unit sphere;
- ``ModelNet40/<class>/<split>/*.off``: the meshes as published, z up; points are sampled uniformly by area, normalized
  to the unit sphere and rotated to y up.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.hdf5 import CHECK_COMMAND, SPLITS, CloudArrays, ReadClouds, read_class_names, read_hdf5_clouds
from datasets.own_clouds import class_folder_clouds, find_class_folders
from datasets.shape_reader import DEFAULT_POINTS, read_shape, read_shapes, to_unit_sphere
from utils.errors import DataError, UserError
from utils.files import data_files, has_data_files, read_lines

MODELNET_FOLDER = "modelnet40_ply_hdf5_2048"
MODELNET_GET = f"bash data/download_data.sh modelnet40 (to see what is present: {CHECK_COMMAND})"
DEMO_FOLDER = "demo_hdf5"
DEMO_GET = f"it is in the repository: --data_root data/demo, or git checkout -- data/demo ({CHECK_COMMAND})"

MODELNET40_CLASSES = tuple(
    "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain desk door dresser flower_pot "
    "glass_box guitar keyboard lamp laptop mantel monitor night_stand person piano plant radio range_hood sink sofa "
    "stairs stool table tent toilet tv_stand vase wardrobe xbox".split()
)
MODELNET10_LABELS = (1, 2, 8, 12, 14, 22, 23, 30, 33, 35)
MODELNET40_TRAIN = 9843  # of the official split; the release with PointNet has three fewer
_LARGEST = 1e15  # squares of larger coordinates overflow float32
_AGAIN = "Unpack the data set again"


def find_hdf5_folder(root: str | Path, name: str) -> Path | None:
    """Return the folder ``name`` in ``root``, or ``root`` itself if it holds such a set, or None."""
    root = Path(root)
    for folder in (root / name, root):
        lists = [folder / f"{split}_files.txt" for split in SPLITS]
        # The part-segmentation release also has ply_data_train*.h5, next to *_hdf5_file_list.txt.
        ours = data_files(folder, "ply_data_t*.h5") and not data_files(folder, "*_hdf5_file_list.txt")
        if ours or any(file.is_file() for file in lists):
            return folder
    return None


def listed_files(
    folder: Path, split: str, *, index: str | None = None, get: str = CHECK_COMMAND, prefix: str = "ply_data_"
) -> list[Path]:
    """Return the files of one split: those in its list or, without a list, ``<prefix><split>*.h5`` by number.

    Lists often name folders of another machine, so only base names are used.

    Args:
        folder: folder of the files and the list.
        split: part of the files' names.
        index: name of the list; None means ``<split>_files.txt``.
        get: command named in errors.
        prefix: of the files' names; may contain ``*``.

    Raises:
        DataError: no file exists, the list is empty, or a listed file is missing or listed twice.
    """
    index = folder / (index or f"{split}_files.txt")
    if not index.is_file():
        # By number, so that file 10 comes after file 9.
        files = sorted(data_files(folder, f"{prefix}{split}*.h5"), key=lambda file: (len(file.name), file.name))
        if not files:
            raise DataError(f"{folder} contains neither {index.name} nor {prefix}{split}*.h5", fix=f"Get them: {get}")
        return files
    try:
        lines = read_lines(index)
    except (OSError, ValueError) as error:
        raise DataError(f"{index} cannot be read as a list of file names ({error})", fix=f"Get it: {get}") from error
    names = [line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines]
    if not names:
        raise DataError(
            f"{index} is empty; expected a file name per line, such as ply_data_{split}0.h5", fix=f"Get it: {get}"
        )
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{index} lists {name} {times} times", fix=f"Check it: {get}")
        if not os.path.isfile(folder / name):  # also False for an invalid file name
            raise DataError(f"{folder / name} is missing; {index.name} lists it", fix=f"Get it: {get}")
    return [folder / name for name in names]


def find_modelnet_itself(root: str | Path) -> Layout | None:
    """Find ModelNet40 like :func:`find_modelnet`, but no user's HDF5 files of other classes in its layout."""
    layout = find_modelnet(root)
    if layout is not None and layout.name == RELEASED and layout.folder.name != MODELNET_FOLDER:
        with contextlib.suppress(DataError):  # opening the set reports an unreadable list
            names = read_class_names(layout.folder)
            return None if names and len(names) != len(MODELNET40_CLASSES) else layout
    return layout


# --- the layouts of ModelNet ---

RELEASED, POINT_CLOUD_DATASETS, RESAMPLED, MESHES = (
    "HDF5 as released with PointNet",
    "HDF5 of PointCloudDatasets",
    "text of modelnet40_normal_resampled",
    "meshes as published (OFF)",
)
RESAMPLED_FOLDER = "modelnet40_normal_resampled"


class Layout(NamedTuple):
    """A layout of ModelNet and its folder."""

    name: str
    folder: Path


def find_modelnet(root: str | Path, name: str = "modelnet40") -> Layout | None:
    """Find ModelNet40 or ModelNet10 (``name``) in or below ``root``, in the first layout that is present."""
    root = Path(root)
    if name == "modelnet40" and not root.match(f"{name}_hdf5_2048"):
        if (folder := find_hdf5_folder(root, MODELNET_FOLDER)) is not None:
            return Layout(RELEASED, folder)
    named = [root, *(folder for folder in data_files(root) if folder.name.lower().startswith(name))]
    for folder in named:
        has_both = all(has_data_files(folder, f"*{split}*.h5") for split in SPLITS)
        if folder.match(f"{name}_*hdf5_2048") and has_both:
            return Layout(POINT_CLOUD_DATASETS, folder)
    for folder in (root / RESAMPLED_FOLDER, root):
        if all((folder / f"{name}_{split}.txt").is_file() for split in SPLITS):
            return Layout(RESAMPLED, folder)
    for folder in named:
        if folder.name.lower().startswith(name) and has_data_files(folder, "*/train/*.off"):
            return Layout(MESHES, folder)
    return None


def read_first_rows(path: Path, rows: int, name: str) -> tuple[np.ndarray, int]:
    """Read the first rows ``x,y,z,nx,ny,nz`` of a text file, normalized to the unit sphere (a ``Reader``)."""
    try:
        with open(path, encoding="utf-8-sig", errors="strict") as file:
            text = "".join(islice(file, rows))
        if not text.strip():
            raise ValueError("it is empty")
        table = np.loadtxt(StringIO(text.replace(",", " ")), dtype=np.float64, ndmin=2)
        if table.shape[1] not in (3, 6) or not len(table):
            raise ValueError(f"it holds an array of {table.shape}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read; expected x,y,z,nx,ny,nz on each line ({error})", fix=_AGAIN) from error
    points = table[:, :3]
    if not (np.abs(points) < _LARGEST).all():
        raise DataError(f"{path} has coordinates that are not finite, or beyond {_LARGEST:g}", fix=_AGAIN)
    return to_unit_sphere(points)[np.arange(rows) % len(points)], len(points)


def _mesh_with_y_up(path: Path, rows: int, name: str) -> tuple[np.ndarray, int]:
    """Sample points (N, 3) from a ModelNet mesh and rotate them from z up to y up (a ``Reader``)."""
    points, size = read_shape(path, rows, name)
    return points[:, [0, 2, 1]] * [1, 1, -1], size


def resampled_files(folder: Path, name: str, split: str) -> tuple[list[Path], list[str]]:
    """Return the files in a split list of ``modelnet40_normal_resampled``, and the class of each.

    Raises:
        DataError: the list cannot be read, is empty, or names an unknown class or an invalid shape.
    """
    index = folder / f"{name}_{split}.txt"
    try:
        shapes = read_lines(index)
    except (OSError, ValueError) as error:
        raise DataError(f"{index} cannot be read as a list of shapes ({error})", fix=_AGAIN) from error
    if not shapes:
        raise DataError(f"{index} is empty; expected a shape per line, such as airplane_0001", fix=_AGAIN)
    classes = [shape.rpartition("_")[0] for shape in shapes]
    for shape, label in zip(shapes, classes, strict=True):
        if label not in MODELNET40_CLASSES or Path(shape).name != shape:
            raise DataError(f"{index} lists {shape!r}; expected the name of a shape, such as airplane_0001", fix=_AGAIN)
    return [folder / label / f"{shape}.txt" for shape, label in zip(shapes, classes, strict=True)], classes


def _read_resampled(folder: Path, name: str, split: str, num_points: int | None) -> CloudArrays:
    files, classes = resampled_files(folder, name, split)
    wanted = _points_wanted(num_points)
    points, sizes = read_shapes(
        files,
        folder=folder,
        rows=max(wanted, DEFAULT_POINTS),
        split=f"{name}_{split}",
        how=RESAMPLED,
        read=read_first_rows,
    )
    labels = np.array([MODELNET40_CLASSES.index(label) for label in classes], dtype=np.int64)
    index = folder / f"{name}_{split}.txt"
    return CloudArrays(points[:, :wanted], labels, MODELNET40_CLASSES, (index,), RESAMPLED, folder, sizes)


def _read_meshes(folder: Path, split: str, num_points: int | None) -> CloudArrays:
    found = find_class_folders(folder)
    if found is None or not set(found.class_names) <= set(MODELNET40_CLASSES):
        known = set(MODELNET40_CLASSES)
        foreign = ", ".join(sorted(set(found.class_names) - known)[:3]) if found else "no <class>/test/"
        raise DataError(
            f"{folder} is not ModelNet as published: it has {foreign}. For other classes use --dataset folder"
        )
    arrays = class_folder_clouds(
        found, split, num_points=_points_wanted(num_points), layout=MESHES, read=_mesh_with_y_up
    )
    numbers = np.array([MODELNET40_CLASSES.index(name) for name in found.class_names])
    return arrays._replace(labels=numbers[arrays.labels], class_names=MODELNET40_CLASSES)


def _points_wanted(num_points: int | None) -> int:
    if num_points is not None and num_points < 1:
        raise UserError(f"the number of points must be at least 1, got {num_points}")
    return DEFAULT_POINTS if num_points is None else num_points


def _read_hdf5(layout: Layout, split: str, num_points: int | None, classes: Sequence[str], what: str) -> CloudArrays:
    folder = layout.folder
    prefix = "ply_data_" if layout.name == RELEASED else "*"
    files = listed_files(folder, split, get=MODELNET_GET, prefix=prefix)
    names = read_class_names(folder)
    if names is not None and len(names) != len(classes):
        raise DataError(
            f"{folder} is not {what}: its shape_names.txt has {len(names)} classes instead of {len(classes)}",
            fix=f"Get it: {MODELNET_GET}",
        )
    return read_hdf5_clouds(files, class_names=classes, num_points=num_points, get=MODELNET_GET, layout=layout.name)


class ModelNet40(ReadClouds):
    """ModelNet40: 9,840 train and 2,468 test clouds of 2,048 points, 40 classes, unit sphere.

    The PointNet release lacks three of the 9,843 training models in the other layouts.

    Shape:
        each item: points (N, 3) float32, label int in 0..39
    """

    get = MODELNET_GET
    official_sizes = {"train": 9840, "test": 2468}

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        layout = find_modelnet(root)
        if layout is None:
            expected = (
                f"{root / MODELNET_FOLDER}/ply_data_{split}*.h5 and {split}_files.txt, or modelnet40_hdf5_2048, "
                f"{RESAMPLED_FOLDER} or ModelNet40/<class>/{split}/*.off"
            )
            raise DataError(f"no {type(self).__name__} in {root}; expected {expected}", fix=f"Get it: {self.get}")
        if layout.name != RELEASED:
            self.official_sizes = {**self.official_sizes, "train": MODELNET40_TRAIN}
        if layout.name == RESAMPLED:
            return _read_resampled(layout.folder, "modelnet40", split, num_points)
        if layout.name == MESHES:
            return _read_meshes(layout.folder, split, num_points)
        return _read_hdf5(layout, split, num_points, MODELNET40_CLASSES, "ModelNet40")


class ModelNet10(ModelNet40):
    """The ten ModelNet10 classes: 3,991 train and 908 test clouds in the official split.

    Read from ModelNet10's files if ModelNet40's are absent, from the lists next to ModelNet40's text files, or else
    filtered from ModelNet40. Labels keep their ModelNet40 numbers (1, 2, 8, 12, 14, 22, 23, 30, 33, 35), as in the
    released code, so ``class_names`` has 40 entries.
    """

    official_sizes = {"train": 3991, "test": 908}

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        own, forty = find_modelnet(root, "modelnet10"), find_modelnet(root)
        if own is not None and (forty is None or forty.name == own.name == RESAMPLED):
            if own.name == RESAMPLED:
                return _read_resampled(own.folder, "modelnet10", split, num_points)
            if own.name == MESHES:
                return _read_meshes(own.folder, split, num_points)
            names = [MODELNET40_CLASSES[label] for label in MODELNET10_LABELS]
            arrays = _read_hdf5(own, split, num_points, names, "ModelNet10")
            return arrays._replace(
                labels=np.array(MODELNET10_LABELS, dtype=np.int64)[arrays.labels], class_names=MODELNET40_CLASSES
            )
        sizes = self.official_sizes
        arrays = super()._read(root, split, num_points)
        self.official_sizes = sizes
        kept = np.isin(arrays.labels, MODELNET10_LABELS)
        if not kept.any():
            names = ", ".join(str(file) for file in arrays.files[:3])
            problem = f"no cloud of a ModelNet10 class (labels {MODELNET10_LABELS}) in {names}"
            raise DataError(problem, fix=f"Get it: {self.get}")
        return arrays._replace(
            points=arrays.points[kept],
            labels=arrays.labels[kept],
            sizes=None if arrays.sizes is None else arrays.sizes[kept],
        )


class DemoShapes(ReadClouds):
    """Labeled furniture clouds of the demo set; class names from ``shape_names.txt``."""

    get = DEMO_GET

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        folder = find_hdf5_folder(root, DEMO_FOLDER)
        if folder is None:
            expected = f"{root / DEMO_FOLDER}/ply_data_{split}*.h5 and {split}_files.txt"
            raise DataError(f"no {type(self).__name__} in {root}; expected {expected}", fix=f"Get it: {self.get}")
        files = listed_files(folder, split, get=self.get)
        return read_hdf5_clouds(files, class_names=read_class_names(folder), num_points=num_points, get=self.get)
