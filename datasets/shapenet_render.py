"""ShapeNet clouds paired with renderings, from the released folder layout or from one packed file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import h5py
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from plyfile import PlyData
from torch import Tensor
from torch.utils.data import Dataset

from datasets.hdf5 import hdf5_file, open_hdf5, stored_array
from datasets.streams import SampleStreams
from utils.errors import DataError
from utils.files import data_files, is_data_name, read_lines

PACKED_NAME = "shapenet_render.h5"
PACKED_FORMAT, PACKED_VERSION = "crossnet-pack", 1
_PLY_HEADER = 1 << 16  # bytes that hold the header of any PLY file
_PLY_VERTICES = re.compile(rb"[\r\n]element[ \t]+vertex[ \t]+(\d{1,12})[ \t]*[\r\n]")
_PLY_FIRST_LINE = re.compile(rb"(?:\xef\xbb\xbf)?ply[ \t]*(\r\n|\n|\r)", re.IGNORECASE)
_IMAGE_FORMATS = ("PNG", "JPEG")  # Pillow would also start other programs, for pictures in PostScript
_MAX_PIXELS = 1 << 24  # a file of some kilobytes can claim many more, which decoding would fill
_HELP = (
    "get them with: bash data/download_data.sh shapenet shapenet_render (python -m data.check_data shows what is there)"
)


class SampleKey(NamedTuple):
    """What the sampler hands to the data set: a sample's randomness is a function of both."""

    epoch: int
    index: int


class PairSource(Protocol):
    """Where pairs come from. Shapes are numbered 0 .. len(ids) - 1."""

    ids: list[str]  # "<synset>/<model_id>", sorted
    skipped: list[str]  # shapes without rendering

    def points(self, i: int) -> np.ndarray:
        """Cloud of shape i, (N, 3) float32."""

    def size(self, i: int) -> int | None:
        """Points of shape i, without reading them; None where that cannot be told."""

    def view_names(self, i: int) -> Sequence[str]:
        """Names of the renderings of shape i, at least one."""

    def image_file(self, i: int, view: int) -> bytes:
        """Encoded rendering."""

    def where(self, i: int, view: int | None = None) -> str:
        """Where shape i or its rendering lies, for messages."""


def read_ply(path: str | os.PathLike[str]) -> np.ndarray:
    """Coordinates of a PLY file, ascii or binary.

    Returns:
        (N, 3) float32.

    Raises:
        DataError: no PLY, truncated, without x y z, empty, or with coordinates that are not finite.
    """
    try:
        with open(path, "rb") as file:
            _check_ply_sizes(file)
            vertex = PlyData.read(_with_plain_header(file))["vertex"]
        points = np.stack([np.asarray(vertex[axis], dtype=np.float32) for axis in "xyz"], axis=1)
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone; {_HELP}") from error
    except Exception as error:  # plyfile raises many kinds on malformed files
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is no readable PLY with an element 'vertex' of x, y, z ({reason}); fetch or convert it again"
        ) from error
    return check_cloud(points, str(path))


def _with_plain_header(file: BinaryIO) -> BinaryIO:
    """Return the file, or a copy in memory whose header plyfile can read.

    plyfile decodes headers as ASCII and takes nothing but a line end after ``ply`` and ``end_header``. Programs write
    comments in any encoding, blanks at line ends, empty lines and, in ascii files, a byte-order mark.
    """
    start = file.read(_PLY_HEADER)
    file.seek(0)
    first = _PLY_FIRST_LINE.match(start)
    if first is None:
        return file
    newline = first[1]
    last = re.search(re.escape(newline) + rb"[ \t]*end_header[ \t]*" + re.escape(newline), start)
    if last is None:
        return file
    lines = start[first.end() : last.start()].split(newline)
    plain = [line.strip().decode("ascii", "replace").replace("\ufffd", "?").encode() for line in lines if line.strip()]
    header = newline.join([b"ply", *plain, b"end_header", b""])
    if start.startswith(header):
        return file
    file.seek(last.end())
    return io.BytesIO(header + file.read())


