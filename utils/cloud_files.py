"""Read point clouds written by scanners and other programs: PCD, text (XYZ, PTS), NPY, LAS and LAZ."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import h5py
import numpy as np

from utils.errors import DataError, malformed
from utils.files import decode_text

CLOUD_SUFFIXES = (".pcd", ".xyz", ".pts", ".npy", ".las", ".laz")
TEXT_SUFFIXES = (".txt", ".csv", ".asc")  # also read as clouds, but often hold something else
_DECIMAL_COMMAS = re.compile(r"^[ \t]*-?\d+,\d+(?:[ \t]+-?\d+,\d+){2,}[ \t]*$", re.MULTILINE)
_PCD_DATA = re.compile(rb"^DATA[ \t]+(\w+)[ \t]*\r?\n", re.MULTILINE)
_PCD_KINDS = {"F": "f", "U": "u", "I": "i"}


def read_cloud_file(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a cloud in any format of ``CLOUD_SUFFIXES`` or ``TEXT_SUFFIXES``.

    Returns:
        Points (N, 3) float64, and colors (N, 3) float32 sRGB in [0, 1] or None.

    Raises:
        DataError: the file is missing, in another format, truncated, empty, or has no finite point.
    """
    path = Path(path)
    readers = {".pcd": _read_pcd, ".npy": _read_npy} | dict.fromkeys((".xyz", ".pts", *TEXT_SUFFIXES), _read_rows)
    suffix = path.suffix.lower()
    if suffix in (".las", ".laz"):
        points, colors = _read_las(path)
    elif suffix in readers:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        points, colors = readers[suffix](data, str(path))
    else:
        raise DataError(f"{path}: expected a cloud ending in {', '.join(CLOUD_SUFFIXES)}")
    return _usable(points, colors, str(path))


