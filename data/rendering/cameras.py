"""Cameras on a sphere around an object; they center it and fill the picture with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DISTANCE = 4.0  # radii of the object's bounding sphere


@dataclass(frozen=True)
class Camera:
    """A viewpoint: degrees around the y axis (0 sees the front, +z) and above the xz plane.

    ``fill`` is the fraction of the picture's side that the object covers.
    """

    azimuth: float
    elevation: float
    fill: float = 0.94


def cameras_3d_r2n2(count: int, seed: int) -> list[Camera]:
    """Draw viewpoints like those of the 3D-R2N2 renderings: any azimuth, elevation 25 to 30 degrees.

    The circle is divided into ``count`` equal arcs, and each view has a random azimuth in one of them, so that even two
    views show different sides. The order of the arcs is random.

    Source: Choy et al., 3D-R2N2, ECCV 2016, section 5.1.
    """
    rng = np.random.default_rng([seed, 0x3D22])
    start = rng.uniform(0, 360)
    azimuths = (start + 360 * (rng.permutation(count) + rng.random(count)) / count) % 360
    return [Camera(float(a), float(e)) for a, e in zip(azimuths, rng.uniform(25, 30, count), strict=True)]


@dataclass(frozen=True)
class View:
    """A camera aimed at one object.

    Attributes:
        center: (3,) middle of the object's bounding box, in the object's coordinates.
        radius: of the bounding sphere around ``center``.
        view: (4, 4) from (x - center) / radius to eye space; the camera looks along -z.
        projection: (4, 4) from eye space to clip space.
        field_of_view: degrees from the left to the right side of the picture.
    """

    center: np.ndarray
    radius: float
    view: np.ndarray
    projection: np.ndarray
    field_of_view: float

    def matrix(self) -> np.ndarray:
        """Return the (4, 4) matrix from the object's homogeneous coordinates to clip space."""
        normalize = np.eye(4) / self.radius
        normalize[:3, 3] = -self.center / self.radius
        normalize[3, 3] = 1.0
        return self.projection @ self.view @ normalize


def aim(points: np.ndarray, camera: Camera) -> View:
    """Aim a camera at an object given by the points (n, 3) that span it."""
    center = (points.min(0) + points.max(0)) / 2
    radius = float(np.linalg.norm(points - center, axis=1).max())
    points = (points - center) / radius
    view, projection = _matrices(points, camera.azimuth, camera.elevation, camera.fill)
    return View(center, radius, view, projection, math.degrees(2 * math.atan(1 / projection[0, 0])))


def _matrices(points: np.ndarray, azimuth: float, elevation: float, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Return view and projection (4, 4) that center ``points`` (in the unit sphere) and fill the frame with them."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    right = np.array([math.cos(a), 0.0, -math.sin(a)])
    view = np.eye(4)
    view[:3, :3] = [right, np.cross(back, right), back]
    view[2, 3] = -DISTANCE
    near, far = DISTANCE - 1.05, DISTANCE + 1.05
    seen = points @ view[:3, :3].T + view[:3, 3]  # (n, 3)
    flat = seen[:, :2] / -seen[:, 2:]  # (n, 2)
    middle = (flat.min(0) + flat.max(0)) / 2
    zoom = fill / max(float((flat.max(0) - flat.min(0)).max()) / 2, 1e-6)
    projection = np.zeros((4, 4))
    projection[0, 0] = projection[1, 1] = zoom
    projection[:2, 2] = zoom * middle  # the projection divides by -z
    projection[2, 2:] = (near + far) / (near - far), 2 * near * far / (near - far)
    projection[3, 2] = -1.0
    return view, projection
