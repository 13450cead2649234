"""ShapeNetPart (Yi et al., SIGGRAPH Asia 2016): objects of 16 categories whose points are labeled with 50 parts.

Three layouts are supported. The HDF5 release of PointNet (Qi et al., CVPR 2017), 2,048 points per shape: files such as
``ply_data_train0.h5`` with the arrays ``data``, ``label`` (category) and ``pid`` (part, numbered over all categories).
The HDF5 files of PointCloudDatasets (``shapenetpart_hdf5_2048/train0.h5`` and so on), whose parts are called ``seg``.
The text release ``shapenetcore_partanno_segmentation_benchmark_v0``, with or without normals. Data sets of other
categories work too if their folder has ``all_object_categories.txt`` and ``overallid_to_catid_partid.json``, like the
HDF5 release.
"""

from __future__ import annotations

import colorsys
import contextlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.hdf5 import CHECK_COMMAND, CHECK_IT, read_hdf5, read_labeled_clouds
from datasets.modelnet import listed_files
from utils.errors import DataError, UserError
from utils.files import data_files, has_data_files, read_text
from utils.progress import progress

PART_SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}
HDF5_FOLDERS = ("shapenet_part_seg_hdf5_data", "hdf5_data")
OTHER_PATTERN = "shapenet*part*hdf5*"  # of PointCloudDatasets: shapenetpart_hdf5_2048
TEXT_FOLDERS = (
    "shapenetcore_partanno_segmentation_benchmark_v0_normal",
    "shapenetcore_partanno_segmentation_benchmark_v0",
)
CATEGORY_FILE = "all_object_categories.txt"
PART_FILE = "overallid_to_catid_partid.json"
PART_NAME_FILE = "part_names.txt"  # not in the release: one part name per line, for legends
TEXT_CATEGORY_FILE = "synsetoffset2category.txt"
TEXT_POINTS = 2048  # points drawn per shape of the text release, whose clouds differ in size
GET = f"bash data/download_data.sh shapenetpart (to see what is present: {CHECK_COMMAND})"

# Name, synset, number of parts. The order defines the category labels and part numbers: never change it.
_OFFICIAL = (
    ("airplane", "02691156", 4),
    ("bag", "02773838", 2),
    ("cap", "02954340", 2),
    ("car", "02958343", 4),
    ("chair", "03001627", 4),
    ("earphone", "03261776", 3),
    ("guitar", "03467517", 3),
    ("knife", "03624134", 2),
    ("lamp", "03636649", 4),
    ("laptop", "03642806", 2),
    ("motorbike", "03790512", 6),
    ("mug", "03797390", 2),
    ("pistol", "03948459", 3),
    ("rocket", "04099429", 3),
    ("skateboard", "04225987", 3),
    ("table", "04379243", 3),
)
# Category names of the released code that differ from ours.
_OTHER_NAMES = {"motor": "motorbike"}
_GOLDEN_RATIO = 0.618034
_JSON_ERRORS = (ValueError, TypeError, RecursionError)  # invalid JSON, or valid JSON of an unexpected form
_LIMIT = 1e15  # squares of larger coordinates overflow float32


def part_colors(part_counts: Sequence[int]) -> np.ndarray:
    """Choose a color for every part, with evenly spaced hues within each category.

    Args:
        part_counts: parts of each category; their sum is P.

    Returns:
        (P, 3) float64 red, green, blue in 0..1.
    """
    colors = []
    for category, count in enumerate(part_counts):
        for part in range(count):
            hue = (part / count + _GOLDEN_RATIO * category) % 1.0
            # With many parts, adjacent hues are hard to tell apart, so alternate the brightness.
            colors.append(colorsys.hsv_to_rgb(hue, 0.8, 0.95 if part % 2 == 0 else 0.7))
    return np.array(colors, dtype=np.float64).reshape(-1, 3)


