"""Simple solids in [-1, 1]^3 with a mesh of the surface and an exact inside test, and smooth warps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROUND = 32  # corners of a circle
# Without this margin (relative to the size), rounding would remove the points of two touching faces: points this close
# to a surface count as outside.
MARGIN = 1e-6
# x -> x + d(x) can be inverted by iterating if d changes more slowly than x; this bounds how fast, and the error after
# WAVE_STEPS steps is 0.5 ** 16 of the displacement.
WAVE_SLOPE, WAVE_STEPS = 0.5, 16

PointTest = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Solid:
    """A closed surface and its inside.

    Attributes:
        vertices: (v, 3) float64.
        triangles: (t, 3) int, counterclockwise seen from outside.
        contains: (n, 3) points -> (n,) bool, strictly inside.
    """

    vertices: np.ndarray
    triangles: np.ndarray
    contains: PointTest


def lattice(rows: int, columns: int, *, closed: bool) -> np.ndarray:
    """Return the triangles of a grid of ``rows * columns`` vertices; ``closed`` joins the last column to the first."""
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij")
    row, column = row.ravel(), column.ravel()
    right = (column + 1) % columns
    a, b = row * columns + column, row * columns + right
    c, d = a + columns, b + columns
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def revolved(radius: Sequence[float], height: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Revolve a profile around the y axis.

    Args:
        radius: (r,) distance from the axis.
        height: (r,) y.

    Returns:
        Vertices (r * ROUND, 3) and triangles.
    """
    angle = np.linspace(0, 2 * np.pi, ROUND, endpoint=False)
    r, y = np.asarray(radius, float)[:, None], np.asarray(height, float)[:, None]
    vertices = np.stack(np.broadcast_arrays(r * np.cos(angle), y, r * np.sin(angle)), 2).reshape(-1, 3)
    return vertices, lattice(len(r), ROUND, closed=True)


def box(*, divisions: int = 1) -> Solid:
    """Return the cube [-1, 1]^3; each face has ``divisions``^2 squares, which a warp needs to bend it."""
    steps = np.linspace(-1, 1, divisions + 1)
    u, v = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    face = lattice(divisions + 1, divisions + 1, closed=False)
    vertices, triangles = [], []
    for axis in range(3):
        for side in (-1.0, 1.0):
            corner = np.empty((len(u), 3))
            corner[:, axis], corner[:, axis - 2], corner[:, axis - 1] = side, u, v
            triangles.append((face if side > 0 else face[:, ::-1]) + sum(map(len, vertices)))
            vertices.append(corner)
    return Solid(np.concatenate(vertices), np.concatenate(triangles), lambda p: np.abs(p).max(1) < 1 - MARGIN)


def frustum(top: float) -> Solid:
    """Return a cone cut off at radius ``top`` above and 1 below: 1 is a cylinder, 0 a cone."""
    side = np.linspace(0, 1, 7)
    rim = np.linspace(0, 1, 4)[:-1]
    vertices, triangles = revolved(
        [*rim, *(1 + (top - 1) * side), *(top * rim[::-1])], [*(-1 + 0 * rim), *(2 * side - 1), *(1 + 0 * rim)]
    )

    def contains(p: np.ndarray) -> np.ndarray:
        radius = 1 + (top - 1) * (p[:, 1] + 1) / 2
        return (np.hypot(p[:, 0], p[:, 2]) < radius * (1 - MARGIN)) & (np.abs(p[:, 1]) < 1 - MARGIN)

    return Solid(vertices, triangles, contains)


