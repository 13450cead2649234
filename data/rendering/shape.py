"""Data types for sampling and rendering: meshes with materials, and point clouds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.errors import DataError

ALPHA_CUT = 0.5  # a texel less opaque than this is cut away: leaves, fences
GRAY = 0.8  # surfaces without a color; most exporters use this value


@dataclass
class Material:
    """Material of a part: sRGB color in [0, 1], opacity, and texture (h, w, 4) uint8 sRGB (row 0 at v = 0) or None."""

    name: str
    color: np.ndarray = field(default_factory=lambda: np.full(3, GRAY, np.float32))
    opacity: float = 1.0
    texture: np.ndarray | None = None


@dataclass
class Mesh:
    """Triangles with one material each. The color of a corner is material color x texture x corner color.

    Attributes:
        vertices: (v, 3) float64.
        triangles: (t, 3) int, indices into ``vertices``.
        uv: (t, 3, 2) float32 texture coordinates of each corner; the texture repeats outside [0, 1].
        material: (t,) int, indices into ``materials``.
        materials: at least one.
        colors: (t, 3, 3) float32 sRGB in [0, 1] of each corner, or None (all 1).
        notes: missing things that do not prevent use, for example a texture file.
    """

    vertices: np.ndarray
    triangles: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    materials: list[Material]
    colors: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_triangles(
        cls, vertices: np.ndarray, triangles: np.ndarray, *, color: Sequence[float] = (GRAY, GRAY, GRAY)
    ) -> Mesh:
        """Return a mesh of one color, without texture."""
        triangles = np.asarray(triangles, np.int64)
        return cls(
            vertices=np.asarray(vertices, np.float64),
            triangles=triangles,
            uv=np.zeros((len(triangles), 3, 2), np.float32),
            material=np.zeros(len(triangles), np.int64),
            materials=[Material("plain", np.asarray(color, np.float32))],
        )

    def areas(self) -> np.ndarray:
        """Return the area of each triangle, (t,) float64."""
        a, b, c = self.vertices[self.triangles].transpose(1, 0, 2)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2

    def spanned(self) -> np.ndarray:
        """Return the vertices that triangles use, (n, 3)."""
        used = np.zeros(len(self.vertices), bool)
        used[self.triangles.reshape(-1)] = True  # ten times as fast as np.unique
        return self.vertices[used]

    def select(self, keep: np.ndarray) -> Mesh:
        """Return the mesh of the triangles where ``keep`` (t,) is true."""
        colors = None if self.colors is None else self.colors[keep]
        return Mesh(
            self.vertices, self.triangles[keep], self.uv[keep], self.material[keep], self.materials, colors, self.notes
        )

    def transformed(self, matrix: np.ndarray) -> Mesh:
        """Return the mesh under an affine (4, 4) or linear (3, 3) map."""
        vertices = _transformed(self.vertices, matrix)
        return Mesh(vertices, self.triangles, self.uv, self.material, self.materials, self.colors, self.notes)


@dataclass
class Cloud:
    """Points without a surface: (N, 3) float64, and colors (N, 3) float32 sRGB in [0, 1] or None."""

    points: np.ndarray
    colors: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def spanned(self) -> np.ndarray:
        """Return the points, (N, 3)."""
        return self.points

    def shown_colors(self) -> np.ndarray:
        """Return the colors, (N, 3) float32; gray where the cloud has none."""
        return np.full(self.points.shape, GRAY, np.float32) if self.colors is None else self.colors

    def transformed(self, matrix: np.ndarray) -> Cloud:
        """Return the cloud under an affine (4, 4) or linear (3, 3) map."""
        return Cloud(_transformed(self.points, matrix), self.colors, self.notes)


def _transformed(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return points (n, 3) under an affine (4, 4) or linear (3, 3) map."""
    matrix = np.asarray(matrix, np.float64)
    points = points @ matrix[:3, :3].T
    return points + matrix[:3, 3] if matrix.shape == (4, 4) else points


def concatenate(meshes: Sequence[Mesh]) -> Mesh:
    """Join meshes without moving them; each keeps its materials."""
    if not meshes:
        raise ValueError("no meshes to join")
    vertices = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    materials = np.cumsum([0] + [len(mesh.materials) for mesh in meshes])
    colors = None
    if any(mesh.colors is not None for mesh in meshes):
        colors = np.concatenate([np.ones((len(m.triangles), 3, 3)) if m.colors is None else m.colors for m in meshes])
        colors = colors.astype(np.float32)
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        triangles=np.concatenate([mesh.triangles + first for mesh, first in zip(meshes, vertices, strict=False)]),
        uv=np.concatenate([mesh.uv for mesh in meshes]),
        material=np.concatenate([mesh.material + first for mesh, first in zip(meshes, materials, strict=False)]),
        materials=[material for mesh in meshes for material in mesh.materials],
        colors=colors,
        notes=list(dict.fromkeys(note for mesh in meshes for note in mesh.notes)),
    )


def unit_colors(color: np.ndarray) -> np.ndarray:
    """Return colors as float32 in [0, 1]; if any exceeds 2, the range is taken to be 0 to 255. NaN is kept."""
    # Not 1, which rounding and bright light exceed: a whole model would turn black.
    color = color / 255 if np.nanmax(color, initial=0.0) > 2 else color
    return color.clip(0, 1).astype(np.float32)


def check_mesh(mesh: Mesh, where: str) -> Mesh:
    """Return the mesh, or raise if points cannot be drawn from it.

    Raises:
        DataError: there are no faces, no area, or coordinates that are not finite.
    """
    if len(mesh.triangles) == 0:
        raise DataError(f"{where} has no faces; a surface is needed to draw points from")
    used = mesh.spanned()
    if not np.isfinite(used).all():
        raise DataError(f"{where} has coordinates that are not finite ({(~np.isfinite(used).all(1)).sum()} vertices)")
    with np.errstate(over="ignore"):
        area = mesh.areas().sum()
    if not 0 < area < np.inf:
        raise DataError(f"{where} has no usable surface area: all its faces are lines or points")
    return mesh
