"""Read Wavefront OBJ with its materials and textures.

trimesh reads OBJ too, but triangulates every polygon as a fan, which is wrong for concave outlines (window frames,
letters), and drops faces with missing vertices; both are common in files from the web.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data.rendering.polygons import triangulate
from data.rendering.shape import Material, Mesh, unit_colors
from utils.errors import DataError

MAX_TEXTURE = 512
# What ``map_Kd`` may carry before the file's name, with the number of values that follow each option.
_MAP_OPTIONS = {"-blendu": 1, "-blendv": 1, "-cc": 1, "-clamp": 1, "-mm": 2, "-texres": 1, "-boost": 1, "-bm": 1}
_MAP_VECTORS = ("-o", "-s", "-t")  # one to three numbers each

FileBeside = Callable[[str], bytes | None]  # a file's bytes by its name relative to the OBJ; None: it is not there


@dataclass
class _Polygons:
    """Faces with the same number of corners: their words, their position in the file, their material."""

    words: list[str] = field(default_factory=list)
    before: list[tuple[int, int]] = field(default_factory=list)  # vertices and texture coordinates read so far
    material: list[int] = field(default_factory=list)


def read_obj(data: bytes, where: str, beside: FileBeside, *, max_texture: int = MAX_TEXTURE) -> Mesh:
    """Read the bytes of an OBJ file.

    Args:
        data: the file.
        where: its name, for messages.
        beside: returns the files that it names (material libraries, textures).
        max_texture: larger textures are scaled down to this side in pixels.

    Raises:
        DataError: a line cannot be parsed, or a face refers to a missing vertex (truncated files).
    """
    vertices: list[str] = []
    texture: list[str] = []
    materials: dict[str, Material] = {}
    order: dict[str, int] = {"": 0}
    current, notes = 0, []
    by_size: dict[int, _Polygons] = defaultdict(_Polygons)
    text = data.decode("utf-8", "replace").replace("\\\r\n", " ").replace("\\\n", " ")
    for line in text.splitlines():
        words = line.split(None, 1)
        if len(words) < 2:
            continue
        key, rest = words
        if key == "v":
            vertices.append(rest)
        elif key == "vt":
            texture.append(rest)
        elif key == "f":
            size = len(rest.split())
            if size < 3:  # a point or line
                continue
            group = by_size[size]
            group.words.append(rest)
            group.before.append((len(vertices), len(texture)))
            group.material.append(current)
        elif key == "usemtl":
            current = order.setdefault(" ".join(rest.split()), len(order))
        elif key == "mtllib":
            found, missing = _read_libraries(rest.strip(), beside, max_texture)
            materials.update(found)
            notes += missing
    xyz, own = _vertex_table(vertices, where)
    uv_table = _uv_table(texture, where)
    parts = [_triangles_of(group, size, xyz, len(uv_table) - 1, where) for size, group in sorted(by_size.items())]
    if not parts:
        raise DataError(f"{where} has no faces; a surface is needed to draw points from")
    triangles, uv, material = (np.concatenate(part) for part in zip(*parts, strict=True))
    missing = [name for name in order if name and name not in materials]
    if missing and materials:
        notes.append(f"{len(missing)} of its materials are not in its material library, {missing[0]} first")
    return Mesh(
        vertices=xyz,
        triangles=triangles,
        uv=uv_table[uv],
        material=material,
        # White if the vertices have colors and no material overrides it.
        materials=[materials.get(name, _plain(name, white=own is not None)) for name in order],
        colors=None if own is None else own[triangles],
        notes=notes,
    )


def numbers(text: str, kind: type) -> np.ndarray:
    """Parse numbers separated by blanks, ten times as fast as from a list of words.

    Raises:
        ValueError: something is not a number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how numpy says that it stopped at such a word
        try:
            return np.fromstring(text, kind, sep=" ")
        except DeprecationWarning as error:
            raise ValueError("not everything is a number") from error


def _plain(name: str, *, white: bool) -> Material:
    return Material(name or "none", np.ones(3, np.float32)) if white else Material(name or "none")


