"""Sources of pairs of a cloud and a rendering: the released folder layout, or one packed file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import h5py
import numpy as np

from datasets.hdf5 import hdf5_file, open_hdf5, stored_array
from datasets.untrusted import GET_PAIRS, PLY_HEADER, PLY_VERTICES, check_cloud, read_ply
from utils.errors import DataError
from utils.files import check_name, data_files, is_data_name, read_lines

PACKED_NAME = "shapenet_render.h5"


PACKED_FORMAT, PACKED_VERSION = "crossnet-pack", 1


class PairSource(Protocol):
    """A source of pairs. Shapes are numbered 0 .. len(ids) - 1."""

    ids: list[str]  # "<synset>/<model_id>", sorted
    skipped: list[str]  # shapes without rendering

    def points(self, i: int) -> np.ndarray:
        """Read the cloud of shape i, (N, 3) float32."""

    def size(self, i: int) -> int | None:
        """Return the number of points of shape i without reading them, or None if unknown."""

    def view_names(self, i: int) -> Sequence[str]:
        """Return the names of the renderings of shape i, at least one."""

    def image_file(self, i: int, view: int) -> bytes:
        """Read an encoded rendering."""

    def where(self, i: int, view: int | None = None) -> str:
        """Return the location of shape i or of its rendering, for messages."""


class FolderSource:
    """Pairs ``<root>/ShapeNet/<synset>/<id>.ply``, ``<root>/ShapeNetRendering/<synset>/<id>/rendering/*.png``.

    Raises:
        DataError: there are no clouds, none has a rendering, a folder cannot be listed, or a name is not UTF-8.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        files = data_files(self.root / "ShapeNet", "*/*.ply")
        if not files:
            raise DataError(
                f"no clouds in {self.root / 'ShapeNet'}: expected <synset>/<model_id>.ply there, or the packed file "
                f"{self.root / PACKED_NAME}",
                fix=GET_PAIRS,
            )
        self.ids, self.skipped, self._views = [], [], []
        for file in files:
            name = f"{file.parent.name}/{file.stem}"
            check_name(name, file)
            views = self._list_views(name)
            if views:
                self.ids.append(name)
                self._views.append(views)
            else:
                self.skipped.append(name)
        if not self.ids:
            raise DataError(
                f"none of the {len(files)} clouds in {self.root / 'ShapeNet'} has a rendering: expected "
                f"{self._rendering(self.skipped[0])}/*.png",
                fix=GET_PAIRS,
            )

    def _rendering(self, name: str) -> Path:
        return self.root / "ShapeNetRendering" / name / "rendering"

    def _list_views(self, name: str) -> tuple[str, ...]:
        try:
            names = os.listdir(self._rendering(name))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise DataError(f"cannot list {self._rendering(name)}: {error.strerror or error}") from error
        return tuple(sorted(f for f in names if f.lower().endswith(".png") and is_data_name(f)))

    def points(self, i: int) -> np.ndarray:
        """Read the cloud of shape i, (N, 3) float32."""
        return read_ply(self.where(i))

    def size(self, i: int) -> int | None:
        """Return the number of points in the header of shape i, or None if it has none."""
        try:
            with open(self.where(i), "rb") as file:
                return int(PLY_VERTICES.search(file.read(PLY_HEADER))[1])
        except (OSError, TypeError):
            return None

    def view_names(self, i: int) -> Sequence[str]:
        """Return the names of the renderings of shape i."""
        return self._views[i]

    def image_file(self, i: int, view: int) -> bytes:
        """Read an encoded rendering."""
        path = self.where(i, view)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def where(self, i: int, view: int | None = None) -> str:
        """Return the path of shape i or of its rendering."""
        name = self.ids[i]
        if view is None:
            return str(self.root / "ShapeNet" / f"{name}.ply")
        return str(self._rendering(name) / self._views[i][view])


class _Block(NamedTuple):
    """Location of a contiguous array in a file."""

    offset: int  # in bytes
    row_type: np.dtype  # of one row, a subarray if rows have a shape