def superquadric(vertical: float, horizontal: float) -> Solid:
    """Return a superellipsoid: exponents 1 give the sphere, small ones a rounded box, 2 an octahedron.

    Source: Barr, Superquadrics and Angle-Preserving Transformations, IEEE CG&A 1981.
    """
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 21)[:, None]
    longitude = np.linspace(0, 2 * np.pi, ROUND, endpoint=False)

    def power(x: np.ndarray, exponent: float) -> np.ndarray:
        return np.sign(x) * np.abs(x) ** exponent

    ring = power(np.cos(latitude).clip(0), vertical)
    x, z = ring * power(np.cos(longitude), horizontal), ring * power(np.sin(longitude), horizontal)
    y = np.broadcast_to(power(np.sin(latitude), vertical), x.shape)

    def contains(p: np.ndarray) -> np.ndarray:
        q = np.abs(p)
        level = (q[:, 0] ** (2 / horizontal) + q[:, 2] ** (2 / horizontal)) ** (horizontal / vertical)
        return level + q[:, 1] ** (2 / vertical) < 1 - MARGIN

    return Solid(np.stack([x, y, z], 2).reshape(-1, 3), lattice(21, ROUND, closed=True), contains)


def torus(thickness: float) -> Solid:
    """Return a ring around the y axis with outer radius 1 and tube radius ``thickness``, stretched to height 1."""
    angle = np.linspace(0, 2 * np.pi, 17)
    middle = 1 - thickness
    vertices, triangles = revolved(middle + thickness * np.cos(angle), np.sin(angle))

    def contains(p: np.ndarray) -> np.ndarray:
        return np.hypot((np.hypot(p[:, 0], p[:, 2]) - middle) / thickness, p[:, 1]) < 1 - MARGIN

    return Solid(vertices, triangles, contains)


