"""Render meshes and clouds in color without a display: OpenGL 3.3 through moderngl.

Why moderngl and not pyvista: both need the system's OpenGL (VTK's wheels contain none) and take about as long per view,
9 ms on one core at 137 pixels and 9 samples (10 textured models, 12 views each, software rendering), but moderngl
installs 1 MB and VTK 565 MB, and our 30 lines of shader support what VTK's do not: cut-out textures with sharp edges,
and lighting independent of the winding of faces.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from data.rendering.cameras import Camera, View, aim
from data.rendering.shape import ALPHA_CUT, Cloud, Material, Mesh
from utils.errors import UserError

# Without a minimum opacity, a drinking glass would give an empty picture.
MIN_OPACITY = 0.4
# Depth maps decide which part of a surface is visible from outside.
DEPTH_SIZE = 256
# Smaller discs leave holes in a cloud. Their diameter is this factor times the mean spacing of the points.
SPLAT_OVERLAP = 2.2

_VERTEX_SHADER = """
#version 330
in vec3 position;
in vec2 uv;
in vec3 tint;
uniform mat4 view;
uniform mat4 projection;
uniform float point_size;
out vec3 eye;
out vec2 coordinate;
out vec3 corner_color;
void main() {
    vec4 seen = view * vec4(position, 1.0);
    eye = seen.xyz;
    coordinate = uv;
    corner_color = tint;
    gl_Position = projection * seen;
    gl_PointSize = point_size;
}
"""

_LIGHT = """
vec4 lit(vec3 albedo, vec3 normal, float opacity) {
    float key = max(dot(normal, normalize(vec3(-0.5, 0.75, 0.6))), 0.0);
    float fill = max(dot(normal, normalize(vec3(0.8, 0.1, 0.5))), 0.0);
    float light = 0.50 + 0.48 * key + 0.16 * fill;
    // The floor keeps black objects apart from a black background.
    return vec4(min((0.2 + 0.8 * albedo) * light, 1.0) * opacity, opacity);
}
"""

# Normals come from screen-space derivatives of the position and are flipped toward the camera: real models have many
# faces with inverted winding, which would otherwise be dark.
_MESH_SHADER = f"""
#version 330
in vec3 eye;
in vec2 coordinate;
in vec3 corner_color;
uniform vec3 color;
uniform float opacity;
uniform bool textured;
uniform bool tinted;
uniform float alpha_cut;
uniform sampler2D image;
out vec4 result;
{_LIGHT}
void main() {{
    vec3 albedo = tinted ? color * corner_color : color;
    if (textured) {{
        vec4 looked_up = texture(image, coordinate);
        if (looked_up.a < alpha_cut) discard;
        albedo *= looked_up.rgb;
    }}
    vec3 normal = normalize(cross(dFdx(eye), dFdy(eye)));
    if (dot(normal, eye) > 0.0) normal = -normal;
    result = lit(albedo, normal, opacity);
}}
"""

# Clouds have no normals; shade each disc like a small ball, so that the cloud looks solid.
_SPLAT_SHADER = f"""
#version 330
in vec3 corner_color;
out vec4 result;
{_LIGHT}
void main() {{
    vec2 offset = 2.0 * gl_PointCoord - 1.0;
    float square = dot(offset, offset);
    if (square > 1.0) discard;
    result = lit(corner_color, normalize(vec3(0.4 * offset.x, -0.4 * offset.y, 1.0)), 1.0);
}}
"""

MISSING_OPENGL = (
    "cannot render without a display: {reason}. On Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri "
    "(OpenGL by software, EGL); elsewhere install a driver with OpenGL 3.3"
)


def _load_triton_first() -> None:
    """Load Triton's library before Mesa's, without importing Triton.

    Both contain LLVM. If Triton's is loaded after Mesa's, the process crashes (segmentation fault at ``import triton``,
    for example in ``torch.compile``); the other order works.
    """
    found = importlib.util.find_spec("triton") if "triton" not in sys.modules else None
    if found is None or found.origin is None:
        return
    library = Path(found.origin).parent / "_C" / "libtriton.so"
    if library.exists():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library))


def create_context() -> Any:
    """Return a moderngl context that needs no display (EGL), or the desktop's if there is no EGL.

    Raises:
        UserError: moderngl or OpenGL is missing; the message names the package.
    """
    # Callers run one process per core; a pool of rendering threads in each would only compete for the cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        import moderngl
    except ImportError as error:
        raise UserError("the Python package moderngl is missing: pip install moderngl") from error
    _load_triton_first()
    reasons = []
    # moderngl looks for the library name without a version, which only the development packages install.
    attempts: tuple[dict[str, str], ...] = (
        {"backend": "egl"},
        {"backend": "egl", "libegl": "libEGL.so.1", "libgl": "libGL.so.1"},
        {},
    )
    for attempt in attempts:
        try:
            return moderngl.create_context(standalone=True, require=330, **attempt)
        except Exception as error:  # moderngl raises bare Exception where the library or the driver is missing
            reasons.append(str(error) or type(error).__name__)
    raise UserError(MISSING_OPENGL.format(reason=reasons[0]))


class Renderer:
    """Renders views of meshes and clouds. Make one per process (an OpenGL context does not survive a fork).

    A context manager; :meth:`release` frees the graphics memory.

    Args:
        size: side of a picture in pixels.
        samples: samples per pixel for anti-aliasing, a square number; they are averaged on premultiplied colors.

    Raises:
        UserError: moderngl or OpenGL is missing.
    """

    def __init__(self, size: int, *, samples: int = 9) -> None:
        side = round(samples**0.5)
        if size < 1 or side < 1 or side * side != samples:
            raise ValueError(f"size {size} must be positive and samples {samples} a square number")
        self.size, self.side = size, side
        self.gl = create_context()
        pixels = (size * side, size * side)
        self._textures = [self.gl.texture(pixels, 4), self.gl.depth_texture(pixels)]
        self._frame = self.gl.framebuffer([self._textures[0]], self._textures[1])
        self._mesh_program = self.gl.program(vertex_shader=_VERTEX_SHADER, fragment_shader=_MESH_SHADER)
        self._mesh_program["alpha_cut"].value = ALPHA_CUT
        self._splat_program = self.gl.program(vertex_shader=_VERTEX_SHADER, fragment_shader=_SPLAT_SHADER)

    def __enter__(self) -> Renderer:
        """Return the renderer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Release the graphics memory."""
        self.release()

    def release(self) -> None:
        """Free the graphics memory and the context."""
        for item in (self._frame, *self._textures, self._mesh_program, self._splat_program):
            item.release()
        self.gl.release()

    def views(self, shape: Mesh | Cloud, cameras: Sequence[Camera | View]) -> np.ndarray:
        """Render a shape from each camera; cameras are aimed at it first, views are used as they are.

        Returns:
            (V, size, size, 4) uint8 RGBA, not premultiplied; the background is transparent black.
        """
        points = shape.spanned()  # (n, 3)
        aimed = [aim(points, camera) if isinstance(camera, Camera) else camera for camera in cameras]
        pictures = np.empty((len(aimed), self.size, self.size, 4), np.uint8)
        with self._uploaded(shape, points) as draw:
            for i, view in enumerate(aimed):
                self._clear(self._frame)
                draw(view)
                pictures[i] = self._read()
        return pictures

    def depths(self, mesh: Mesh, views: Sequence[View]) -> np.ndarray:
        """Return the depth buffers (V, DEPTH_SIZE, DEPTH_SIZE) float32 in [0, 1], row 0 at the bottom."""
        pixels = (DEPTH_SIZE, DEPTH_SIZE)
        result = np.empty((len(views), *pixels), np.float32)
        with self._uploaded(mesh, mesh.spanned()) as draw:
            buffer = self.gl.depth_texture(pixels)
            frame = self.gl.framebuffer(depth_attachment=buffer)
            for i, view in enumerate(views):
                self._clear(frame)
                draw(view, solid=True)
                result[i] = np.frombuffer(buffer.read(alignment=1), np.float32).reshape(pixels)
            frame.release()
            buffer.release()
        return result

    @contextlib.contextmanager
    def _uploaded(self, shape: Mesh | Cloud, points: np.ndarray) -> Iterator[Any]:
        """Yield a function that draws a shape; other renderers of this process may run before and after."""
        with self.gl:
            draw, owned = self._cloud(shape) if isinstance(shape, Cloud) else self._mesh(shape, points)
            try:
                yield draw
            finally:
                for item in owned:
                    item.release()

    def _clear(self, frame: Any) -> None:
        frame.use()
        frame.depth_mask = True
        frame.clear(0, 0, 0, 0)
        self.gl.enable(self.gl.DEPTH_TEST | self.gl.BLEND | self.gl.PROGRAM_POINT_SIZE)
        self.gl.blend_func = self.gl.ONE, self.gl.ONE_MINUS_SRC_ALPHA

    def _aim(self, program: Any, view: View) -> None:
        program["view"].write(view.view.T.astype(np.float32).tobytes())
        program["projection"].write(view.projection.T.astype(np.float32).tobytes())

    def _mesh(self, mesh: Mesh, points: np.ndarray) -> tuple[Any, list[Any]]:
        """Upload a mesh; return a function that draws it and what to release afterwards."""
        center = (points.min(0) + points.max(0)) / 2
        radius = np.linalg.norm(points - center, axis=1).max()
        corners = (mesh.vertices[mesh.triangles] - center) / radius  # (t, 3, 3)
        tint = np.ones_like(corners) if mesh.colors is None else mesh.colors  # (t, 3, 3)
        table = np.concatenate([corners, mesh.uv, tint], 2).astype(np.float32)  # (t, 3, 8)
        parts, owned = [], []
        for index in np.unique(mesh.material):
            buffer = self.gl.buffer(table[mesh.material == index].tobytes())
            array = self.gl.vertex_array(self._mesh_program, [(buffer, "3f 2f 3f", "position", "uv", "tint")])
            material = mesh.materials[index]
            image = None if material.texture is None else self._texture(material.texture)
            owned += [array, buffer] + ([] if image is None else [image])
            parts.append((array, material, image))
        # Draw opaque parts first; glass is blended over them and must not hide what is behind it.
        parts.sort(key=lambda part: part[1].opacity < 1)

        def draw(view: View, *, solid: bool = False) -> None:
            self._aim(self._mesh_program, view)
            self._mesh_program["tinted"].value = mesh.colors is not None
            for array, material, image in parts:
                self._draw_part(array, material, image, solid=solid)

        return draw, owned

    def _texture(self, pixels: np.ndarray) -> Any:
        height, width = pixels.shape[:2]
        image = self.gl.texture((width, height), 4, np.ascontiguousarray(pixels).tobytes())
        if pixels[..., 3].min() == 255:  # averaging would blur a cut-out's edge away
            image.build_mipmaps()
        return image

    def _draw_part(self, array: Any, material: Material, image: Any, *, solid: bool) -> None:
        opacity = 1.0 if solid or material.opacity >= 1 else max(material.opacity, MIN_OPACITY)
        self.gl.fbo.depth_mask = opacity == 1.0
        self._mesh_program["color"].value = tuple(float(c) for c in material.color)
        self._mesh_program["opacity"].value = opacity
        self._mesh_program["textured"].value = image is not None
        if image is not None:
            image.use()
        array.render()

    def _cloud(self, cloud: Cloud) -> tuple[Any, list[Any]]:
        """Upload a cloud; return a function that draws it as discs and what to release afterwards."""
        points = cloud.spanned()
        center = (points.min(0) + points.max(0)) / 2
        radius = np.linalg.norm(points - center, axis=1).max()
        table = np.concatenate([(points - center) / radius, cloud.shown_colors()], 1).astype(np.float32)  # (n, 6)
        buffer = self.gl.buffer(table.tobytes())
        array = self.gl.vertex_array(self._splat_program, [(buffer, "3f 3f", "position", "tint")])

        def draw(view: View) -> None:
            self._aim(self._splat_program, view)
            self._splat_program["point_size"].value = self._splat_size(points, view)
            array.render(mode=self.gl.POINTS)

        return draw, [array, buffer]

    def _splat_size(self, points: np.ndarray, view: View) -> float:
        """Return the diameter of a disc in samples: discs of neighbors overlap, whatever the number of points."""
        clip = np.concatenate([points, np.ones((len(points), 1))], 1) @ view.matrix().T  # (n, 4)
        flat = (clip[:, :2] / clip[:, 3:] + 1) / 2  # (n, 2) in [0, 1]
        # Spacing from the projected area per point. Cells are coarse enough to contain several points each.
        cells = int(np.clip(np.sqrt(len(points)) / 3, 1, 64))
        taken = np.unique((flat * cells).astype(int) @ [1, cells + 1]).size / cells**2
        side = self.size * self.side
        # Front and back of a surface overlap in the picture, so only half of the points count.
        spacing = side * np.sqrt(taken / max(len(points) / 2, 1))
        return float(np.clip(SPLAT_OVERLAP * spacing, 1.5 * self.side, side / 4))

    def _read(self) -> np.ndarray:
        """Average the samples of every pixel; (size, size, 4) uint8, row 0 at the top."""
        side = self.size * self.side
        raw = np.frombuffer(self._frame.read(components=4, alignment=1), np.uint8).reshape(side, side, 4)
        s = self.side
        # Two integer sums are four times as fast as a mean over both axes.
        sums = raw.reshape(self.size, s, side * 4).sum(1, dtype=np.uint16)  # (size, side * 4)
        sums = sums.reshape(self.size, self.size, s, 4).sum(2, dtype=np.uint32)[::-1]  # (size, size, 4)
        mean = sums.astype(np.float32) / np.float32(s * s)
        alpha = mean[..., 3:]
        rgb = np.where(alpha > 0, mean[..., :3] * 255 / np.maximum(alpha, 1e-6), 0)
        return np.concatenate([rgb, alpha], 2).round().clip(0, 255).astype(np.uint8)


def encode_png(picture: np.ndarray) -> bytes:
    """Encode (h, w, 4) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=6)
    return out.getvalue()