def _block(file: h5py.File, name: str) -> _Block | None:
    """Return the location of an uncompressed contiguous array in an HDF5 file, or None if it is stored otherwise."""
    stored = file[name]
    if not hasattr(os, "pread") or file.userblock_size or stored.is_virtual or stored.chunks or stored.external:
        return None
    offset = stored.id.get_offset()  # None if nothing was written yet
    if offset is None or offset + stored.nbytes > os.path.getsize(file.filename):
        return None
    return _Block(offset, np.dtype((stored.dtype, stored.shape[1:])))


class PackedSource:
    """One HDF5 file written by ``python -m datasets.pack`` (format in ``docs/datasets.md``).

    The file is opened read-only, once per process, at the first sample. Rows of contiguous arrays, as ``datasets.pack``
    writes them, are read with ``pread``, because HDF5's overhead is larger than the read itself.

    Raises:
        DataError: the file is not a packed file of this version, or its tables disagree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._plain: BinaryIO | None = None
        self._pid = -1
        try:
            with open_hdf5(self.path) as file:
                self._bytes = self.path.stat().st_size
                found = file.attrs.get("format"), file.attrs.get("version")
                if found != (PACKED_FORMAT, PACKED_VERSION):
                    raise DataError(
                        f"{self.path} is not a packed pretraining file of version {PACKED_VERSION} (format and version "
                        f"are {found}); make one with: python -m datasets.pack --data_root data --out {self.path}"
                    )
                self._check_shards(file)
                self.ids, self._names = (
                    [str(name) for name in stored_array(file, key).asstr()[:]] for key in ("ids", "view_names")
                )
                unpaired = stored_array(file, "unpaired").asstr()[:] if "unpaired" in file else ()
                self.skipped = [str(name) for name in unpaired]
                self._image_offset, self._view_offset = (
                    stored_array(file, key)[:].astype(np.int64, casting="safe")
                    for key in ("image_offset", "view_offset")
                )
                stored, images = stored_array(file, "points"), stored_array(file, "image_bytes")
                self._size = stored.shape[1] if stored.ndim > 1 else 0
                self._blocks = {name: block for name in ("points", "image_bytes") if (block := _block(file, name))}
                self._scale, self._shift = float(stored.attrs.get("scale", 1)), float(stored.attrs.get("offset", 0))
                shapes_agree = (
                    stored.ndim == 3
                    and stored.shape[2] == 3
                    and stored.dtype.kind in "uf"
                    and len(stored) == len(self.ids) == len(self._view_offset) - 1
                    and len(self._names) == len(self._image_offset) - 1 == self._view_offset[-1]
                    and images.shape == (self._image_offset[-1],)
                    and images.dtype == np.uint8
                    # Comparing differences instead could overflow.
                    and (self._view_offset[1:] > self._view_offset[:-1]).all()
                    and (self._image_offset[1:] > self._image_offset[:-1]).all()
                    and self._view_offset[0] == self._image_offset[0] == 0
                )
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self.path} does not exist", fix=GET_PAIRS) from error
        except Exception as error:  # h5py raises many exception types on malformed files
            raise DataError(f"{self.path} is not a readable packed pretraining file ({error})") from error
        if not shapes_agree or not self.ids:
            raise DataError(f"{self.path} is damaged: its tables of shapes, views and images disagree; pack it again")

    def _check_shards(self, file: h5py.File) -> None:
        """Raise if a file behind a virtual data set is missing, for which HDF5 would read zeros."""
        self._shards: list[str] = []
        for name, stored in file.items():
            for part in stored.virtual_sources() if isinstance(stored, h5py.Dataset) and stored.is_virtual else ():
                shard = self.path if part.file_name == "." else self.path.parent / part.file_name
                self._shards.append(shard.name)
                if not shard.is_file():
                    raise DataError(
                        f"{shard} is missing: {self.path} reads '{name}' from it; put it back next to that file"
                    )

    def _open(self) -> h5py.File:
        # A handle must not cross a fork: it contains a file position.
        if self._file is not None and self._pid != os.getpid():
            self._file.close()
            self._file = None
        if self._file is None:
            self._check_size()
            self._file, self._pid = hdf5_file(self.path), os.getpid()
        return self._file

    def _check_size(self) -> None:
        """Raise if the file was replaced after its tables were read; rows of other shapes would be read."""
        if self.path.stat().st_size != self._bytes:
            raise DataError(f"{self.path} was replaced or changed after it was opened; start again")

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Read rows first to last - 1 of an array, (last - first, ...)."""
        block = self._blocks.get(name)
        if block is None:
            return self._open()[name][first:last]
        if self._plain is None:
            self._check_size()
            self._plain = self.path.open("rb", buffering=0)
        size = block.row_type.itemsize
        data = os.pread(
            self._plain.fileno(), (last - first) * size, block.offset + first * size
        )  # pread does not move a file position, so threads can share it
        if len(data) != (last - first) * size:
            raise OSError("it is truncated")
        return np.frombuffer(data, block.row_type)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_plain": None}

    def points(self, i: int) -> np.ndarray:
        """Read the cloud of shape i, (N, 3) float32."""
        try:
            points = self._rows("points", i, i + 1)[0].astype(np.float32)
        except DataError:
            raise
        except Exception as error:  # h5py raises many exception types on malformed files
            raise self._unreadable(self.where(i), error) from error
        if (self._scale, self._shift) != (1, 0):
            points = points * np.float32(self._scale) + np.float32(self._shift)
        return check_cloud(points, self.where(i))

    def size(self, i: int) -> int:
        """Return the number of points, the same for all shapes."""
        return self._size

    def _unreadable(self, where: str, error: Exception) -> DataError:
        parts = f", which reads values from {', '.join(dict.fromkeys(self._shards[:3]))}," if self._shards else ""
        return DataError(f"{where}{parts} cannot be read ({error}); pack the file again")

    def view_names(self, i: int) -> Sequence[str]:
        """Return the names of the renderings of shape i."""
        return self._names[self._view_offset[i] : self._view_offset[i + 1]]

    def image_file(self, i: int, view: int) -> bytes:
        """Read an encoded rendering."""
        j = self._view_offset[i] + view
        try:
            return self._rows("image_bytes", self._image_offset[j], self._image_offset[j + 1]).tobytes()
        except DataError:
            raise
        except Exception as error:  # h5py raises many exception types on malformed files
            raise self._unreadable(self.where(i, view), error) from error

    def where(self, i: int, view: int | None = None) -> str:
        """Return the file and shape, and the rendering's name."""
        return f"{self.path}:{self.ids[i]}" + ("" if view is None else f"/{self.view_names(i)[view]}")


