"""S3DIS (Armeni et al., CVPR 2016): six areas of scanned rooms, 13 classes, cut into blocks of one meter.

Two folders are supported. ``indoor3d_sem_seg_hdf5_data``, the release of PointNet (Qi et al., CVPR 2017) or the output
of ``python -m datasets.s3dis_prepare``: overlapping blocks of 4,096 random points, for training and the released
protocol. ``indoor3d_sem_seg_hdf5_data_test``, only from that command: blocks that contain every point of a room at
least once, to score whole rooms.

A point has nine values: x and y relative to the block's center and z above the room's floor, in meters; red, green and
blue in 0..1; and x, y, z divided by the room's extent.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.hdf5 import CHECK_IT, hdf5_file, open_hdf5, stored_array
from datasets.modelnet import listed_files
from utils.caches import cache_folders, write_cache
from utils.errors import DataError, UserError, malformed
from utils.files import read_text
from utils.progress import progress

BLOCK_FOLDER = "indoor3d_sem_seg_hdf5_data"
ROOM_FOLDER = "indoor3d_sem_seg_hdf5_data_test"
FILE_LIST, ROOM_LIST = "all_files.txt", "room_filelist.txt"
CHANNELS = 9
AREAS = (1, 2, 3, 4, 5, 6)
CLASS_NAMES = tuple("ceiling floor wall beam column window door table chair sofa bookcase board clutter".split())
# Red, green and blue in 0..1, (13, 3). Large surfaces are pale so that furniture is easy to see.
_COLORS = "d7e2f0 b8a07e cdcdbe 785ef0 ff7f0e 5ccee6 8c564b 2ca02c d62728 e377c2 1f77b4 175a50 5a5a5a"
CLASS_COLORS = np.frombuffer(bytes.fromhex(_COLORS), np.uint8).reshape(-1, 3) / 255.0
PREPARE_COMMAND = "python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version --out {root}"
_ROOM_NAME = re.compile(r"Area_([0-9]{1,6})_\S+")
_MAX_EXTENT = 10_000  # meters; larger rooms are considered damaged
_ROWS_PER_CHUNK = 4  # files with more blocks per chunk are unpacked once; reading one block would decompress them all


def area_of(room: str) -> int:
    """Return the area of a room from its name, such as ``Area_1_office_3``.

    Raises:
        ValueError: the name has another form.
    """
    match = _ROOM_NAME.fullmatch(room)
    if match is None:
        raise ValueError(f"expected a room name of the form Area_N_name, got {room!r}")
    return int(match.group(1))


def split_rooms(rooms: Iterable[str], *, fraction: float = 0.1, seed: int = 1) -> tuple[list[str], list[str]]:
    """Hold out rooms for validation, the same fraction of every area.

    Args:
        rooms: names such as ``Area_1_office_3``, in any order.
        fraction: fraction of each area's rooms to hold out; at least one room, never all.
        seed: of the choice.

    Returns:
        The training rooms and the validation rooms, both sorted.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, or no area has two rooms.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction of validation rooms must be between 0 and 1, got {fraction}")
    by_area: dict[int, list[str]] = {}
    for room in sorted(set(rooms)):
        by_area.setdefault(area_of(room), []).append(room)
    held_out: set[str] = set()
    for area, names in sorted(by_area.items()):
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        order = np.random.default_rng([seed, area]).permutation(len(names))
        held_out |= {names[i] for i in order[:count]}
    if not held_out:
        raise UserError("no area has two rooms, so none can be held out for validation; use more areas")
    every = sorted(room for names in by_area.values() for room in names)
    return [room for room in every if room not in held_out], sorted(held_out)


def _find_folder(root: str | Path, name: str) -> Path | None:
    """Return the folder ``name`` in ``root``, or ``root`` if that is its name, or None if neither exists."""
    root = Path(root)
    if (root / name).is_dir():
        return root / name
    # Both folders contain files of the same names, so only the folder's name tells them apart.
    return root if root.name == name and root.is_dir() else None


