"""Read the HDF5 files in which labeled point-cloud sets are published, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import DataError, UserError, malformed
from utils.files import read_lines

CHECK_COMMAND = "python -m data.check_data"
CHECK_IT = f"Check it: {CHECK_COMMAND}"
SPLITS = ("train", "test")
# Without a limit, a tiny hostile file could claim terabytes; gzip compresses at most 1,032 to 1.
MAX_RATIO = 1100
FREE_BYTES = 16 << 20
MAX_CLASSES = 65_536  # limit for a set that does not name its classes


def check_split(split: str) -> str:
    """Return ``split`` if it is ``"train"`` or ``"test"``.

    Raises:
        ValueError: it is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return split


# Messages of the HDF5 library if another program is writing the file: about its lock, or the mark that writers leave.
_IN_USE = ("unable to lock file", "already open for write", "already open for SWMR write")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hdf5_file(path: str | os.PathLike[str]) -> h5py.File:
    """Open a file read-only. Every HDF5 file that we only read is opened here.

    Raises:
        DataError: another program is writing the file, or its file system has no locks.
        OSError: the file is missing or not an HDF5 file.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        text = str(error)
        if not any(words in text for words in _IN_USE):
            raise
        # h5py reports the errno only in its message.
        number = re.search(r"errno = (\d+)", text)
        if number and int(number[1]) in _NO_LOCKS:
            raise DataError(
                f"{path} is on a file system without file locks; set HDF5_USE_FILE_LOCKING=FALSE in the environment"
            ) from error
        raise DataError(
            f"{path} is in use: another program has it open for writing. Wait until it has finished, or close the file "
            "there (if that program was killed, clear the mark it left with h5clear -s FILE from the package "
            "hdf5-tools)"
        ) from error


@contextlib.contextmanager
def open_hdf5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open a file read-only after checking its global heaps, which hold strings and variable-length arrays.

    A damaged heap makes the HDF5 library loop forever (seen with version 2.0.0).

    Raises:
        OSError: the file is missing or not an HDF5 file.
        ValueError: a heap is damaged.
        DataError: another program is writing the file.
    """
    with hdf5_file(path) as file:
        _check_heaps(file)
        yield file