@dataclass(frozen=True)
class PartTaxonomy:
    """Categories of a part data set and their parts, which are numbered over all categories from 0.

    Attributes:
        category_names: lower-case names; a category's number is its position.
        part_counts: number of parts of each category.
        part_starts: first part of each category; its parts are contiguous.
        colors: (P, 3) float64, red, green and blue of every part in 0..1.
        synsets: folder or catalog number of each category; empty if unknown.
        part_names: (P,) name of every part.
    """

    category_names: tuple[str, ...]
    part_counts: tuple[int, ...]
    part_starts: tuple[int, ...]
    colors: np.ndarray = field(compare=False, repr=False)
    synsets: tuple[str, ...] = ()
    part_names: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def build(
        cls,
        category_names: Sequence[str],
        part_counts: Sequence[int],
        *,
        synsets: Sequence[str] = (),
        part_names: Sequence[str] | None = None,
    ) -> PartTaxonomy:
        """Number and color the parts of every category; without ``part_names``, name them by number.

        Raises:
            ValueError: categories are missing, one has no parts, a name occurs twice, or the lists differ in length.
        """
        names = tuple(name.lower() for name in category_names)
        counts = tuple(int(count) for count in part_counts)
        if not names or len(counts) != len(names) or (synsets and len(synsets) != len(names)):
            raise ValueError(
                f"{len(names)} categories, {len(counts)} part counts and {len(synsets)} synsets do not fit"
            )
        if len(set(names)) < len(names) or len(set(synsets)) < len(synsets):
            raise ValueError("a category is named twice")
        if min(counts) < 1:
            raise ValueError(f"category '{names[counts.index(min(counts))]}' has no parts")
        if part_names is None:
            part_names = [f"{name} part {i}" for name, count in zip(names, counts, strict=True) for i in range(count)]
        if len(part_names) != sum(counts):
            raise ValueError(f"{len(part_names)} names for {sum(counts)} parts")
        starts = tuple(accumulate(counts[:-1], initial=0))
        return cls(names, counts, starts, part_colors(counts), tuple(synsets), tuple(part_names))

    @property
    def num_parts(self) -> int:
        """Number of parts P of all categories."""
        return sum(self.part_counts)

    def parts_of(self, category: int) -> range:
        """Return the part numbers of a category."""
        return range(self.part_starts[category], self.part_starts[category] + self.part_counts[category])

    def category_number(self, name: str) -> int:
        """Return the number of a category, given its name in any case.

        Raises:
            UserError: the name is unknown; the message lists the names.
        """
        wanted = name.strip().lower()
        if wanted not in self.category_names:
            wanted = _OTHER_NAMES.get(wanted, wanted)
        if wanted not in self.category_names:
            raise UserError(f"unknown category {name!r}; the categories are: {', '.join(self.category_names)}")
        return self.category_names.index(wanted)


def official_taxonomy() -> PartTaxonomy:
    """Return the 16 categories and 50 parts of the published data set."""
    names, synsets, counts = zip(*_OFFICIAL, strict=True)
    return PartTaxonomy.build(names, counts, synsets=synsets)


def _read_listed_file(path: Path, what: str) -> str:
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; expected {what}", fix=f"Get it: {GET}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read; expected {what} ({error})", fix=CHECK_IT) from error


