"""Triangulate polygons; concave ones keep their outline."""

from __future__ import annotations

import numpy as np


def triangulate(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangulate polygons with the same number of corners (f, n, 3).

    Returns:
        The polygon of every triangle (t,), and its corners (t, 3) as indices into the polygon's corners.
    """
    count, size = polygons.shape[:2]
    if size == 3:
        return np.arange(count), np.tile(np.arange(3), (count, 1))
    if size == 4:
        return _cut_quads(polygons)

    import mapbox_earcut

    fan = np.stack([np.zeros(size - 2, int), np.arange(1, size - 1), np.arange(2, size)], 1)
    face, corners = [], []
    centered = polygons - polygons.mean(1, keepdims=True)
    normals = np.cross(centered, np.roll(centered, -1, 1)).sum(1)  # (f, 3)
    keep = np.sort(np.argsort(np.abs(normals), axis=1)[:, :2], axis=1)  # drop the axis the polygon faces most
    flat = np.ascontiguousarray(np.take_along_axis(centered, keep[:, None], 2))  # (f, n, 2)
    ends = np.array([size], np.uint32)
    for i in range(count):
        cut = mapbox_earcut.triangulate_float64(flat[i], ends).reshape(-1, 3)
        cut = cut.astype(int) if len(cut) else fan
        face.append(np.full(len(cut), i))
        corners.append(cut)
    return np.concatenate(face), np.concatenate(corners)


def _cut_quads(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split quads (f, 4, 3) along the diagonal that lies inside them."""
    a, b, c, d = polygons.transpose(1, 0, 2)
    folded = (np.cross(b - a, c - a) * np.cross(c - a, d - a)).sum(1) < 0
    first = np.where(folded[:, None], [[0, 1, 3]], [[0, 1, 2]])
    second = np.where(folded[:, None], [[1, 2, 3]], [[0, 2, 3]])
    return np.repeat(np.arange(len(polygons)), 2), np.stack([first, second], 1).reshape(-1, 3)