def _read_room_list(folder: Path, blocks: int, get: str) -> list[str]:
    """Read the room of every block."""
    path = folder / ROOM_LIST
    try:
        names = read_text(path).split()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; it names the room of every block, one per line (and is written last)",
            fix=f"Get it: {get}",
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of rooms ({error})", fix=f"Get it: {get}") from error
    for number, name in enumerate(names, start=1):
        if not _ROOM_NAME.fullmatch(name):
            raise DataError(
                f"{path}, entry {number} is {name!r}; expected a room such as Area_1_office_3", fix=f"Get it: {get}"
            )
    if len(names) != blocks:
        raise DataError(f"{path} names the rooms of {len(names)} blocks, but the files hold {blocks}", fix=CHECK_IT)
    return names


class _BlockFiles:
    """Blocks in HDF5 files, read one at a time; file handles never cross a fork.

    Files with many blocks per chunk, like the published ones, are unpacked once into the folder ``.unpacked`` next to
    them or, if that is not writable, into the system's temporary folder.

    Attributes:
        files: the files, in order.
        block_points: points of a block.
        rooms: room of every block.
    """

    def __init__(self, folder: Path, *, arrays: Sequence[str], channels: int, get: str) -> None:
        self.folder, self.channels, self._arrays, self._get = folder, channels, tuple(arrays), get
        self.files = listed_files(folder, "all", index=FILE_LIST, get=get)
        self._handles: dict[int, h5py.File] = {}
        self._unpacked: dict[tuple[int, str], np.ndarray] = {}
        self._pid = os.getpid()
        counts, sizes, self._slow = [], set(), []
        for file in self.files:
            count, size, slow = self._inspect(file)
            counts.append(count)
            sizes.add(size)
            self._slow.append(slow)
        if len(sizes) > 1:
            raise DataError(f"{folder} mixes blocks of {sorted(sizes)} points", fix=CHECK_IT)
        self.block_points = sizes.pop()
        self.ends = np.cumsum(counts)
        self.rooms = _read_room_list(folder, int(self.ends[-1]), get)

    def _inspect(self, path: Path) -> tuple[int, int, bool]:
        """Return a file's number of blocks, the points of a block, and whether single blocks are slow to read."""
        expected = f"an HDF5 file with 'data' (n, N, {CHANNELS}) and " + ", ".join(
            f"'{name}' (n, N) of integers" for name in self._arrays if name != "data"
        )
        get = f"Get it: {self._get}"
        with malformed(f"{path} cannot be read; it may be truncated", f"; expected {expected}", fix=get):
            with open_hdf5(path) as file:
                shapes, whole = {}, True
                for name in self._arrays:
                    if not isinstance(file.get(name), h5py.Dataset):
                        found = ", ".join(f"'{key}'" for key in islice(file, 20)) or "nothing"
                        raise DataError(
                            f"{path} has no array '{name}' (it holds {found}); expected {expected}", fix=get
                        )
                    shapes[name] = stored_array(file, name).shape
                    whole = whole and (name == "data" or file[name].dtype.kind in "iu")
                data = file["data"]
                fits = data.ndim == 3 and data.shape[2] == CHANNELS and data.dtype.kind == "f" and 0 not in data.shape
                if not (fits and whole) or any(
                    shape != data.shape[:2] for name, shape in shapes.items() if name != "data"
                ):
                    listed = ", ".join(f"'{name}' {shape} {file[name].dtype}" for name, shape in shapes.items())
                    raise DataError(f"{path} holds {listed}; expected {expected}", fix=CHECK_IT)
                return data.shape[0], data.shape[1], data.chunks is not None and data.chunks[0] > _ROWS_PER_CHUNK

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers open and map the files themselves.
        return {**self.__dict__, "_handles": {}, "_unpacked": {}}

    def _open(self, number: int) -> h5py.File:
        if self._pid != os.getpid():  # after a fork: an HDF5 handle contains a file position
            self._handles, self._pid = {}, os.getpid()
        if number not in self._handles:
            self._handles[number] = hdf5_file(self.files[number])
        return self._handles[number]

    def place(self, block: int) -> tuple[int, int]:
        """Return the file number and row of a block."""
        number = int(np.searchsorted(self.ends, block, side="right"))
        return number, block - (int(self.ends[number - 1]) if number else 0)

    def where(self, block: int) -> str:
        """Return the file, row and room of a block, for messages."""
        number, row = self.place(block)
        return f"{self.files[number]}, block {row} ({self.rooms[block]})"

    def data(self, block: int) -> np.ndarray:
        """Read the values of one block, (N, channels) float32, finite."""
        values = self.read(block, "data")[:, : self.channels].astype(np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{self.where(block)}: 'data' has non-finite values", fix=CHECK_IT)
        return values

    def labels(self, block: int) -> np.ndarray:
        """Read the classes of one block's points, (N,) int64 in 0..12."""
        stored = self.read(block, "label")
        labels = stored.astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
            raise DataError(
                f"{self.where(block)}: 'label' must be in 0..{len(CLASS_NAMES) - 1}, but is in "
                f"{stored.min()}..{stored.max()}",
                fix=CHECK_IT,
            )
        return labels

    def index(self, block: int) -> np.ndarray:
        """Read the numbers in the room of one block's points, (N,) int64."""
        return self.read(block, "index").astype(np.int64)

    def read(self, block: int, name: str) -> np.ndarray:
        """Read one block of an array as stored; unpacked ``data`` has only the first ``channels`` columns."""
        number, row = self.place(block)
        if self._slow[number]:
            return np.array(self._map(number, name)[row])
        try:
            return self._open(number)[name][row]
        except DataError:
            raise
        except Exception as error:  # h5py raises many exception types on malformed files
            raise DataError(
                f"{self.where(block)}: '{name}' cannot be read ({error})", fix=f"Get it: {self._get}"
            ) from error

    def unpack(self, blocks: Iterable[int]) -> None:
        """Unpack the files of some blocks if necessary, so that no worker has to."""
        numbers = sorted({self.place(int(block))[0] for block in blocks})
        work = [(number, name) for number in numbers if self._slow[number] for name in self._arrays]
        text = f"unpacking {self.folder.name}, once"
        for number, name in progress(work, text=text, unit="arrays", hidden=not work):
            self._map(number, name)

    def _map(self, number: int, array: str) -> np.ndarray:
        if (number, array) not in self._unpacked:
            self._unpacked[number, array] = self._unpack(number, array)
        return self._unpacked[number, array]

    def _unpack(self, number: int, array: str) -> np.ndarray:
        """Memory-map one array of a file, unpacking it first if necessary."""
        path = self.files[number]
        status = path.stat()
        what = f"{array}{self.channels}" if array == "data" else array
        name = f"{path.stem}-{what}-{status.st_size}-{status.st_mtime_ns}.npy"
        folders = cache_folders(self.folder, "unpacked")
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):  # missing or damaged: unpack again
                return np.load(folder / name, mmap_mode="r")
        with malformed(f"{path}: '{array}' cannot be read", fix=f"Get it: {self._get}"):
            with hdf5_file(path) as file:
                # Read the whole file: block by block, each chunk would be decompressed once per block.
                values = file[array][:, :, : self.channels] if array == "data" else file[array][()]
        try:
            return np.load(write_cache(folders, name, values), mmap_mode="r")
        except UserError as error:
            raise UserError(f"{path} must be unpacked to read single blocks, but {error}") from error