def _usable(points: np.ndarray, colors: np.ndarray | None, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Drop points with NaN coordinates, which depth cameras write for missing depth, or with some beyond float32.

    Raises:
        DataError: no point is left.
    """
    with np.errstate(over="ignore"):
        finite = np.isfinite(points.astype(np.float32)).all(1)  # the squares of larger ones are not finite in float64
    if not finite.any():
        raise DataError(f"{where} contains no points with finite coordinates")
    return points[finite], None if colors is None else colors[finite]


def _columns(table: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Split a table (N, C) into points (N, 3) and colors (N, 3) or None.

    Colors are integers from 0 to 255 in columns 4 to 6, or 5 to 7 after an intensity, as in PTS. Other columns
    (normals, labels) are ignored.

    Raises:
        DataError: the table has fewer than three columns, or a column per point.
    """
    if table.ndim != 2 or table.shape[1] < 3:
        raise DataError(f"{where} has the shape {table.shape}; expected one row per point, starting with x y z")
    if len(table) < 10 and table.shape[1] > 16:  # would be read as a few points without a word
        raise DataError(f"{where} has the shape {table.shape}; expected one row per point: transpose it")
    table = table.astype(np.float64)
    for first in (3, 4):
        color = table[:, first : first + 3]
        if color.shape[1] == 3 and len(color) and (color == np.rint(color)).all() and color.min() >= 0:
            if 1 < color.max() <= 255:
                return table[:, :3], (color / 255).astype(np.float32)
    return table[:, :3], None


def _read_rows(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read rows of numbers separated by spaces, commas or semicolons; skip headers and the count in a PTS file."""
    try:
        text = re.sub(r"(#|//)[^\n]*", "", decode_text(data))
    except ValueError as error:
        raise DataError(f"{where} is not a text file ({error})") from error
    text = text.replace(";", " ")
    # If every word of some line contains a comma, commas are decimal points; otherwise they separate numbers.
    decimal = _DECIMAL_COMMAS.search(text) is not None
    text = text.replace(",", "." if decimal else " ")
    lines = [line for line in text.split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if _is_row(line.split())), len(lines))
    rows = lines[first:]
    if not rows:
        raise DataError(f"{where} contains no rows of numbers; expected x y z on each line")
    width, last = len(rows[0].split()), len(rows[-1].split())
    if last != width:
        raise DataError(f"{where}: its last line has {last} numbers, not {width}: the file is truncated; get it again")
    try:
        table = np.loadtxt(rows, np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(f"{where}: its lines do not all hold {width} numbers ({error})") from error
    return _columns(table, where)


def _is_row(words: list[str]) -> bool:
    return len(words) > 1 and all(map(_is_number, words))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _read_npy(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    with malformed(f"{where} is not a readable NPY file of numbers", "; it may be truncated"):
        table = np.load(io.BytesIO(data), allow_pickle=False)
        if table.dtype.names is None and table.dtype.kind not in "fiu":
            raise ValueError(f"it holds {table.dtype}, not numbers")
    return _columns(table, where)


# -------------------------------------------------------------------------------------------------------------- PCD


def _read_pcd(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read PCD, the format of the Point Cloud Library: ascii, binary or binary_compressed."""
    match = _PCD_DATA.search(data)
    if match is None:
        raise DataError(f"{where} is not a PCD file: its header has no DATA line")
    lines = [line.split() for line in data[: match.start()].decode("ascii", "replace").splitlines()]
    header = {line[0]: line[1:] for line in lines if line and not line[0].startswith("#")}
    try:
        names = header["FIELDS"]
        counts = [int(n) for n in header.get("COUNT", ["1"] * len(names))]
        kinds = [_PCD_KINDS[kind] + size for kind, size in zip(header["TYPE"], header["SIZE"], strict=True)]
        fields = list(zip(names, kinds, counts, strict=True))
        points = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        if not {"x", "y", "z"} <= set(names) or points < 0 or min(counts) < 1:
            raise ValueError("x, y or z is missing")
        # "_" marks padding and may occur several times.
        dtype = np.dtype([(f"{i}:{n}", k, (c,)) for i, (n, k, c) in enumerate(fields)])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"{where} has an unreadable PCD header ({error})") from error
    body, kind = data[match.end() :], match[1].decode().lower()
    if kind == "ascii":
        columns = _pcd_text(body, fields, points, where)
    elif kind in ("binary", "binary_compressed"):
        columns = _pcd_binary(body, dtype, points, where, compressed=kind == "binary_compressed")
    else:
        raise DataError(f"{where} has unknown PCD data {kind}; expected ascii, binary or binary_compressed")
    by_name = {name: columns[i] for i, name in enumerate(names)}
    xyz = np.stack([by_name[axis][:, 0].astype(np.float64) for axis in "xyz"], 1)
    return xyz, _pcd_colors(by_name)


def _too_short(where: str, points: int, held: float) -> DataError:
    return DataError(f"{where} promises {points} points and holds {int(held)}: it is truncated; get it again")


def _pcd_text(body: bytes, fields: list[tuple[str, str, int]], points: int, where: str) -> list[np.ndarray]:
    words = body.split()
    width = sum(count for _, _, count in fields)
    if len(words) < points * width:
        raise _too_short(where, points, len(words) / width)
    table = np.array(words[: points * width]).reshape(points, width)
    columns, first = [], 0
    for _, kind, count in fields:
        try:
            columns.append(table[:, first : first + count].astype(np.float64).astype(kind))
        except ValueError as error:
            raise DataError(f"{where}: a point is not a row of numbers ({error})") from error
        first += count
    return columns


def _pcd_binary(body: bytes, dtype: np.dtype, points: int, where: str, *, compressed: bool) -> list[np.ndarray]:
    size = points * dtype.itemsize
    if not compressed:
        if len(body) < size:
            raise _too_short(where, points, len(body) / dtype.itemsize)
        table = np.frombuffer(body[:size], dtype)
        return [table[name] for name in dtype.names]
    if len(body) < 8:
        raise _too_short(where, points, 0)
    packed, unpacked = (int(n) for n in np.frombuffer(body[:8], "<u4"))
    if len(body) < 8 + packed or unpacked != size:
        raise _too_short(where, points, (len(body) - 8) / max(packed, 1) * points)
    plain = _lzf(body[8 : 8 + packed], size, where)
    # Compressed files store field after field, not point after point.
    columns, first = [], 0
    for name in dtype.names:
        kind, shape = dtype[name].base, dtype[name].shape
        length = points * dtype[name].itemsize
        columns.append(np.frombuffer(plain[first : first + length], kind).reshape(points, *shape))
        first += length
    return columns


def _lzf(packed: bytes, size: int, where: str) -> bytes:
    """Decompress LZF with the filter that ships with h5py.

    Raises:
        DataError: the data is damaged.
    """
    if size == 0:
        return b""
    with h5py.File(io.BytesIO(), "w") as file:
        stored = file.create_dataset("data", (size,), np.uint8, chunks=(size,), compression="lzf")
        stored.id.write_direct_chunk((0,), packed)
        try:
            return stored[:].tobytes()
        except OSError as error:
            raise DataError(f"{where}: its compressed points are damaged") from error


def _pcd_colors(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """Return the colors packed into ``rgb`` or ``rgba``: three bytes in the bits of a float or an integer."""
    for name in ("rgb", "rgba"):
        if name in columns and columns[name].dtype.itemsize == 4:
            bits = np.ascontiguousarray(columns[name][:, 0]).view(np.uint32)
            return (np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], 1) / 255).astype(np.float32)
    return None


# -------------------------------------------------------------------------------------------------------------- LAS


def _read_las(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        import laspy
    except ImportError as error:
        raise DataError(f"{path}: LAS and LAZ need another package: pip install 'laspy[lazrs]'") from error
    if not path.is_file():
        raise DataError(f"cannot read {path}: the file does not exist")
    with malformed(f"{path} is not a readable LAS or LAZ file", "; it may be truncated"):
        with laspy.open(path) as file:
            promised = file.header.point_count
            las = file.read()
    if len(las.points) < promised:
        raise _too_short(str(path), promised, len(las.points))
    points = np.stack([np.asarray(axis, np.float64) for axis in (las.x, las.y, las.z)], 1).reshape(-1, 3)
    if not {"red", "green", "blue"} <= set(las.point_format.dimension_names):
        return points, None
    colors = np.stack([np.asarray(las[name]) for name in ("red", "green", "blue")], 1).astype(np.float64)
    highest = colors.max(initial=0)
    if highest == 0:  # color fields exist but were never filled
        return points, None
    return points, (colors / (255 if highest <= 255 else 65535)).astype(np.float32)