def _vertex_table(lines: list[str], where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return coordinates (v, 3), and colors (v, 3) in [0, 1] if every vertex has them (``v x y z r g b``)."""
    if not lines:
        return np.zeros((0, 3)), None
    width = len(lines[0].split())
    try:
        table = numbers(" ".join(lines), np.float64)
        if table.size == len(lines) * width and width in (3, 4, 6, 7):
            table = table.reshape(-1, width)
        else:  # lines of uneven length
            table, width = np.array([line.split()[:3] for line in lines], np.float64), 3
    except ValueError as error:
        raise DataError(f"{where}: a vertex is not three numbers; the file is damaged or truncated") from error
    return table[:, :3].copy(), (unit_colors(table[:, 3:6]) if width >= 6 else None)


def _uv_table(lines: list[str], where: str) -> np.ndarray:
    """Return texture coordinates (n + 1, 2) float32; row 0 is for corners without any."""
    try:
        rows = [(float(words[0]), float(words[1]) if len(words) > 1 else 0.0) for words in map(str.split, lines)]
    except (ValueError, IndexError) as error:
        raise DataError(f"{where}: a texture coordinate is not a number; the file is damaged or truncated") from error
    return np.asarray([(0.0, 0.0), *rows], np.float32)


def _triangles_of(
    group: _Polygons, size: int, xyz: np.ndarray, uvs: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vertex (t, 3) and texture indices (t, 3) and the material (t,) of polygons with ``size`` corners."""
    index, uv = _corner_indices(group.words, size, where)  # (f, size) each, from 1, negative ones count back
    before = np.asarray(group.before)  # (f, 2)
    index = np.where(index > 0, index - 1, before[:, :1] + index)
    uv = np.where(uv >= 0, uv, before[:, 1:] + 1 + uv)
    if index.min() < 0 or index.max() >= len(xyz):
        wrong = int(index.max()) + 1 if index.max() >= len(xyz) else int(index.min()) + 1
        raise DataError(
            f"{where}: a face refers to vertex {wrong}, the file has {len(xyz)}; it is damaged or truncated, "
            "get it again"
        )
    if uv.min() < 0 or uv.max() > uvs:
        raise DataError(
            f"{where}: a face refers to texture coordinate {int(uv.max())}, the file has {uvs}; it is damaged"
        )
    face, corners = triangulate(xyz[index])
    return (
        np.take_along_axis(index[face], corners, 1),
        np.take_along_axis(uv[face], corners, 1),
        np.asarray(group.material)[face],
    )


def _corner_indices(lines: list[str], size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertex and texture numbers (f, size) of faces; 0 means no texture coordinate."""
    text = " ".join(lines)
    corners, slashes = len(lines) * size, text.count("/")
    try:
        if slashes == 0:
            index = numbers(text, np.int64).reshape(-1, size)
            return index, np.zeros_like(index)
        if slashes in (corners, 2 * corners):  # every corner of one form: v/t, v/t/n or v//n
            table = numbers(text.replace("//", "/0/").replace("/", " "), np.int64)
            per_corner = 1 + slashes // corners
            if table.size == corners * per_corner:
                table = table.reshape(-1, size, per_corner)
                return table[..., 0], table[..., 1]
        split = [corner.split("/") for corner in text.split()]
        index = np.array([int(corner[0]) for corner in split], np.int64)
        uv = np.array([int(corner[1]) if len(corner) > 1 and corner[1] else 0 for corner in split], np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: a face is not a list of numbers ({error}); the file is damaged") from error
    return index.reshape(-1, size), uv.reshape(-1, size)


# -------------------------------------------------------------------------------------------------------- materials


def _read_libraries(names: str, beside: FileBeside, max_texture: int) -> tuple[dict[str, Material], list[str]]:
    """Read the files of a ``mtllib`` line: one whose name may contain blanks, or several."""
    candidates = [names] if beside(names) is not None else names.split()
    materials, notes = {}, []
    for name in candidates:
        data = beside(name)
        if data is None:
            notes.append(f"its material library {name} is missing, so it is gray")
            continue
        found, missing = read_mtl(data, beside, max_texture=max_texture)
        materials.update(found)
        notes += missing
    return materials, notes


def read_mtl(
    data: bytes, beside: FileBeside, *, max_texture: int = MAX_TEXTURE
) -> tuple[dict[str, Material], list[str]]:
    """Read a material library; return its materials by name, and notes on textures that are missing."""
    materials: dict[str, Material] = {}
    images: dict[str, np.ndarray | None] = {}
    notes: list[str] = []
    material = Material("none")
    for line in data.decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) < 2:
            continue
        key, rest = words[0].lower(), " ".join(words[1:])
        if key == "newmtl":
            material = materials[rest] = Material(rest)
        elif key == "kd":
            material.color = _color(words[1:4], material.color)
        elif key == "d":  # not Tr: exporters disagree on whether 1 means opaque or invisible there
            value = _finite(words[-1])
            material.opacity = material.opacity if value is None else float(np.clip(value, 0, 1))
        elif key == "map_kd":
            name = _texture_name(words[1:])
            if name not in images:
                images[name], note = load_texture(beside(name), name, max_texture)
                notes += note
            material.texture = images[name]
    for material in materials.values():
        if material.texture is not None:
            # Kd tints a texture; its brightness is only the exporter's default reflectance.
            peak = float(material.color.max())
            material.color = material.color / peak if peak > 0.05 else np.ones(3, np.float32)
    return materials, notes


def _finite(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _color(words: list[str], otherwise: np.ndarray) -> np.ndarray:
    """Return three numbers as float32; repeat a single one; on anything else keep the old value."""
    values = [_finite(word) for word in words]
    if None in values or len(values) not in (1, 3):
        return otherwise
    return np.resize(np.asarray(values, np.float32), 3)


def _texture_name(words: list[str]) -> str:
    """Return the file name of a ``map_Kd`` line without its options."""
    i = 0
    while i < len(words) - 1 and words[i].lower() in (*_MAP_OPTIONS, *_MAP_VECTORS):
        option = words[i].lower()
        i += 1
        if option in _MAP_OPTIONS:
            i += _MAP_OPTIONS[option]
        else:
            first = i
            while i < min(first + 3, len(words) - 1) and _finite(words[i]) is not None:
                i += 1
    return " ".join(words[i:]) or words[-1]


def load_texture(data: bytes | None, name: str, max_texture: int) -> tuple[np.ndarray | None, list[str]]:
    """Return a texture and no note, or None and a note if its file is missing or damaged."""
    if data is None:
        return None, [f"its texture {name} is missing, so that part is plain"]
    try:
        return texture_array(Image.open(io.BytesIO(data)), max_texture), []
    except Exception:  # Pillow's decoders raise many kinds on damaged files
        return None, [f"its texture {name} is not a readable picture, so that part is plain"]


def texture_array(image: Image.Image, max_texture: int = MAX_TEXTURE) -> np.ndarray:
    """Return a picture as a texture: (h, w, 4) uint8, a side at most ``max_texture``, row 0 at the bottom (v = 0)."""
    image = image.convert("RGBA")
    image.thumbnail((max_texture, max_texture), Image.Resampling.BOX)
    return np.asarray(image)[::-1].copy()