def _read_categories(path: Path) -> dict[str, str]:
    """Read a mapping from synset to name, in the order of the lines."""
    what = "a category name and its synset on every line"
    names: dict[str, str] = {}
    for number, line in enumerate(_read_listed_file(path, what).split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise DataError(f"{path}, line {number} is {line!r}; expected {what}")
        if words[-1] in names:
            raise DataError(f"{path}, line {number}: synset {words[-1]} occurs twice; remove one of its lines")
        names[words[-1]] = " ".join(words[:-1])
    if not names:
        raise DataError(f"{path} is empty; expected {what}")
    return names


def _read_part_counts(path: Path, synsets: Sequence[str]) -> list[int]:
    """Read the number of parts of every category from the list of [synset, part number] of all parts."""
    what = 'a list of [synset, part number], one for every part in order, such as [["02691156", 1], ["02691156", 2]]'
    try:
        rows = json.loads(_read_listed_file(path, what))
        owners = [str(synset) for synset, _ in rows]
    except _JSON_ERRORS as error:
        raise DataError(f"{path} is not as expected: {what} ({error})") from error
    unknown = sorted(set(owners) - set(synsets))
    if unknown:
        raise DataError(f"{path} has parts of {', '.join(unknown)}, which are not in {CATEGORY_FILE} next to it")
    # part_starts and part_counts can only describe contiguous parts in the categories' order.
    number = Counter(owners)
    expected = [synset for synset in synsets for _ in range(number[synset])]
    for part, (found, wanted) in enumerate(zip(owners, expected, strict=True)):
        if found != wanted:
            raise DataError(
                f"{path}: part {part} belongs to {found}, expected {wanted}: the parts of a category must be "
                f"contiguous, and the categories in the order of {CATEGORY_FILE}"
            )
    counts = [number[synset] for synset in synsets]
    if 0 in counts:
        raise DataError(f"{path} lists no part of {synsets[counts.index(0)]}, which {CATEGORY_FILE} names")
    return counts


def read_taxonomy(folder: str | Path) -> PartTaxonomy:
    """Read the categories and parts described in a folder; without a description, return the published ones.

    Raises:
        DataError: one of the two tables is missing and the other is not the published one, or they disagree.
    """
    folder = Path(folder)
    official = official_taxonomy()
    category_file = folder / CATEGORY_FILE
    if not category_file.is_file() and (folder / TEXT_CATEGORY_FILE).is_file():
        category_file = folder / TEXT_CATEGORY_FILE
    part_file, name_file = folder / PART_FILE, folder / PART_NAME_FILE
    if not category_file.is_file():
        if part_file.is_file():
            raise DataError(
                f"{category_file} is missing next to {PART_FILE}; expected a category name and synset per line"
            )
        names, synsets, counts = official.category_names, official.synsets, official.part_counts
    else:
        categories = _read_categories(category_file)
        names, synsets = tuple(categories.values()), tuple(categories)
        if part_file.is_file():
            counts = tuple(_read_part_counts(part_file, synsets))
        elif synsets == official.synsets:
            counts = official.part_counts
        else:
            raise DataError(
                f"{part_file} is missing; {category_file.name} differs from the published categories, so the parts "
                "must be listed: [synset, part number] for every part in order"
            )
    part_names = None
    if name_file.is_file():
        lines = _read_listed_file(name_file, "one part name per line").split("\n")
        part_names = [line.strip() for line in lines if line.strip()]
    try:
        return PartTaxonomy.build(names, counts, synsets=synsets, part_names=part_names)
    except ValueError as error:
        raise DataError(f"the tables of categories and parts in {folder} do not fit: {error}") from error


def find_part_folder(root: str | Path) -> tuple[Path, str] | None:
    """Find a part data set in ``root`` or its known subfolders.

    Returns:
        The folder and ``"hdf5"`` or ``"text"``, or None.
    """
    root = Path(root)
    hdf5 = [root, *(root / name for name in HDF5_FOLDERS), *data_files(root, "shapenet*hdf5*")]
    other = [folder for folder in (root, *data_files(root, OTHER_PATTERN)) if folder.match(OTHER_PATTERN)]
    for folder in hdf5:
        marks = (CATEGORY_FILE, PART_FILE, "*_hdf5_file_list.txt", "ply_data_val*.h5")
        is_named = folder != root or any(data_files(folder, mark) for mark in marks)
        if is_named and (data_files(folder, "ply_data_t*.h5") or data_files(folder, "*_hdf5_file_list.txt")):
            return folder, "hdf5"
    for folder in other:
        if has_data_files(folder, "*train*.h5"):
            return folder, "hdf5"
    for folder in (root, *(root / name for name in TEXT_FOLDERS)):
        if (folder / "train_test_split").is_dir() or (folder / TEXT_CATEGORY_FILE).is_file():
            return folder, "text"
    return None


def file_prefix(folder: Path) -> str:
    """Return the prefix of the split's file names; files from PointCloudDatasets may have any."""
    return "ply_data_" if has_data_files(folder, "ply_data_*.h5") else "*"


def part_files(folder: Path, split: str) -> list[Path]:
    """Return the HDF5 files of one split, found by :func:`datasets.modelnet.listed_files`."""
    index = f"{split}_hdf5_file_list.txt"
    return listed_files(folder, split, index=index, get=GET, prefix=file_prefix(folder))


def read_part_file(
    file: Path, taxonomy: PartTaxonomy, *, num_points: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read one HDF5 file.

    Args:
        file: of either HDF5 layout.
        taxonomy: of its set.
        num_points: keep the first points of every shape; None keeps all.

    Returns:
        Points (n, N, 3) float32, categories (n,) int64, parts (n, N) int64.

    Raises:
        DataError: it cannot be read, or its arrays do not fit each other or the taxonomy.
        UserError: ``num_points`` is larger than the clouds.
    """
    points, categories = read_labeled_clouds(
        file, num_classes=len(taxonomy.category_names), num_points=num_points, get=GET
    )
    parts = _read_parts(file, categories, taxonomy)
    if parts.ndim != 2 or len(parts) != len(points) or parts.shape[1] < points.shape[1]:
        raise DataError(
            f"{file}: 'pid' must be (n, N), a part for every point of 'data', but is {parts.shape} for {points.shape}",
            fix=CHECK_IT,
        )
    if num_points is None and parts.shape[1] != points.shape[1]:
        raise DataError(
            f"{file}: 'pid' has {parts.shape[1]} parts per shape for {points.shape[1]} points", fix=CHECK_IT
        )
    return points, categories, check_parts(file, parts[:, : points.shape[1]], categories, taxonomy)


def _read_parts(file: Path, categories: np.ndarray, taxonomy: PartTaxonomy) -> np.ndarray:
    """Read the parts of a file: ``pid`` in the release, ``seg`` in PointCloudDatasets.

    Some copies number ``seg`` within each category from 0; these are renumbered over all categories.
    """
    try:
        return read_hdf5(file, ("pid",), get=GET)["pid"]
    except DataError:
        with contextlib.suppress(DataError):
            parts = read_hdf5(file, ("seg",), get=GET)["seg"]
            return _numbered_over_all(parts, categories, taxonomy)
        raise


def _numbered_over_all(parts: np.ndarray, categories: np.ndarray, taxonomy: PartTaxonomy) -> np.ndarray:
    if parts.ndim != 2 or len(parts) != len(categories) or parts.dtype.kind not in "iuf":
        return parts  # check_parts rejects it
    first, counts = (np.asarray(table)[categories][:, None] for table in (taxonomy.part_starts, taxonomy.part_counts))
    over_all = ((parts >= first) & (parts < first + counts)).all()
    within = ((parts >= 0) & (parts < counts)).all()
    return parts + first if within and not over_all else parts


def check_parts(path: Path, parts: np.ndarray, categories: np.ndarray, taxonomy: PartTaxonomy) -> np.ndarray:
    """Return the parts (n, N) as int64 after checking that they fit the shapes' categories (n,).

    Raises:
        DataError: they do not.
    """
    is_number = parts.dtype.kind in "iuf" and np.isfinite(parts).all()
    numbers = parts.astype(np.int64) if is_number else None
    if numbers is None or (numbers != parts).any():
        raise DataError(f"{path}: 'pid' must hold whole numbers", fix=CHECK_IT)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= taxonomy.num_parts):
        raise DataError(
            f"{path}: 'pid' must be in 0..{taxonomy.num_parts - 1}, as the set has "
            f"{len(taxonomy.category_names)} categories with {taxonomy.num_parts} parts, but is in "
            f"{numbers.min()}..{numbers.max()}. A set of other categories needs {CATEGORY_FILE} and {PART_FILE} "
            f"next to its files",
            fix=CHECK_IT,
        )
    first = np.asarray(taxonomy.part_starts)[categories][:, None]
    last = first + np.asarray(taxonomy.part_counts)[categories][:, None] - 1
    wrong = np.flatnonzero(((numbers < first) | (numbers > last)).any(axis=1))
    if len(wrong):
        i = wrong[0]
        point = np.flatnonzero((numbers[i] < first[i]) | (numbers[i] > last[i]))[0]
        raise DataError(
            f"{path}: {len(wrong)} of {len(numbers)} shapes have parts of another category; the first is shape {i} "
            f"('{taxonomy.category_names[categories[i]]}', parts {first[i, 0]}..{last[i, 0]}), whose point {point} "
            f"has part {numbers[i, point]}",
            fix=CHECK_IT,
        )
    return numbers


@dataclass(frozen=True)
class TextRelease:
    """The text release: a list of shapes for each split, and text files for each shape.

    Attributes:
        folder: of the set.
        taxonomy: its categories and parts.
    """

    folder: Path
    taxonomy: PartTaxonomy

    def shapes(self, split: str) -> list[tuple[str, str]]:
        """Return (synset, shape) for the shapes of one split, in the order of the list.

        Raises:
            DataError: the list is missing or not as expected.
        """
        path = self.folder / "train_test_split" / f"shuffled_{split}_file_list.json"
        what = 'a list of shapes such as "shape_data/02691156/1a04e3eab45ca15dd86060f189eb133"'
        try:
            rows = [str(row).split("/") for row in json.loads(_read_listed_file(path, what))]
        except _JSON_ERRORS as error:
            raise DataError(f"{path} is not as expected: {what} ({error})") from error
        if not rows:
            raise DataError(f"{path} is empty; expected {what}")
        for row in rows:
            if len(row) < 2:
                raise DataError(f"{path} lists {'/'.join(row)!r}; expected {what}")
            if row[-2] not in self.taxonomy.synsets:
                raise DataError(
                    f"{path} lists a shape of {row[-2]}, which is not a category of {self.folder} "
                    f"(listed in {TEXT_CATEGORY_FILE} or {CATEGORY_FILE})"
                )
        return [(row[-2], row[-1]) for row in rows]

    def read(self, synset: str, shape: str) -> tuple[Path, np.ndarray, np.ndarray]:
        """Read one shape.

        Returns:
            Its file, its points (M, 3) float64 and part numbers (M,) int64 over all categories.

        Raises:
            DataError: a file is missing or not as expected.
        """
        folder = self.folder / synset
        together, points_file = folder / f"{shape}.txt", folder / "points" / f"{shape}.pts"
        category = self.taxonomy.synsets.index(synset)
        if os.path.isfile(together) or not os.path.isfile(points_file):
            table = _read_table(together, columns=(7, 4), what="x y z nx ny nz part")
            return together, table[:, :3], self._checked(together, table[:, -1], category)
        points = _read_table(points_file, columns=(3,), what="x y z")
        label_file = folder / "points_label" / f"{shape}.seg"
        labels = _read_table(label_file, columns=(1,), what="the part of one point, from 1")
        if len(labels) != len(points):
            raise DataError(f"{label_file} has {len(labels)} parts for the {len(points)} points of {points_file}")
        count = self.taxonomy.part_counts[category]
        if labels.min() < 1 or labels.max() > count:
            raise DataError(
                f"{label_file}: parts of '{self.taxonomy.category_names[category]}' must be in 1..{count}, but are in "
                f"{labels.min():g}..{labels.max():g}"
            )
        parts = labels[:, 0] - 1 + self.taxonomy.part_starts[category]
        return label_file, points, self._checked(label_file, parts, category)

    def _checked(self, path: Path, parts: np.ndarray, category: int) -> np.ndarray:
        return check_parts(path, parts[None], np.array([category]), self.taxonomy)[0]


class ShapeNetPart(Dataset):
    """Labeled shapes of one split, held in memory.

    Attributes:
        points: (n, N, 3) float32, as stored (HDF5) or normalized to the unit sphere (text release).
        parts: (n, N) int64 part numbers over all categories.
        categories: (n,) int64 category numbers.
        taxonomy: names categories and parts.
        category: number of the category ``class_choice``, or None.
        files: the files read, in order.
        split: the split's name.

    Shape:
        each item: points (N, 3) float32, category int, parts (N,) int64
    """

    official_sizes = {"train": 12137, "val": 1870, "trainval": 14007, "test": 2874}

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int | None = None,
        class_choice: str | None = None,
        seed: int = 0,
    ) -> None:
        """Read one split.

        Args:
            root: the set's folder or its parent.
            split: ``"train"``, ``"val"``, ``"trainval"`` (train, then val if present) or ``"test"``.
            num_points: points per shape. HDF5: the first rows, None keeps all. Text release: drawn at random, None
                means 2,048; a smaller cloud repeats points after using each once.
            class_choice: read only this category; None or an empty string reads all.
            seed: of the draw from the text release, which depends only on it and the shape's name.

        Raises:
            DataError: a file is missing or not as expected.
            UserError: the category is unknown or empty, or ``num_points`` is larger than the clouds of the HDF5 files.
        """
        if split not in PART_SPLITS:
            raise ValueError(f"split must be one of {tuple(PART_SPLITS)}, got {split!r}")
        found = find_part_folder(root)
        if found is None:
            raise DataError(
                f"no ShapeNetPart in {root}; expected {Path(root) / HDF5_FOLDERS[0]}/ply_data_train*.h5, "
                f"shapenetpart_hdf5_2048/train*.h5 or {TEXT_FOLDERS[0]}/",
                fix=f"Get it: {GET}",
            )
        if num_points is not None and num_points < 1:
            raise UserError(f"the number of points must be at least 1, got {num_points}")
        self.folder, layout = found
        self.split = split
        self.taxonomy = read_taxonomy(self.folder)
        self.category = self.taxonomy.category_number(class_choice) if class_choice else None
        if layout == "hdf5":
            arrays = self._read_hdf5(num_points)
        else:
            arrays = self._read_text_release(TEXT_POINTS if num_points is None else num_points, seed)
        self.points, self.categories, self.parts = arrays
        if len(self.points) == 0:
            raise UserError(f"the {split} split in {self.folder} has no shape of category '{class_choice}'")

    def _keep(self, categories: np.ndarray) -> np.ndarray:
        """Return a mask (n,) of the shapes in the chosen category."""
        return np.ones(len(categories), dtype=bool) if self.category is None else categories == self.category

    def _read_hdf5(self, num_points: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the split's files and return ``points``, ``categories`` and ``parts``."""
        splits = PART_SPLITS[self.split]
        if self.split == "trainval" and not self._has_files("val"):
            splits = ("train",)
        self.files = tuple(file for split in splits for file in part_files(self.folder, split))
        read = []
        for file in self.files:
            points, categories, parts = read_part_file(file, self.taxonomy, num_points=num_points)
            kept = self._keep(categories)
            read.append((points[kept], categories[kept], parts[kept]))
        sizes = {points.shape[1] for points, _, _ in read}
        if len(sizes) > 1:
            listed = ", ".join(f"{file.name}: {r[0].shape[1]}" for file, r in zip(self.files, read, strict=True))
            raise DataError(f"{self.folder} mixes clouds of different size ({listed})", fix=CHECK_IT)
        return tuple(np.concatenate(arrays) for arrays in zip(*read, strict=True))

    def _has_files(self, split: str) -> bool:
        named = (self.folder / f"{split}_hdf5_file_list.txt").is_file()
        return named or has_data_files(self.folder, f"{file_prefix(self.folder)}{split}*.h5")

    def _read_text_release(self, num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read and normalize the split's shapes, draw points, and return ``points``, ``categories`` and ``parts``."""
        release = TextRelease(self.folder, self.taxonomy)
        shapes = [shape for split in PART_SPLITS[self.split] for shape in release.shapes(split)]
        if self.category is not None:
            shapes = [shape for shape in shapes if shape[0] == self.taxonomy.synsets[self.category]]
        points = np.empty((len(shapes), num_points, 3), dtype=np.float32)
        parts = np.empty((len(shapes), num_points), dtype=np.int64)
        categories = np.array([self.taxonomy.synsets.index(synset) for synset, _ in shapes], dtype=np.int64)
        files = []
        for i, (synset, name) in enumerate(progress(shapes, text=f"reading {self.split}", unit="shapes")):
            path, cloud, labels = release.read(synset, name)
            files.append(path)
            cloud = cloud - cloud.mean(axis=0)  # (M, 3)
            cloud /= max(np.linalg.norm(cloud, axis=1).max(), np.finfo(np.float32).tiny)
            generator = np.random.default_rng([seed, zlib.crc32(f"{synset}/{name}".encode())])
            chosen = draw_rows(len(cloud), num_points, generator)
            points[i], parts[i] = cloud[chosen], labels[chosen]
        self.files = tuple(files)
        return points, categories, parts

    def __len__(self) -> int:
        """Return the number of shapes."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        """Return copies: points (N, 3) float32, category, parts (N,) int64."""
        points, parts = self.points[index].copy(), self.parts[index].copy()
        return torch.from_numpy(points), int(self.categories[index]), torch.from_numpy(parts)

    def __repr__(self) -> str:
        """Return a one-line summary."""
        categories, size = len(np.unique(self.categories)), self.points.shape[1]
        return f"ShapeNetPart({self.split}: {len(self)} shapes of {size} points, {categories} categories)"


def draw_rows(count: int, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Draw ``wanted`` of ``count`` rows in random order, repeating rows only after every row was drawn.

    Returns:
        (wanted,) int64 row numbers.
    """
    if wanted <= count:
        return generator.choice(count, wanted, replace=False, shuffle=True)
    return generator.permutation(np.concatenate([np.arange(count), generator.integers(count, size=wanted - count)]))


def _read_table(path: Path, *, columns: tuple[int, ...], what: str) -> np.ndarray:
    """Read a text file of finite numbers, (rows, one of ``columns``) float64, not empty."""
    expected = f"expected on every line: {what}"
    if not os.path.isfile(path):  # also False for an invalid file name
        raise DataError(f"{path} is missing; {expected}", fix=f"Get it: {GET}")
    try:
        table = np.loadtxt(StringIO(read_text(path)), dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read; {expected} ({error})", fix=CHECK_IT) from error
    if table.size == 0 or table.shape[1] not in columns:
        raise DataError(f"{path} holds an array of {table.shape}; {expected}", fix=CHECK_IT)
    sound = (np.abs(table) < _LIMIT).all(axis=1)
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise DataError(
            f"{path} has a non-finite number, or one beyond {_LIMIT:g}, in row {row + 1}; {expected}", fix=CHECK_IT
        )
    return table
