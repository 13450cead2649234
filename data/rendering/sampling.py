"""Sample points of a mesh uniformly by area, with the colors that a picture of it would show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.rendering.cameras import View
from data.rendering.shape import ALPHA_CUT, Mesh
from utils.errors import DataError

if TYPE_CHECKING:
    from data.rendering.renderer import Renderer

_ATTEMPTS = 200
_DIRECTIONS = 42  # from which a point is looked for, spread evenly over the sphere
_DEPTH_TOLERANCE = 0.01  # radii: what counts as the surface itself when a point is compared with a depth map


class Samples(NamedTuple):
    """Points of a surface, with the color, material and triangle of each."""

    points: np.ndarray  # (N, 3) float64
    colors: np.ndarray  # (N, 3) uint8 sRGB
    material: np.ndarray  # (N,) index into the mesh's materials
    triangle: np.ndarray  # (N,) index into the mesh's triangles


def texel(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Look up (n, 4) uint8 at texture coordinates (n, 2), which repeat outside [0, 1)."""
    height, width = texture.shape[:2]
    column = np.floor((uv[:, 0] % 1.0) * width).astype(int).clip(0, width - 1)
    row = np.floor((uv[:, 1] % 1.0) * height).astype(int).clip(0, height - 1)
    return texture[row, column]


def sample_surface(mesh: Mesh, count: int, seed: int) -> Samples:
    """Draw ``count`` points uniformly by area; none where a texture cuts the surface away (leaves).

    Raises:
        DataError: textures cut away almost all of the surface.
    """
    return _collect(mesh, count, seed, keep=lambda points: np.ones(len(points), bool), what="cut away by textures")


def sample_exterior(mesh: Mesh, count: int, seed: int, renderer: Renderer) -> Samples:
    """Draw ``count`` points uniformly by area from the surface that is visible from outside.

    A point is visible if it lies on the front of at least one of 42 depth maps from all sides, so the inside of a
    closed body (a car's seats behind opaque windows, hidden parts of a union) gets no points.

    Raises:
        DataError: almost none of the surface is visible.
    """
    views = _views_all_round(mesh.spanned())
    depths = renderer.depths(mesh, views)
    return _collect(mesh, count, seed, keep=lambda points: _seen(points, views, depths), what="hidden inside")


def _collect(mesh: Mesh, count: int, seed: int, *, keep, what: str) -> Samples:
    """Draw rounds of 2 x count points until ``count`` pass ``keep`` and the textures' opacity."""
    import trimesh

    surface = trimesh.Trimesh(mesh.vertices, mesh.triangles, process=False)
    found: list[Samples] = []
    missing = count
    for attempt in range(_ATTEMPTS):
        points, triangle = trimesh.sample.sample_surface(surface, 2 * count, seed=seed + attempt)
        points, triangle = np.asarray(points), np.asarray(triangle)
        colors, solid = colors_at(mesh, points, triangle)
        chosen = np.flatnonzero(solid & np.isfinite(points).all(1) & keep(points))[:missing]
        found.append(Samples(points[chosen], colors[chosen], mesh.material[triangle[chosen]], triangle[chosen]))
        missing -= len(chosen)
        if missing == 0:
            return Samples(*(np.concatenate(part) for part in zip(*found, strict=True)))
    raise DataError(f"almost all of the surface is {what}")


def colors_at(mesh: Mesh, points: np.ndarray, triangle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the colors (n, 3) uint8 of points on given triangles, and whether the surface is solid there (n,)."""
    import trimesh

    weight = trimesh.triangles.points_to_barycentric(mesh.vertices[mesh.triangles[triangle]], points)  # (n, 3)
    uv = (mesh.uv[triangle] * weight[..., None]).sum(1)  # (n, 2)
    color = np.empty((len(triangle), 3), np.float32)
    solid = np.ones(len(triangle), bool)
    for index in np.unique(mesh.material[triangle]):
        material, here = mesh.materials[index], mesh.material[triangle] == index
        color[here] = material.color * 255
        if material.texture is not None:
            looked_up = texel(material.texture, uv[here])
            color[here] = material.color * looked_up[:, :3]
            solid[here] = looked_up[:, 3] >= ALPHA_CUT * 255
    if mesh.colors is not None:
        color *= (mesh.colors[triangle] * weight[..., None]).sum(1)
    return color.round().clip(0, 255).astype(np.uint8), solid


def _views_all_round(points: np.ndarray) -> list[View]:
    """Return orthographic views from uniformly spaced directions (a Fibonacci lattice)."""
    center = (points.min(0) + points.max(0)) / 2
    radius = float(np.linalg.norm(points - center, axis=1).max())
    projection = np.diag([0.98, 0.98, -0.98, 1.0])  # depth grows away from the camera
    views = []
    for i in range(_DIRECTIONS):
        height = 1 - (2 * i + 1) / _DIRECTIONS
        turn = math.pi * (1 + math.sqrt(5)) * i
        flat = math.sqrt(1 - height * height)
        back = np.array([flat * math.sin(turn), height, flat * math.cos(turn)])
        right = np.array([math.cos(turn), 0.0, -math.sin(turn)])
        view = np.eye(4)
        view[:3, :3] = [right, np.cross(back, right), back]
        views.append(View(center, radius, view, projection, 0.0))
    return views


def _seen(points: np.ndarray, views: list[View], depths: np.ndarray) -> np.ndarray:
    """Return whether each of the points (n, 3) is on the front of at least one depth map."""
    seen = np.zeros(len(points), bool)
    side = depths.shape[1]
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], 1)
    for view, depth in zip(views, depths, strict=True):
        clip = homogeneous @ view.matrix().T  # (n, 4), w = 1
        column, row = ((clip[:, :2] + 1) / 2 * side).astype(int).clip(0, side - 1).T
        seen |= (clip[:, 2] + 1) / 2 <= depth[row, column] + _DEPTH_TOLERANCE / 2
    return seen
