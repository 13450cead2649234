"""Read OFF, plain (ModelNet, Princeton Shape Benchmark) or with colors of vertices (COFF) or faces."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

from data.rendering.polygons import triangulate
from data.rendering.shape import Mesh, unit_colors
from utils.errors import DataError


def read_off(data: bytes, where: str) -> Mesh:
    """Read the bytes of an OFF file.

    Raises:
        DataError: the file is not OFF, holds less than its header states (for example because it is truncated), or a
            face refers to a missing vertex.
    """
    text = data.decode("utf-8", "replace")
    if "#" in text:
        text = re.sub(r"#[^\n]*", "", text)
    header = re.match(r"\s*(ST)?(C)?(N)?OFF", text)
    if header is None:
        raise DataError(f"{where} does not begin with OFF; it is damaged or of another format")
    if text[header.end() :].lstrip().lower().startswith("binary"):
        raise DataError(f"{where} is a binary OFF, which is not supported; save it as text OFF, PLY or OBJ")
    lines = [line for line in text[header.end() :].splitlines() if line.strip()]
    count, faces = _read_counts(lines, where)
    rows, listed = lines[1 : 1 + count], lines[1 + count : 1 + count + faces]
    if len(rows) < count or len(listed) < faces:
        raise DataError(
            f"{where} promises {count} vertices and {faces} faces and holds {len(rows)} and {len(listed)}: "
            "it is truncated; get it again"
        )
    xyz, own = _vertices(rows, where, colored=header[2] is not None)
    parts = [
        _split_polygons(*group, size, xyz, where) for size, group in sorted(_faces(listed, where).items()) if size > 2
    ]
    if not parts:
        raise DataError(f"{where} has no faces; a surface is needed to draw points from")
    triangles = np.concatenate([part[0] for part in parts])
    face_colors = np.concatenate([part[1] for part in parts])
    mesh = Mesh.from_triangles(xyz, triangles)
    if own is not None:
        mesh.colors = own[triangles]
    elif np.isfinite(face_colors).any():
        plain = ~np.isfinite(face_colors).all(1)
        face_colors[plain] = mesh.materials[0].color
        mesh.colors = np.repeat(face_colors[:, None], 3, 1).astype(np.float32)
    if mesh.colors is not None:
        mesh.materials[0].color = np.ones(3, np.float32)
    return mesh


def _read_counts(lines: list[str], where: str) -> tuple[int, int]:
    try:
        count, faces = (int(word) for word in lines[0].split()[:2])
        if min(count, faces) < 0:
            raise ValueError
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{where} does not say how many vertices and faces it has; it is damaged or truncated"
        ) from error
    return count, faces


def _vertices(rows: list[str], where: str, *, colored: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return coordinates (v, 3), and colors (v, 3) in [0, 1] from the numbers after them in a COFF file."""
    try:
        table = np.array([row.split() for row in rows], np.float64).reshape(len(rows), -1)
    except ValueError as error:
        raise DataError(f"{where}: a vertex is not a row of numbers; the file is damaged or truncated") from error
    if len(rows) and table.shape[1] < 3:
        raise DataError(f"{where}: a vertex has {table.shape[1]} numbers, not 3; the file is damaged")
    if not colored or table.shape[1] < 6:
        return table[:, :3], None
    # The color comes last, with or without opacity.
    color = table[:, -4:-1] if table.shape[1] in (7, 10) else table[:, -3:]
    return table[:, :3], unit_colors(color)


def _faces(lines: list[str], where: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return the corners (f, n) and colors (f, 3), NaN where there is none, of the faces with n corners, by n."""
    corners: dict[int, list[list[str]]] = defaultdict(list)
    colors: dict[int, list[list[str]]] = defaultdict(list)
    none = ["nan"] * 3
    try:
        for line in lines:
            words = line.split()
            size = int(words[0])
            if len(words) <= size:
                raise DataError(f"{where}: a face promises {size} corners and has {len(words) - 1}; it is truncated")
            corners[size].append(words[1 : size + 1])
            colors[size].append(words[size + 1 : size + 4] if len(words) > size + 3 else none)
        return {
            size: (np.array(rows, np.int64).reshape(-1, size), np.array(colors[size], np.float64))
            for size, rows in corners.items()
        }
    except ValueError as error:
        raise DataError(f"{where}: a face is not a list of numbers ({error}); the file is damaged") from error


def _split_polygons(
    index: np.ndarray, color: np.ndarray, size: int, xyz: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles (t, 3) of polygons (f, n) and their colors (t, 3) in [0, 1]."""
    if index.min() < 0 or index.max() >= len(xyz):
        wrong = int(index.min() if index.min() < 0 else index.max())
        raise DataError(f"{where}: a face refers to vertex {wrong}, the file has 0 to {len(xyz) - 1}; it is damaged")
    face, corners = triangulate(xyz[index])
    return np.take_along_axis(index[face], corners, 1), unit_colors(color)[face]