def _check_ply_sizes(file: BinaryIO) -> None:
    """See that the file can hold the rows that its header promises: plyfile takes memory for them first.

    Raises:
        ValueError: it cannot, or a number of rows is no number.
        IndexError: a number of rows is missing.
    """
    header, size = file.read(_PLY_HEADER).split(b"end_header")[0], file.seek(0, os.SEEK_END)
    file.seek(0)
    for element in re.split(rb"[\r\n]element ", header)[1:]:
        words = element.split()
        rows, values = int(words[1]), max(1, element.count(b"property "))
        if rows * values > size:
            raise ValueError(f"its header promises {rows} rows of {values} values, its size is {size} bytes")


def check_cloud(points: np.ndarray, name: str) -> np.ndarray:
    """Return the cloud, or say what is wrong with it.

    Raises:
        DataError: empty, or coordinates that are not finite.
    """
    if len(points) == 0:
        raise DataError(f"{name} holds no points")
    if not np.isfinite(points).all():
        bad = ~np.isfinite(points).all(axis=1)
        raise DataError(f"{name}: {bad.sum()} of {len(points)} points are not finite (NaN or infinite coordinates)")
    return points


class FolderSource:
    """``<root>/ShapeNet/<synset>/<id>.ply`` with ``<root>/ShapeNetRendering/<synset>/<id>/rendering/*.png``.

    Raises:
        DataError: no clouds, or none with a rendering.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        files = data_files(self.root / "ShapeNet", "*/*.ply")
        if not files:
            raise DataError(
                f"no clouds in {self.root / 'ShapeNet'}: expected <synset>/<model_id>.ply there, or the packed file "
                f"{self.root / PACKED_NAME}; {_HELP}"
            )
        self.ids, self.skipped, self._views = [], [], []
        for file in files:
            name = f"{file.parent.name}/{file.stem}"
            views = self._list_views(name)
            if views:
                self.ids.append(name)
                self._views.append(views)
            else:
                self.skipped.append(name)
        if not self.ids:
            raise DataError(
                f"none of the {len(files)} clouds in {self.root / 'ShapeNet'} has a rendering: expected "
                f"{self._rendering(self.skipped[0])}/*.png; {_HELP}"
            )

    def _rendering(self, name: str) -> Path:
        return self.root / "ShapeNetRendering" / name / "rendering"

    def _list_views(self, name: str) -> tuple[str, ...]:
        try:
            names = os.listdir(self._rendering(name))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return tuple(sorted(f for f in names if f.lower().endswith(".png") and is_data_name(f)))

    def points(self, i: int) -> np.ndarray:
        """Cloud of shape i, (N, 3) float32."""
        return read_ply(self.where(i))

    def size(self, i: int) -> int | None:
        """Points of shape i by its header; None where that does not say it."""
        try:
            with open(self.where(i), "rb") as file:
                return int(_PLY_VERTICES.search(file.read(_PLY_HEADER))[1])
        except (OSError, TypeError):
            return None

    def view_names(self, i: int) -> Sequence[str]:
        """Names of the renderings of shape i."""
        return self._views[i]

    def image_file(self, i: int, view: int) -> bytes:
        """Encoded rendering."""
        path = self.where(i, view)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def where(self, i: int, view: int | None = None) -> str:
        """Path of shape i or of its rendering."""
        name = self.ids[i]
        if view is None:
            return str(self.root / "ShapeNet" / f"{name}.ply")
        return str(self._rendering(name) / self._views[i][view])


class _Block(NamedTuple):
    """Where an array lies in a file."""

    offset: int  # in bytes
    row_type: np.dtype  # of one row, a subarray where rows have a shape


def _block(file: h5py.File, name: str) -> _Block | None:
    """Place of an array that lies in an HDF5 file in one uncompressed piece; None where it is stored otherwise."""
    stored = file[name]
    if not hasattr(os, "pread") or file.userblock_size or stored.is_virtual or stored.chunks or stored.external:
        return None
    offset = stored.id.get_offset()  # None where nothing was written yet
    if offset is None or offset + stored.nbytes > os.path.getsize(file.filename):
        return None
    return _Block(offset, np.dtype((stored.dtype, stored.shape[1:])))


class PackedSource:
    """One HDF5 file as ``python -m datasets.pack`` writes it (format in ``docs/datasets.md``).

    The file is opened read-only, once per process, when a sample is first asked for. Where an array lies in it in one
    piece, as ``datasets.pack`` writes them, its rows are read from there directly: HDF5's own way takes longer than the
    reading.

    Raises:
        DataError: no packed file of this version, or its tables do not agree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._plain: BinaryIO | None = None
        self._pid = -1
        try:
            with open_hdf5(self.path) as file:
                found = file.attrs.get("format"), file.attrs.get("version")
                if found != (PACKED_FORMAT, PACKED_VERSION):
                    raise DataError(
                        f"{self.path} is no packed pretraining file of version {PACKED_VERSION} (format and version "
                        f"read {found}); make one with: python -m datasets.pack --data_root data --out {self.path}"
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
                    # Not by differences, which could run over.
                    and (self._view_offset[1:] > self._view_offset[:-1]).all()
                    and (self._image_offset[1:] > self._image_offset[:-1]).all()
                    and self._view_offset[0] == self._image_offset[0] == 0
                )
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self.path} does not exist; {_HELP}") from error
        except Exception as error:  # h5py raises many kinds on malformed files
            raise DataError(f"{self.path} is no readable packed pretraining file ({error})") from error
        if not shapes_agree or not self.ids:
            raise DataError(
                f"{self.path} is damaged: its tables of shapes, views and images do not agree; pack it again"
            )

    def _check_shards(self, file: h5py.File) -> None:
        """HDF5 reads zeros where a file behind a virtual data set is missing."""
        self._shards: list[str] = []
        for name, stored in file.items():
            for part in stored.virtual_sources() if isinstance(stored, h5py.Dataset) and stored.is_virtual else ():
                shard = self.path if part.file_name == "." else self.path.parent / part.file_name
                self._shards.append(shard.name)
                if not shard.is_file():
                    raise DataError(f"{shard} is missing: {self.path} takes '{name}' from it; put it back beside it")

    def _open(self) -> h5py.File:
        # A handle must not cross a fork: HDF5 keeps a file position in it.
        if self._file is not None and self._pid != os.getpid():
            self._file.close()
            self._file = None
        if self._file is None:
            self._file, self._pid = hdf5_file(self.path), os.getpid()
        return self._file

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of an array of the file, first to last - 1."""
        block = self._blocks.get(name)
        if block is None:
            return self._open()[name][first:last]
        if self._plain is None:
            self._plain = self.path.open("rb", buffering=0)
        size = block.row_type.itemsize
        data = os.pread(self._plain.fileno(), (last - first) * size, block.offset + first * size)  # has no position
        if len(data) != (last - first) * size:
            raise OSError("it is truncated")
        return np.frombuffer(data, block.row_type)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_plain": None}

    def points(self, i: int) -> np.ndarray:
        """Cloud of shape i, (N, 3) float32."""
        try:
            points = self._rows("points", i, i + 1)[0].astype(np.float32)
        except DataError:
            raise
        except Exception as error:  # h5py raises many kinds on malformed files
            raise self._unreadable(self.where(i), error) from error
        if (self._scale, self._shift) != (1, 0):
            points = points * np.float32(self._scale) + np.float32(self._shift)
        return check_cloud(points, self.where(i))

    def size(self, i: int) -> int:
        """Points of every shape."""
        return self._size

    def _unreadable(self, where: str, error: Exception) -> DataError:
        parts = f", which takes values from {', '.join(dict.fromkeys(self._shards[:3]))}," if self._shards else ""
        return DataError(f"{where}{parts} cannot be read ({error}); pack the file again")

    def view_names(self, i: int) -> Sequence[str]:
        """Names of the renderings of shape i."""
        return self._names[self._view_offset[i] : self._view_offset[i + 1]]

    def image_file(self, i: int, view: int) -> bytes:
        """Encoded rendering."""
        j = self._view_offset[i] + view
        try:
            return self._rows("image_bytes", self._image_offset[j], self._image_offset[j + 1]).tobytes()
        except DataError:
            raise
        except Exception as error:  # h5py raises many kinds on malformed files
            raise self._unreadable(self.where(i, view), error) from error

    def where(self, i: int, view: int | None = None) -> str:
        """File and shape, and the rendering's name."""
        return f"{self.path}:{self.ids[i]}" + ("" if view is None else f"/{self.view_names(i)[view]}")


