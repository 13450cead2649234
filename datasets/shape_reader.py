"""Read clouds and meshes of any size and format into arrays of one size, and cache the result."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.untrusted import PLY_HEADER, read_ply
from utils.caches import cache_folders, write_cache
from utils.cloud_files import CLOUD_SUFFIXES, TEXT_SUFFIXES, read_cloud_file
from utils.errors import DataError, UserError
from utils.progress import progress

MESH_SUFFIXES = (".off", ".obj", ".stl", ".glb", ".gltf")
SHAPE_SUFFIXES = (".ply", *MESH_SUFFIXES, *CLOUD_SUFFIXES, *TEXT_SUFFIXES)
DEFAULT_POINTS = 2048  # minimum read from each file, so that smaller numbers of points use the cache
_PLY_FACES = re.compile(rb"[\r\n]element[ \t]+face[ \t]+0*[1-9]")
_LARGEST = 1e15  # squares of larger coordinates overflow float32
_SECONDS = 3.0  # cache only what takes longer to read
_FORMAT = 1  # of the cached arrays; a new number invalidates old caches


class ShapeArrays(NamedTuple):
    """Clouds of one size.

    Attributes:
        points: (n, N, 3) float32, in the unit sphere.
        sizes: (n,) int64 points of each file; N for a mesh. Clouds with fewer than N repeat points.
    """

    points: np.ndarray
    sizes: np.ndarray


Reader = Callable[[Path, int, str], tuple[np.ndarray, int]]


def enclosing_sphere(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean (3,) of points (N, 3) and the largest distance from it."""
    center = points.mean(axis=0)
    return center, float(np.linalg.norm(points - center, axis=1).max())


def to_unit_sphere(points: np.ndarray) -> np.ndarray:
    """Center points (N, 3) on their mean and scale the largest radius to 1; identical points map to the origin."""
    center, radius = enclosing_sphere(points)
    return (points - center) / max(radius, np.finfo(np.float64).tiny)


def choose_rows(count: int, wanted: int, name: str) -> np.ndarray:
    """Draw ``wanted`` of ``count`` rows: every row once in random order, then again in the same order if needed.

    Args:
        count: number of rows.
        wanted: rows to draw; a smaller number draws a prefix of the same rows.
        name: seeds the order.
    """
    order = np.random.default_rng(zlib.crc32(name.encode())).permutation(count)
    return order[np.arange(wanted) % count]


def read_shape(path: Path, rows: int, name: str) -> tuple[np.ndarray, int]:
    """Read the points of a cloud, or sample the surface of a mesh uniformly by area.

    Args:
        path: a file with one of ``SHAPE_SUFFIXES``; a PLY with faces is a mesh.
        rows: number of points, N.
        name: seeds the draw.

    Returns:
        points: (N, 3) float64 in the unit sphere.
        size: points of the file; N for a mesh.

    Raises:
        DataError: the file is damaged, empty, or in an unsupported format.
    """
    if path.suffix.lower() in MESH_SUFFIXES or (path.suffix.lower() == ".ply" and _has_faces(path)):
        return to_unit_sphere(_sample_mesh(path, rows, name)), rows
    cloud = read_ply(path).astype(np.float64) if path.suffix.lower() == ".ply" else read_cloud_file(path)[0]
    if np.abs(cloud).max() > _LARGEST:
        raise DataError(f"{path} has coordinates beyond {_LARGEST:g}; it may be damaged: write or convert it again")
    return to_unit_sphere(cloud)[choose_rows(len(cloud), rows, name)], len(cloud)


def _has_faces(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return _PLY_FACES.search(file.read(PLY_HEADER).split(b"end_header")[0]) is not None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _sample_mesh(path: Path, count: int, name: str) -> np.ndarray:
    """Sample (count, 3) points from a mesh uniformly by area."""
    import trimesh  # takes a second; only meshes need it

    try:
        mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True)
        faces = len(mesh.faces)
        if path.suffix.lower() == ".off" and faces < (promised := _off_faces(path)):
            raise ValueError(f"it promises {promised} faces and holds {faces}: it is truncated")
        if not (np.isfinite(mesh.vertices).all() and np.abs(mesh.vertices).max() < _LARGEST):
            raise ValueError("it has non-finite or absurdly large coordinates")
        if not 0 < mesh.area < np.inf:
            raise ValueError("it has no surface to draw points from")
        points, _ = trimesh.sample.sample_surface(mesh, count, seed=zlib.crc32(name.encode()))
    except MemoryError:
        raise
    except Exception as error:  # trimesh raises many exception types on malformed files
        raise DataError(f"{path} is not a readable mesh ({error or type(error).__name__}); convert it again") from error
    return np.asarray(points, dtype=np.float64)


def _off_faces(path: Path) -> int:
    """Return the number of faces in the header of an OFF file."""
    with open(path, "rb") as file:
        text = re.sub(rb"#[^\n]*", b"", file.read(4096))
    return int(re.search(rb"OFF\s*\d+\s+(\d+)", text)[1])


def read_shapes(
    files: Sequence[Path], *, folder: Path, rows: int, split: str, how: str, read: Reader = read_shape
) -> ShapeArrays:
    """Read files into arrays; cache slow reads in ``.parsed`` below ``folder``.

    The cache key covers the names, sizes and times of all files, so a changed file invalidates it. If the folder is not
    writable, the cache is in the system's temporary folder.

    Args:
        files: one per cloud.
        folder: their common parent.
        rows: points of a cloud, N.
        split: for messages and the cache file's name.
        how: name of ``read`` and its settings, for the cache key.
        read: called with a file, N and a name that seeds the draw.

    Raises:
        DataError: a file cannot be read.
    """
    names = [path.relative_to(folder).as_posix() for path in files]
    key = _fingerprint(files, names, how, rows)
    places = cache_folders(folder, "parsed")
    for place in places:
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged: read the files again
            kept = np.load(place / f"{split}-{rows}-{key}.npy", mmap_mode="r")
            if kept.shape == (len(files),) and kept.dtype == _row_type(rows):
                return ShapeArrays(np.array(kept["points"]), np.array(kept["size"]))
    table = np.empty(len(files), _row_type(rows))
    begun = time.monotonic()
    for i, (path, name) in enumerate(zip(progress(files, text=f"reading {split}", unit="shapes"), names, strict=True)):
        table[i]["points"], table[i]["size"] = read(path, rows, name)
    if time.monotonic() - begun > _SECONDS:
        with contextlib.suppress(UserError, OSError):  # a cache is not worth an error
            kept = write_cache(places, f"{split}-{rows}-{key}.npy", table)
            for other in kept.parent.glob(f"{split}-{rows}-*.npy"):  # outdated
                if other != kept:
                    other.unlink()
    return ShapeArrays(table["points"].copy(), table["size"].astype(np.int64))


def _row_type(rows: int) -> np.dtype:
    return np.dtype([("size", "<i8"), ("points", "<f4", (rows, 3))])


def _fingerprint(files: Sequence[Path], names: Sequence[str], how: str, rows: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {how} {rows}".encode())
    for path, name in zip(files, names, strict=True):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        digest.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