class JoinedSource:
    """The pairs of several sources, sorted by name.

    A name that an earlier source has too gets the suffix ``-2`` (or the next number that is free).

    Args:
        sources: to join, at least one.
        limit: the number of shapes to keep: all of the earlier sources, and the first ones of the last; None keeps all.

    Attributes:
        renamed: the number of shapes whose name got a suffix.

    Raises:
        DataError: there are fewer than ``limit`` shapes, or the earlier sources have as many already.
    """

    def __init__(self, sources: Sequence[PairSource], *, limit: int | None = None) -> None:
        self.sources = sources
        places = [(source, i) for source in sources for i in range(len(source.ids))][:limit]
        if limit is not None and len(places) < limit:
            raise DataError(f"there are {len(places)} shapes with renderings, fewer than the {limit} of --shapes")
        earlier = sum(len(source.ids) for source in sources[:-1])
        if limit is not None and limit <= earlier:
            raise DataError(f"--shapes {limit} leaves no place for the last set: the earlier ones have {earlier}")
        named: dict[str, tuple[PairSource, int]] = {}
        self.renamed = 0
        for source, i in places:
            name, number = source.ids[i], 1
            while name in named:
                number += 1
                name = f"{source.ids[i]}-{number}"
            self.renamed += number > 1
            named[name] = source, i
        self.ids = sorted(named)
        self.skipped = [name for source in sources for name in source.skipped]
        self._places = [named[name] for name in self.ids]

    def points(self, i: int) -> np.ndarray:
        """Read the cloud of shape i, (N, 3) float32."""
        source, number = self._places[i]
        return source.points(number)

    def size(self, i: int) -> int | None:
        """Return the number of points of shape i without reading them, or None if unknown."""
        source, number = self._places[i]
        return source.size(number)

    def view_names(self, i: int) -> Sequence[str]:
        """Return the names of the renderings of shape i."""
        source, number = self._places[i]
        return source.view_names(number)

    def image_file(self, i: int, view: int) -> bytes:
        """Read an encoded rendering."""
        source, number = self._places[i]
        return source.image_file(number, view)

    def where(self, i: int, view: int | None = None) -> str:
        """Return the location of shape i or of its rendering in the source it comes from."""
        source, number = self._places[i]
        return source.where(number, view)


