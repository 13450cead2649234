"""Read a mesh or a cloud of any format into one type."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data.rendering.gltf import read_gltf, read_stl
from data.rendering.obj import FileBeside, read_obj
from data.rendering.off import read_off
from data.rendering.ply import read_ply
from data.rendering.shape import Cloud, Mesh, check_mesh
from utils.errors import DataError

MESH_SUFFIXES = (".off", ".obj", ".ply", ".glb", ".gltf", ".stl")


def files_beside(path: Path) -> FileBeside:
    """Return a function that reads files by their name relative to ``path``'s folder, in upper or lower case.

    Names with backslashes and escapes (``%20``) are found too. If a name leads out of the folder's parent or to another
    disk, only its last part is used, in the folder of ``path``: exporters write paths of the machine they run on.
    """
    folder = path.parent

    def read(name: str) -> bytes | None:
        for candidate in dict.fromkeys((name, unquote(name))):
            relative = PurePosixPath(candidate.replace("\\", "/"))
            choices = [PurePosixPath(relative.name)]
            if not relative.is_absolute() and ":" not in candidate and relative.parts.count("..") <= 1:
                choices.insert(0, relative)
            for choice in choices:
                found = _find(folder, choice)
                if found is not None:
                    return found.read_bytes()
        return None

    return read


def _find(folder: Path, name: PurePosixPath) -> Path | None:
    """Return the file of this name, else one whose name differs only in case, else None."""
    exact = folder / name
    if exact.is_file():
        return exact
    place = folder
    for part in name.parts:
        if part == "..":
            place = place.parent
            continue
        try:
            same = [entry for entry in os.listdir(place) if entry.lower() == part.lower()]
        except OSError:
            return None
        if not same:
            return None
        place = place / min(same)
    return place if place.is_file() else None


def read_shape(path: str | os.PathLike[str]) -> Mesh | Cloud:
    """Read a mesh file, or a PLY without faces as a cloud.

    Raises:
        DataError: the file is missing, of another format, damaged or truncated, or without a usable surface.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(MESH_SUFFIXES)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{path} is empty")
    shape = _decode(data, str(path), suffix, files_beside(path))
    return check_mesh(shape, str(path)) if isinstance(shape, Mesh) else shape


def _decode(data: bytes, where: str, suffix: str, beside: FileBeside) -> Mesh | Cloud:
    if suffix == ".obj":
        return read_obj(data, where, beside)
    if suffix == ".off":
        return read_off(data, where)
    if suffix == ".ply":
        return read_ply(data, where, beside)
    if suffix == ".stl":
        return read_stl(data, where)
    return read_gltf(data, where, beside, binary=suffix == ".glb")


def read_mesh(path: str | os.PathLike[str]) -> Mesh:
    """Read a mesh file; the parts of a scene are joined in place.

    Raises:
        DataError: the file is missing, of another format, damaged or truncated, has no faces or no area, or has
            coordinates that are not finite.
    """
    shape = read_shape(path)
    if isinstance(shape, Cloud):
        raise DataError(f"{path} has no faces; a surface is needed to draw points from")
    return shape
