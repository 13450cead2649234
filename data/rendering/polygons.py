"""Cut polygons into triangles; concave ones keep their outline."""

from __future__ import annotations

import numpy as np


def triangulate(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons of one size (f, n, 3) into triangles.

    Returns:
        The polygon of every triangle (t,) and its corners (t, 3), which count within the polygon.
    """
    count, size = polygons.shape[:2]
    if size == 3:
        return np.arange(count), np.tile(np.arange(3), (count, 1))
    if size == 4:
        return _cut_quads(polygons)

    import mapbox_earcut

    fan = np.stack([np.zeros(size - 2, int), np.arange(1, size - 1), np.arange(2, size)], 1)
    face, corners = [], []
    for i, polygon in enumerate(polygons):
        centered = polygon - polygon.mean(0)
        normal = np.cross(centered, np.roll(centered, -1, 0)).sum(0)
        keep = np.argsort(np.abs(normal))[:2]  # drop the axis the polygon faces most
        cut = mapbox_earcut.triangulate_float64(centered[:, np.sort(keep)], np.array([size], np.uint32)).reshape(-1, 3)
        cut = cut.astype(int) if len(cut) else fan
        face.append(np.full(len(cut), i))
        corners.append(cut)
    return np.concatenate(face), np.concatenate(corners)


def _cut_quads(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut quads (f, 4, 3) along the diagonal that lies inside them."""
    a, b, c, d = polygons.transpose(1, 0, 2)
    folded = (np.cross(b - a, c - a) * np.cross(c - a, d - a)).sum(1) < 0
    first = np.where(folded[:, None], [[0, 1, 3]], [[0, 1, 2]])
    second = np.where(folded[:, None], [[1, 2, 3]], [[0, 2, 3]])
    return np.repeat(np.arange(len(polygons)), 2), np.stack([first, second], 1).reshape(-1, 3)
