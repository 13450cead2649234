"""Read meshes and clouds of any common format, sample points from them, and render them without a display."""

from data.rendering.cameras import Camera, cameras_3d_r2n2
from data.rendering.meshes import read_mesh, read_shape
from data.rendering.renderer import Renderer, encode_png
from data.rendering.sampling import Samples, sample_exterior, sample_surface
from data.rendering.shape import Cloud, Material, Mesh, concatenate

__all__ = [
    "Camera",
    "Cloud",
    "Material",
    "Mesh",
    "Renderer",
    "Samples",
    "cameras_3d_r2n2",
    "concatenate",
    "encode_png",
    "read_mesh",
    "read_shape",
    "sample_exterior",
    "sample_surface",
]