def tube(control: np.ndarray, radius: float) -> Solid:
    """Sweep a ball of ``radius`` along the cubic Bezier curve of four control points (4, 3)."""
    t = np.linspace(0, 1, 25)[:, None]
    s = 1 - t
    a, b, c, d = control
    center = s**3 * a + 3 * s * s * t * b + 3 * s * t * t * c + t**3 * d  # (25, 3)
    tangent = np.gradient(center, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    # Rounded ends: rings that shrink on the way out.
    cap = np.linspace(0, np.pi / 2, 5)[1:]
    start = center[0] - radius * np.sin(cap[::-1])[:, None] * tangent[0]
    end = center[-1] + radius * np.sin(cap)[:, None] * tangent[-1]
    size = radius * np.concatenate([np.cos(cap[::-1]), np.ones(25), np.cos(cap)])
    spine = np.concatenate([start, center, end])  # (33, 3)
    along = np.concatenate([np.repeat(tangent[:1], 4, 0), tangent, np.repeat(tangent[-1:], 4, 0)])
    normal = _transported(along)
    binormal = np.cross(along, normal)
    angle = np.linspace(0, -2 * np.pi, 16, endpoint=False)[:, None]
    ring = np.cos(angle) * normal[:, None] + np.sin(angle) * binormal[:, None]  # (33, 16, 3)
    vertices = spine[:, None] + size[:, None, None] * ring

    def contains(p: np.ndarray) -> np.ndarray:
        return _distance_to_path(p, center) < radius * (1 - MARGIN)

    return Solid(vertices.reshape(-1, 3), lattice(len(spine), 16, closed=True), contains)


def _transported(along: np.ndarray) -> np.ndarray:
    """Return a unit vector (n, 3) normal to each direction, rotated as little as possible from one to the next."""
    first = np.eye(3)[np.abs(along[0]).argmin()]
    normals = [first]
    for direction in along:
        normal = normals[-1] - direction * (normals[-1] @ direction)
        normals.append(normal / max(np.linalg.norm(normal), 1e-9))
    return np.stack(normals[1:])


def _distance_to_path(points: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Return the distance (n,) of points (n, 3) from a polyline (m, 3)."""
    a, step = path[:-1], np.diff(path, axis=0)  # (m - 1, 3)
    length = (step * step).sum(1)
    t = ((points @ step.T - (a * step).sum(1)) / length).clip(0, 1)  # (n, m - 1)
    off = points[:, None] - a - t[..., None] * step  # (n, m - 1, 3)
    return np.sqrt((off * off).sum(2).min(1))


@dataclass(frozen=True)
class Warp:
    """An invertible smooth map of space, applied to a solid before it is scaled, rotated and moved.

    First the cross-section grows along an axis (taper), then it rotates along the axis (twist), then waves displace it.

    Attributes:
        axis: along which taper and twist run.
        taper: the cross-section at height h is 1 + taper * h times as large; between -1 and 1.
        twist: radians per unit of height.
        amplitude: (w, 3) displacement of each wave.
        frequency: (w, 3) wave vectors; the sum of |amplitude| |frequency| is at most WAVE_SLOPE.
        phase: (w,).
    """

    axis: int
    taper: float
    twist: float
    amplitude: np.ndarray
    frequency: np.ndarray
    phase: np.ndarray

    def forward(self, p: np.ndarray) -> np.ndarray:
        """Warp points (n, 3)."""
        p = self._turned(p * self._growth(p), 1.0)
        return p + self._waves(p)

    def backward(self, p: np.ndarray) -> np.ndarray:
        """Return the points (n, 3) that ``forward`` moves to ``p``."""
        q = p
        for _ in range(WAVE_STEPS if self.amplitude.any() else 0):
            q = p - self._waves(q)
        q = self._turned(q, -1.0)
        return q / self._growth(q)

    def _growth(self, p: np.ndarray) -> np.ndarray:
        # Far outside the solid the map would collapse and fold over; there it is held constant.
        growth = np.ones_like(p)
        across = [i for i in range(3) if i != self.axis]
        growth[:, across] = 1 + self.taper * p[:, [self.axis]].clip(-1, 1)
        return growth

    def _turned(self, p: np.ndarray, sign: float) -> np.ndarray:
        angle = sign * self.twist * p[:, self.axis]
        i, j = (i for i in range(3) if i != self.axis)
        turned = p.copy()
        turned[:, i] = np.cos(angle) * p[:, i] - np.sin(angle) * p[:, j]
        turned[:, j] = np.sin(angle) * p[:, i] + np.cos(angle) * p[:, j]
        return turned

    def _waves(self, p: np.ndarray) -> np.ndarray:
        return np.sin(p @ self.frequency.T + self.phase) @ self.amplitude


def warped(solid: Solid, warp: Warp) -> Solid:
    """Return the solid under a warp."""
    return Solid(warp.forward(solid.vertices), solid.triangles, lambda p: solid.contains(warp.backward(p)))


def placed(solid: Solid, *, scale: np.ndarray, turn: np.ndarray, shift: np.ndarray) -> Solid:
    """Scale along the axes (3,), rotate by an orthogonal (3, 3), shift by (3,); far points skip the exact inside test.

    Raises:
        ValueError: a scale is not positive.
    """
    scale, shift = np.asarray(scale, float), np.asarray(shift, float)
    if scale.min() <= 0:
        raise ValueError(f"scales must be positive, got {scale}")
    low, high = solid.vertices.min(0), solid.vertices.max(0)
    slack = 0.05 * (high - low) + 1e-9  # a warped surface may bulge out between its vertices

    def contains(p: np.ndarray) -> np.ndarray:
        local = (p - shift) @ turn / scale
        near = ((local > low - slack) & (local < high + slack)).all(1)
        inside = np.zeros(len(p), bool)
        if near.any():
            inside[near] = solid.contains(local[near])
        return inside

    triangles = solid.triangles if np.linalg.det(turn) > 0 else solid.triangles[:, ::-1]
    return Solid((solid.vertices * scale) @ turn.T + shift, triangles, contains)


def reflected(solid: Solid, axis: int) -> Solid:
    """Mirror about the plane through the origin that is normal to an axis."""
    flip = np.ones(3)
    flip[axis] = -1
    return Solid(solid.vertices * flip, solid.triangles[:, ::-1], lambda p: solid.contains(p * flip))