def open_source(root: str | os.PathLike[str]) -> PairSource:
    """Open the pairs at ``root``: a packed file, a folder with one, or the released folder layout.

    Raises:
        DataError: ``root`` has none of these.
    """
    root = Path(root)
    if root.is_file():
        return PackedSource(root)
    if (root / PACKED_NAME).is_file():
        return PackedSource(root / PACKED_NAME)
    if not root.is_dir():
        raise DataError(
            f"{root} does not exist: expected a folder with ShapeNet/ and ShapeNetRendering/", fix=GET_PAIRS
        )
    return FolderSource(root)


def read_shape_list(path: str | os.PathLike[str]) -> list[str]:
    """Read shape ids from a text file, one per line, skipping empty lines and ``#`` comments.

    Raises:
        DataError: the file cannot be read or has no ids.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the list of shapes {path}: {error}") from error
    ids = [line for line in lines if not line.startswith("#")]
    if not ids:
        raise DataError(f"{path} names no shapes: expected one <synset>/<model_id> per line")
    return ids


def held_out_shapes(ids: Sequence[str], fraction: float, *, seed: int) -> list[str]:
    """Return the shapes to hold out of training, as :func:`draw_shapes` draws them.

    Args:
        ids: ``<synset>/<model_id>`` of every shape.
        fraction: of the shapes to hold out, rounded; at least 2 shapes if it is above 0.
        seed: of the run.

    Raises:
        DataError: fewer than 2 shapes would remain for training.
    """
    if not fraction:
        return []
    count = max(2, round(fraction * len(ids)))
    if len(ids) - count < 2:
        raise DataError(f"--val_fraction {fraction} holds out {count} of {len(ids)} pairs; 2 at least must remain")
    return draw_shapes(ids, count, seed=seed)


def draw_shapes(ids: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Draw at most ``count`` shapes, in the order of ``ids``: a function of the names and the seed.

    Shapes are ranked by a hash of seed and name, so that adding a few shapes to the set changes few of the choices.
    """
    chosen = set(sorted(ids, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])
    return [name for name in ids if name in chosen]


def choose_shapes(ids: Sequence[str], wanted: Iterable[str], *, where: str) -> list[int]:
    """Return the numbers of the wanted shapes, in the order of ``ids``.

    Args:
        ids: ``<synset>/<model_id>`` of every shape.
        wanted: ids of the same form, or bare model ids, which match in any synset.
        where: source of ``ids``, for the message.

    Raises:
        DataError: a wanted shape is missing, or ``wanted`` is empty.
    """
    wanted = set(wanted)
    if not wanted:
        raise DataError(f"no shapes of {where} were chosen")
    missing = sorted(wanted - set(ids) - {name.split("/")[-1] for name in ids})
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} listed shapes are not in {where} with a rendering, such as "
            f"{missing[0]}"
        )
    return [i for i, name in enumerate(ids) if name in wanted or name.split("/")[-1] in wanted]