def open_source(root: str | os.PathLike[str]) -> PairSource:
    """The pairs under ``root``: a packed file, a folder that holds one, or the released folder layout.

    Raises:
        DataError: nothing of the kind is there.
    """
    root = Path(root)
    if root.is_file():
        return PackedSource(root)
    if (root / PACKED_NAME).is_file():
        return PackedSource(root / PACKED_NAME)
    if not root.is_dir():
        raise DataError(f"{root} does not exist: expected a folder with ShapeNet/ and ShapeNetRendering/; {_HELP}")
    return FolderSource(root)


def read_shape_list(path: str | os.PathLike[str]) -> list[str]:
    """Shape ids of a text file, one a line (see ``choose_shapes``); empty lines and ``#`` comments do not count.

    Raises:
        DataError: the file is not there or holds no id.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the list of shapes {path}: {error}") from error
    ids = [line for line in lines if not line.startswith("#")]
    if not ids:
        raise DataError(f"{path} names no shapes: expected one <synset>/<model_id> a line")
    return ids


def choose_shapes(ids: Sequence[str], wanted: Iterable[str], *, where: str) -> list[int]:
    """Numbers of the wanted shapes, in the order of ``ids``.

    Args:
        ids: ``<synset>/<model_id>`` of every shape.
        wanted: ids of the same form, or bare model ids, which match under any synset.
        where: what ``ids`` are of, for the message.

    Raises:
        DataError: a wanted shape is not there, or none is wanted.
    """
    wanted = set(wanted)
    if not wanted:
        raise DataError(f"no shapes of {where} were chosen")
    missing = sorted(wanted - set(ids) - {name.split("/")[-1] for name in ids})
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} listed shapes are not in {where} with a rendering, "
            f"{missing[0]} for one"
        )
    return [i for i, name in enumerate(ids) if name in wanted or name.split("/")[-1] in wanted]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a rendering.

    Raises:
        DataError: not a readable image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {_MAX_PIXELS:,}")
        image.load()
    except Exception as error:  # Pillow raises many kinds on malformed files
        reason = "it begins like no image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} is no readable PNG image ({reason}); fetch or render it again") from error
    return image


class ShapeNetRender(Dataset):
    """Pairs of a cloud and a rendering of the same object. Each cloud and image file is read once per sample.

    Args:
        root: folder in the released layout, a packed file, or a folder that holds ``shapenet_render.h5``.
        seed: a sample's view and subset are functions of (seed, epoch, index).
        transform: decoded rendering -> pixels (H, W, 3), see ``datasets.transforms.RenderPixels``; None: no image.
        only: ids of the shapes to use, see ``choose_shapes``; None uses all that have a rendering.
        strict: raise at a sample that cannot be read. Otherwise the next readable one stands in for it, and the
            sample's ``bad`` says what happened.
        num_points: points that a view will be drawn from a cloud; None: views keep every point.

    Attributes:
        ids: shapes in use, sorted.
        skipped: shapes of the source that have no rendering.
        cloud_size: points of a sample, N: those of the first cloud, or ``num_points`` where it has fewer. Larger clouds
            are cut to a random subset of N; the points of smaller ones repeat, after each was there once.
        sizes: points of every cloud, or of the first one alone where those looked at have one size.

    Raises:
        DataError: see ``open_source``; or a shape of ``only`` is not there.
    """

    # A sample's stand-ins: so many in a row cannot all be bad in a data set that is worth training on.
    ATTEMPTS = 8

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        seed: int = 1,
        transform: Callable[[Image.Image], Tensor] | None = None,
        only: Iterable[str] | None = None,
        strict: bool = False,
        num_points: int | None = None,
    ) -> None:
        self.source = open_source(root)
        self.seed, self.transform, self.strict = seed, transform, strict
        self._chosen = list(range(len(self.source.ids)))
        if only is not None:
            self._chosen = choose_shapes(self.source.ids, only, where=str(root))
        self.ids = [self.source.ids[i] for i in self._chosen]
        self.skipped = self.source.skipped
        self.sizes = self._look_at_sizes()
        self.cloud_size = self.sizes[0]
        if num_points is not None and max(self.sizes) >= num_points:
            self.cloud_size = max(self.cloud_size, num_points)

    def _look_at_sizes(self) -> list[int]:
        """Size of the first readable cloud; of all clouds where a few others show that they differ."""
        error: DataError | None = None
        first = None
        for i in self._chosen[: self.ATTEMPTS]:
            try:
                first = len(self.source.points(i))
                break
            except DataError as failure:
                error = error or failure
                if self.strict:
                    break
        if first is None:
            raise error
        spread = np.linspace(0, len(self._chosen) - 1, self.ATTEMPTS).round().astype(int)
        if {self.source.size(self._chosen[i]) for i in spread} <= {None, first}:
            return [first]
        sizes = (self.source.size(i) for i in self._chosen)
        return [first, *(size for size in sizes if size is not None)]

    def smaller_than(self, num_points: int) -> int:
        """Number of clouds with fewer points; 0 where those looked at have one size."""
        return sum(size < num_points for size in self.sizes[1:])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """Sample of (epoch, index); a bare index means epoch 0.

        Returns:
            ``index`` int as asked, ``points`` (N, 3) float32, ``count``: how many of them, the first, are points of
            the cloud and not repetitions; the transform's ``pixels``; ``bad``: messages of unreadable samples that
            another one stands in for here, mostly empty.

        Raises:
            DataError: with ``strict``, or when ``ATTEMPTS`` samples in a row are unreadable.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[dict[str, Any]]:
        """Samples of a batch, as PyTorch's loader asks for them: their random numbers are drawn together."""
        keys = [key if isinstance(key, tuple) else SampleKey(0, key) for key in keys]
        for key in keys:
            if not 0 <= key.index < len(self):
                raise IndexError(f"sample {key.index} of {len(self)}")
        draws: dict[SampleKey, float] = {}
        for epoch in {key.epoch for key in keys}:
            of_epoch = [key for key in keys if key.epoch == epoch]
            drawn = self._streams(epoch, [key.index for key in of_epoch]).uniform()
            draws.update(zip(of_epoch, drawn.tolist(), strict=True))
        return [self._sample(key, draws[key]) for key in keys]

    def _streams(self, epoch: int, indices: Sequence[int]) -> SampleStreams:
        return SampleStreams(seed=self.seed, epoch=epoch, index=torch.tensor(indices))

    def _sample(self, key: SampleKey, draw: float) -> dict[str, Any]:
        bad: list[str] = []
        for attempt in range(self.ATTEMPTS):
            try:
                return {**self._read(key, draw, (key.index + attempt) % len(self)), "bad": bad}
            except DataError as error:
                if self.strict or attempt + 1 == self.ATTEMPTS:
                    raise
                bad.append(str(error))
        raise AssertionError("unreachable")

    def _read(self, key: SampleKey, draw: float, stand_in: int) -> dict[str, Any]:
        """Shape ``stand_in`` with the randomness of sample ``key``: no two samples of an epoch share theirs.

        Args:
            key: of the sample asked for.
            draw: its first random number, which chooses the view.
            stand_in: whose files to read.
        """
        i = self._chosen[stand_in]
        points = torch.from_numpy(self.source.points(i))
        count = min(len(points), self.cloud_size)
        if len(points) != self.cloud_size:
            order = self._streams(key.epoch, [key.index]).uniform(1 + len(points))[0, 1:].topk(count).indices
            points = points[order[torch.arange(self.cloud_size) % count]]
        sample = {"index": key.index, "points": points, "count": count}
        if self.transform is not None:
            view = int(draw * len(self.source.view_names(i)))
            image = decode_image(self.source.image_file(i, view), self.source.where(i, view))
            sample["pixels"] = self.transform(image)
        return sample

    def __repr__(self) -> str:
        return f"ShapeNetRender({len(self)} shapes of {self.cloud_size} points, {len(self.skipped)} without rendering)"


def collate_pairs(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Returns:
        ``index`` (B,), ``points`` (B, N, 3), ``counts`` (B,): points of each that are not repetitions; ``bad``: one
        message for every sample that others stand in for; and where there are images, ``pixels`` (B, H, W, 3) uint8, as
        large as the largest height and width, and ``sizes`` (B, 2), height and width of each.
    """
    batch = {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "points": torch.stack([sample["points"] for sample in samples]),
        "counts": torch.tensor([sample["count"] for sample in samples]),
        "bad": ["; ".join(sample["bad"]) for sample in samples if sample["bad"]],
    }
    if "pixels" in samples[0]:
        sizes = torch.tensor([sample["pixels"].shape[:2] for sample in samples])
        pixels = torch.zeros(len(samples), *sizes.amax(0).tolist(), 3, dtype=torch.uint8)
        for sample, canvas in zip(samples, pixels, strict=True):
            height, width, _ = sample["pixels"].shape
            canvas[:height, :width] = sample["pixels"]
        batch |= {"pixels": pixels, "sizes": sizes}
    return batch