def _check_heaps(file: h5py.File) -> None:
    """Check every global heap collection of a file (HDF5 File Format Specification, III.E)."""
    # Skip large contiguous arrays: they are most of a file and cannot contain a heap.
    arrays = [item for item in (file.get(name) for name in file) if isinstance(item, h5py.Dataset)]
    extents = sorted((item.id.get_offset(), item.id.get_storage_size()) for item in arrays if item.id.get_offset())
    begin = 0
    with open(file.filename, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, size in [*((s, n) for s, n in extents if n >= FREE_BYTES), (len(data), 0)]:
            while (at := data.find(b"GCOL\1\0\0\0", begin, start)) >= 0:
                begin = at + 8
                _check_heap(data, at)
            begin = max(begin, start + size)


def _check_heap(data: mmap.mmap, at: int) -> None:
    """Check that the objects of one heap are contiguous up to its end."""
    end = at + int.from_bytes(data[at + 8 : at + 16], "little")
    if end > len(data):
        return  # the HDF5 library reports this itself
    at += 16
    while at + 16 <= end:
        number, _, _, size = struct.unpack_from("<HHIQ", data, at)
        size = 16 + (size + 7) // 8 * 8 if number else size  # number 0: free space, including its header
        if not 16 <= size <= end - at:
            raise ValueError("its heap of strings is damaged")
        at += size


def stored_array(file: h5py.File, name: str) -> h5py.Dataset:
    """Return an array of an untrusted file after checking that it is safe to read.

    A header of a hundred bytes can claim terabytes, which would be allocated, or refer to any file of this computer for
    the values.

    Raises:
        KeyError: the file has no such array.
        ValueError: the array, or a chunk of it, claims more than the stored bytes can fill, or its values are outside
            the file (a virtual array: outside the file's folder).
    """
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.shape is None:
        raise KeyError(f"'{name}' is not an array")
    if array.external or array.file.filename != file.filename:
        raise ValueError(f"'{name}' is stored in another file")
    stored = array.id.get_storage_size()
    for part in array.virtual_sources() if array.is_virtual else ():
        shard = Path(file.filename).parent / part.file_name
        if Path(part.file_name).name != part.file_name and part.file_name != ".":
            raise ValueError(f"'{name}' takes values from {part.file_name!r}, outside this file's folder")
        stored += (Path(file.filename) if part.file_name == "." else shard).stat().st_size
    claimed = max(array.size, math.prod(array.chunks or ())) * array.dtype.itemsize
    if claimed > max(FREE_BYTES, MAX_RATIO * stored):
        raise ValueError(f"'{name}' claims {claimed:,} bytes, but the file holds {stored:,}")
    return array


def read_hdf5(path: Path, keys: Sequence[str], *, get: str = CHECK_COMMAND) -> dict[str, np.ndarray]:
    """Read whole arrays from one HDF5 file.

    Args:
        path: the file.
        keys: names of the arrays.
        get: command that gets or checks the file; it closes every error message.

    Raises:
        DataError: the file is missing, truncated or not an HDF5 file, or lacks one of ``keys``.
    """
    wanted = "an HDF5 file with the arrays " + ", ".join(f"'{key}'" for key in keys)
    if not path.is_file():
        raise DataError(f"{path} is missing; expected {wanted}", fix=f"Get it: {get}")
    with malformed(f"{path} cannot be read; it may be truncated", f"; expected {wanted}", fix=f"Get it: {get}"):
        with open_hdf5(path) as file:
            for key in keys:
                if not isinstance(file.get(key), h5py.Dataset):
                    found = ", ".join(f"'{name}'" for name in islice(file, 20)) or "nothing"
                    problem = f"{path} has no array '{key}' (it holds {found})"
                    raise DataError(f"{problem}; expected {wanted}", fix=f"Check it: {get}")
            return {key: stored_array(file, key)[()] for key in keys}


def read_labeled_clouds(
    path: Path, *, num_classes: int | None, num_points: int | None = None, get: str = CHECK_COMMAND
) -> tuple[np.ndarray, np.ndarray]:
    """Read and check the arrays ``data`` and ``label`` of one file.

    Args:
        path: the file; ``data`` is (n, N, 3) float16 to float64, ``label`` is (n,) or (n, 1).
        num_classes: labels must be below it; None accepts any label >= 0.
        num_points: keep the first rows of every cloud, as is common practice; None keeps all N.
        get: command named in errors.

    Returns:
        points: (n, num_points or N, 3) float32, not normalized.
        labels: (n,) int64.

    Raises:
        DataError: the file is not as described, or a coordinate is not finite.
        UserError: ``num_points`` is larger than the clouds.
    """
    arrays = read_hdf5(path, ("data", "label"), get=get)
    points, labels = arrays["data"], arrays["label"]

    def wrong(what: str) -> DataError:
        return DataError(f"{path}: {what}", fix=f"Check it: {get}")

    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind != "f":
        raise wrong(f"'data' must be (n, N, 3) floating point, but is {points.shape} {points.dtype}")
    count, size, _ = points.shape
    if not (labels.shape == (count,) or labels.shape == (count, 1)):
        raise wrong(f"'label' must be ({count},) or ({count}, 1), one per cloud of 'data', but is {labels.shape}")
    if count == 0 or size == 0:
        raise wrong("it contains no clouds" if count == 0 else "its clouds contain no points")
    if num_points is not None:
        if num_points < 1:
            raise UserError(f"the number of points must be at least 1, got {num_points}")
        if num_points > size:
            raise UserError(
                f"{num_points} points requested (--num_points, in pretraining --eval_points), but the clouds of {path} "
                f"have {size} points"
            )
        points = points[:, :num_points]
    points = np.ascontiguousarray(points, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(points).all(axis=(1, 2)))
    if len(bad):
        raise wrong(f"{len(bad)} of {count} clouds have non-finite coordinates; the first is cloud {bad[0]}")
    labels = labels.reshape(count)
    numbers = labels.astype(np.int64) if labels.dtype.kind in "iuf" and np.isfinite(labels).all() else None
    if numbers is None or (numbers != labels).any() or numbers.min() < 0:
        raise wrong("'label' must hold integers >= 0")
    if num_classes is not None and numbers.max() >= num_classes:
        raise wrong(f"'label' must be below {num_classes}, but goes up to {numbers.max()}")
    if numbers.max() >= MAX_CLASSES:
        raise wrong(f"'label' goes up to {numbers.max()}, but no set has that many classes")
    return points, numbers


class CloudArrays(NamedTuple):
    """Labeled clouds of one split and their origin.

    Attributes:
        points: (n, N, 3) float32.
        labels: (n,) int64.
        class_names: a label is an index into it.
        files: files read, in order; if each holds one cloud, their list or folder instead.
        layout: name of the file layout, for messages and results.
        folder: folder of the files.
        sizes: (n,) points of each file; a cloud from a file with fewer than N repeats points. None: every file has N or
            more.
    """

    points: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    layout: str
    folder: Path
    sizes: np.ndarray | None = None


def read_hdf5_clouds(
    files: Sequence[Path], *, class_names: Sequence[str] | None, num_points: int | None, get: str, layout: str = "HDF5"
) -> CloudArrays:
    """Read and concatenate HDF5 files; arguments and errors as for :func:`read_labeled_clouds`.

    Raises:
        DataError: the clouds of two files differ in size.
    """
    num_classes = None if class_names is None else len(class_names)
    parts = [read_labeled_clouds(f, num_classes=num_classes, num_points=num_points, get=get) for f in files]
    sizes = {points.shape[1] for points, _ in parts}
    if len(sizes) > 1:
        names = ", ".join(f"{f.name}: {points.shape[1]}" for f, (points, _) in zip(files, parts, strict=True))
        raise DataError(f"{files[0].parent} mixes clouds of different size ({names})", fix=f"Check it: {get}")
    points, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if class_names is None:
        class_names = [f"class {number}" for number in range(int(labels.max()) + 1)]
    return CloudArrays(points, labels, tuple(class_names), tuple(files), layout, files[0].parent)


def read_class_names(folder: Path) -> list[str] | None:
    """Read class names from ``shape_names.txt``; return None if there are none.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / "shape_names.txt"
    try:
        return read_lines(path) or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of class names ({error})") from error


class LabeledClouds(Dataset):
    """Labeled clouds of one split, held in memory.

    Attributes:
        points: (n, N, 3) float32.
        labels: (n,) int64.
        class_names: name of every label value; a label is an index into it.
        files: the files read, in order.
        layout: name of their layout.
        folder: their folder.
        sizes: points of each file, None if all have N or more (:class:`CloudArrays`).
        split: ``"train"`` or ``"test"``.
        official_sizes: clouds per split of the published set, if known.
    """

    official_sizes: dict[str, int] = {}

    def __init__(self, arrays: CloudArrays, split: str, *, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        """Hold the arrays of one split.

        Args:
            arrays: the clouds.
            split: ``"train"`` or ``"test"``.
            transform: applied to each (N, 3) cloud on access.
        """
        self.points, self.labels, self.class_names, self.files, self.layout, self.folder, self.sizes = arrays
        self.split = split
        self.transform = transform

    @property
    def repeated(self) -> int:
        """Number of clouds with repeated points, because their files have fewer than N."""
        return 0 if self.sizes is None else int((self.sizes < self.points.shape[1]).sum())

    def origin(self) -> dict[str, Any]:
        """Return what was read, for results: layout, folder, number of clouds and of those with repeated points."""
        about = {"layout": self.layout, "folder": str(self.folder), "clouds": len(self)}
        return about | ({"clouds_with_repeated_points": self.repeated} if self.repeated else {})

    def __len__(self) -> int:
        """Return the number of clouds."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one cloud, (N, 3) float32, and its label; the cloud is a copy."""
        points = torch.from_numpy(self.points[index].copy())
        return (points if self.transform is None else self.transform(points)), int(self.labels[index])

    def __repr__(self) -> str:
        """Return a one-line summary."""
        classes = len(np.unique(self.labels))
        size = self.points.shape[1]
        return f"{type(self).__name__}({self.split}: {len(self)} clouds of {size} points, {classes} classes)"


class ReadClouds(LabeledClouds):
    """Labeled clouds that a subclass reads from its layouts, in ``_read``."""

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
            root: the set's folder; of published sets also its parent.
            split: ``"train"`` or ``"test"``.
            num_points: points of a cloud. HDF5: the first rows; None keeps all. Files of one cloud each, and meshes:
                points drawn or taken from each, repeated if it has fewer; None means 2,048.
            transform: applied to each (N, 3) cloud on access.

        Raises:
            DataError: there are no such files, or one cannot be read.
            UserError: ``num_points`` is larger than the clouds of HDF5 files.
        """
        super().__init__(self._read(Path(root), check_split(split), num_points), split, transform=transform)

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        raise NotImplementedError