def _check_channels(in_channels: int) -> int:
    if in_channels not in (3, CHANNELS):
        raise UserError(f"S3DIS blocks have 3 channels (xyz) or {CHANNELS}, got {in_channels}")
    return in_channels


class S3DIS(Dataset):
    """Training blocks of some areas, read on access; published files are unpacked on first use.

    Attributes:
        areas: the areas.
        rooms: names of the rooms, sorted.
        block_rooms: room of every block.
        block_points: points of a stored block.

    Shape:
        each item: block (N, in_channels) float32, classes (N,) int64
    """

    def __init__(
        self,
        root: str | Path,
        areas: Sequence[int],
        *,
        in_channels: int = 3,
        num_points: int | None = None,
        rooms: Iterable[str] | None = None,
    ) -> None:
        """Find the blocks.

        Args:
            root: the folder ``indoor3d_sem_seg_hdf5_data`` or its parent.
            areas: areas to read, of 1..6.
            in_channels: 3 reads x, y, z relative to the block's center, like the released code; 9 reads all values.
            num_points: keep the first points of every block, which are in random order; None keeps all.
            rooms: read only the blocks of these rooms; None reads all rooms of the areas.

        Raises:
            DataError: a file is missing or not as expected, or an area has no room.
            UserError: ``in_channels`` is unsupported, ``num_points`` too large, a room unknown, or no folder writable
                to unpack the published files.
        """
        command = PREPARE_COMMAND.format(root=root)
        get = f"bash data/download_data.sh s3dis, or from the raw rooms: {command}"
        folder = _find_folder(root, BLOCK_FOLDER)
        if folder is None:
            raise DataError(f"no S3DIS blocks in {root}; expected {Path(root) / BLOCK_FOLDER}/", fix=f"Get them: {get}")
        self.folder = folder
        self._files = _BlockFiles(folder, arrays=("data", "label"), channels=_check_channels(in_channels), get=get)
        self.in_channels, self.block_points = in_channels, self._files.block_points
        if num_points is not None and num_points < 1:
            raise UserError(f"the number of points must be at least 1, got {num_points}")
        if num_points is not None and num_points > self.block_points:
            raise UserError(
                f"--num_points {num_points} is too large: the blocks of {folder} have {self.block_points} points"
            )
        self.num_points = num_points or self.block_points
        self.areas = tuple(dict.fromkeys(int(area) for area in areas))
        if not self.areas:
            raise UserError("no area was chosen; choose from 1 to 6")
        found = {room: area_of(room) for room in set(self._files.rooms)}
        for area in self.areas:
            if area not in found.values():
                there = ", ".join(str(a) for a in sorted(set(found.values())))
                raise DataError(
                    f"{folder} has no room of area {area}; it has rooms of the areas {there}", fix=f"Get it: {get}"
                )
        chosen = {room for room, area in found.items() if area in self.areas}
        if rooms is not None:
            unknown = sorted(set(rooms := list(rooms)) - chosen)
            if unknown or not rooms:
                problem = f"no room {unknown[0]}" if unknown else "no room was chosen"
                raise UserError(f"{problem} in areas {', '.join(map(str, self.areas))} of {folder}")
            chosen &= set(rooms)
        self._blocks = np.array([i for i, room in enumerate(self._files.rooms) if room in chosen], dtype=np.int64)
        self._files.unpack(self._blocks)
        self.rooms = tuple(sorted(chosen))
        self.block_rooms = tuple(self._files.rooms[i] for i in self._blocks)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the blocks."""
        return tuple(self._files.files[i] for i in sorted({self._files.place(int(b))[0] for b in self._blocks}))

    @property
    def labels(self) -> np.ndarray:
        """Classes of all points, (n, num_points) uint8; read from disk on every access."""
        labels = np.empty((len(self), self.num_points), dtype=np.uint8)
        for i, block in enumerate(self._blocks):
            labels[i] = self._files.labels(int(block))[: self.num_points]
        return labels

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one block (num_points, in_channels) float32 and its classes (num_points,) int64."""
        block = int(self._blocks[index])
        values = self._files.data(block)[: self.num_points]
        return torch.from_numpy(values), torch.from_numpy(self._files.labels(block)[: self.num_points])

    def __repr__(self) -> str:
        """Return a one-line summary."""
        areas = ", ".join(map(str, self.areas))
        return f"S3DIS(areas {areas}: {len(self)} blocks of {self.num_points} points in {len(self.rooms)} rooms)"


