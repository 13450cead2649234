"""Pictures of generated shapes: meshes for the renderer, and splats for machines without OpenGL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.procedural.compose import GeneratedShape, SurfaceSamples
from data.rendering import Camera, Material, Mesh
from data.rendering.cameras import aim

_SPLATS_PER_PIXEL = 4  # points for a pixel of the picture's area: fewer leave holes
LIGHT = np.array([-0.5, 0.75, 0.6]) / np.linalg.norm([-0.5, 0.75, 0.6])  # in eye coordinates, as the renderer's


def mesh_of(shape: GeneratedShape) -> Mesh:
    """Return the mesh of a shape. Bands are exact: a texture whose coordinate is linear in space."""
    vertices = np.cumsum([0] + [len(part.solid.vertices) for part in shape.parts])
    counts = [len(part.solid.triangles) for part in shape.parts]
    points = np.concatenate([part.solid.vertices for part in shape.parts])
    triangles = np.concatenate([part.solid.triangles + vertices[i] for i, part in enumerate(shape.parts)])
    number = np.repeat([part.number for part in shape.parts], counts)
    uv = np.zeros((len(triangles), 3, 2), np.float32)
    if shape.bands is None:
        materials = [Material(f"primitive {i}", color.astype(np.float32)) for i, color in enumerate(shape.colors)]
    else:
        uv[..., 0] = points[triangles] @ shape.bands.direction + shape.bands.phase
        materials = [
            Material(f"primitive {i}", np.ones(3, np.float32), texture=_texture(shape, i))
            for i in range(len(shape.colors))
        ]
    return Mesh(vertices=points, triangles=triangles, uv=uv, material=number, materials=materials)


def _texture(shape: GeneratedShape, number: int) -> np.ndarray:
    share = shape.bands.profile[:, None]
    rgb = (1 - share) * shape.colors[number] + share * shape.bands.color
    return np.concatenate([(255 * rgb).round(), np.full((len(rgb), 1), 255)], 1).astype(np.uint8)[None]


def splat_count(size: int) -> int:
    """Return how many surface points a picture of ``size`` pixels needs."""
    return _SPLATS_PER_PIXEL * size * size


def splat_views(samples: SurfaceSamples, colors: np.ndarray, cameras: Sequence[Camera], *, size: int) -> np.ndarray:
    """Draw surface points as pixels, keeping the nearest one per pixel; without anti-aliasing.

    Args:
        samples: n points; ``splat_count`` gives n.
        colors: (n, 3) in 0..1.
        cameras: viewpoints.
        size: side of a picture in pixels.

    Returns:
        (V, size, size, 4) uint8 RGBA; the background is transparent black.
    """
    pictures = np.zeros((len(cameras), size * size, 4), np.uint8)
    homogeneous = np.concatenate([samples.points, np.ones((len(samples.points), 1))], 1)
    for picture, camera in zip(pictures, cameras, strict=True):
        view = aim(samples.points, camera)
        clip = homogeneous @ view.matrix().T  # (n, 4)
        x, y, depth = (clip[:, :3] / clip[:, 3:]).T
        column = ((x + 1) / 2 * size).astype(int).clip(0, size - 1)
        row = ((1 - y) / 2 * size).astype(int).clip(0, size - 1)
        pixel = row * size + column
        order = np.lexsort((depth, pixel))
        _, first = np.unique(pixel[order], return_index=True)
        nearest = order[first]
        facing = np.abs(samples.normals[nearest] @ view.view[:3, :3].T @ LIGHT)
        light = (0.5 + 0.48 * facing)[:, None]
        albedo = 0.2 + 0.8 * colors[nearest]
        picture[pixel[nearest], :3] = (255 * (albedo * light).clip(0, 1)).round()
        picture[pixel[nearest], 3] = 255
    return pictures.reshape(len(cameras), size, size, 4)