class S3DISRooms(Dataset):
    """Blocks that together contain every point of the rooms of one area, to score whole rooms.

    Attributes:
        area: the area.
        rooms: names of the rooms, sorted; a room's number is its position.
        block_points: points of a block.

    Shape:
        each item: block (N, in_channels) float32, classes (N,) int64, numbers of its points in the room (N,) int64, and
        the room's number
    """

    def __init__(self, root: str | Path, area: int, *, in_channels: int = 3) -> None:
        """Find the blocks.

        Args:
            root: the folder ``indoor3d_sem_seg_hdf5_data_test`` or its parent.
            area: the area, of 1..6.
            in_channels: 3 or 9, as for :class:`S3DIS`.

        Raises:
            DataError: the folder is missing or damaged, or the area has no room.
            UserError: ``in_channels`` is unsupported.
        """
        get = PREPARE_COMMAND.format(root=root) + " --only test"
        folder = _find_folder(root, ROOM_FOLDER)
        if folder is None:
            raise DataError(
                f"no test blocks of whole S3DIS rooms in {root}; expected {Path(root) / ROOM_FOLDER}/",
                fix=f"Make them from the raw rooms: {get}",
            )
        self.folder, self.area, self.in_channels = folder, int(area), _check_channels(in_channels)
        self._files = _BlockFiles(folder, arrays=("data", "label", "index"), channels=CHANNELS, get=get)
        self._again = f"Make it again: {get}"
        self.block_points = self._files.block_points
        self.rooms = tuple(sorted(room for room in set(self._files.rooms) if area_of(room) == self.area))
        if not self.rooms:
            there = ", ".join(str(a) for a in sorted({area_of(room) for room in self._files.rooms}))
            raise DataError(
                f"{folder} has no room of area {self.area}; it has rooms of the areas {there}",
                fix=f"Make it: {get} --areas {self.area}",
            )
        number = {room: i for i, room in enumerate(self.rooms)}
        self._blocks = np.array([i for i, room in enumerate(self._files.rooms) if room in number], dtype=np.int64)
        self._files.unpack(self._blocks)
        self._room_of = np.array([number[self._files.rooms[i]] for i in self._blocks], dtype=np.int64)
        self._tables = [self._room_table(room) for room in range(len(self.rooms))]

    def _room_table(self, room: int) -> tuple[int, np.ndarray]:
        """Return the number of points of a room and the corners of its bounding box, (2, 3) float64, in meters."""
        first = int(self._blocks[self._room_of == room][0])
        path = self._files.files[self._files.place(first)[0]]
        with malformed(f"{path} lacks the attributes room, room_points, room_low, room_high", fix=self._again):
            with hdf5_file(path) as file:
                name, total = str(file.attrs["room"]), int(file.attrs["room_points"])
                box = np.stack([file.attrs["room_low"], file.attrs["room_high"]]).astype(np.float64)
        if name != self.rooms[room]:
            raise DataError(f"{path} holds {name}, but {ROOM_LIST} says {self.rooms[room]}", fix=self._again)
        held, extent = self.block_points * len(self.blocks_of(room)), np.diff(box, axis=0)
        if not 0 < total <= held:
            raise DataError(f"{path} promises {total} points, but its blocks hold {held}", fix=self._again)
        if box.shape != (2, 3) or not np.isfinite(box).all() or not ((extent >= 0) & (extent < _MAX_EXTENT)).all():
            raise DataError(f"{path}: room_low and room_high are not the corners of a room", fix=self._again)
        return total, box

    def blocks_of(self, room: int) -> np.ndarray:
        """Return the items of a room."""
        return np.flatnonzero(self._room_of == room)

    def room_size(self, room: int) -> int:
        """Return the number of points of a room."""
        return self._tables[room][0]

    def room_cloud(self, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Assemble a room from its blocks.

        Returns:
            points: (M, 6) float32, x, y, z in meters from the room's lower corner and red, green, blue in 0..1.
            labels: (M,) int64 classes.

        Raises:
            DataError: a point of the room is in no block.
        """
        total, box = self._tables[room]
        points = np.empty((total, 6), dtype=np.float32)
        labels = np.full(total, -1, dtype=np.int64)
        for item in self.blocks_of(room):
            block = int(self._blocks[item])
            stored = self._files.data(block)
            index = self._index(block, total)
            points[index, :3] = stored[:, 6:9] * (box[1] - box[0]).astype(np.float32)
            points[index, 3:] = stored[:, 3:6]
            labels[index] = self._files.labels(block)
        missing = int((labels < 0).sum())
        if missing:
            raise DataError(
                f"{self.folder}: {missing} of the {total} points of {self.rooms[room]} are in no block", fix=self._again
            )
        if not np.isfinite(points).all():
            raise DataError(f"{self._files.where(block)}: its room has non-finite coordinates")
        return points, labels

    def _index(self, block: int, total: int) -> np.ndarray:
        index = self._files.index(block)
        if index.min() < 0 or index.max() >= total:
            raise DataError(
                f"{self._files.where(block)}: 'index' must be in 0..{total - 1}, but is in {index.min()}.."
                f"{index.max()}",
                fix=self._again,
            )
        return index

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Read one block, its classes, the numbers of its points in the room, and the room."""
        block, room = int(self._blocks[index]), int(self._room_of[index])
        points = self._index(block, self.room_size(room))
        values, labels = self._files.data(block)[:, : self.in_channels].copy(), self._files.labels(block)
        return torch.from_numpy(values), torch.from_numpy(labels), torch.from_numpy(points), room

    def __repr__(self) -> str:
        """Return a one-line summary."""
        total = sum(self.room_size(i) for i in range(len(self.rooms)))
        return f"S3DISRooms(area {self.area}: {len(self.rooms)} rooms, {total} points in {len(self)} blocks)"
