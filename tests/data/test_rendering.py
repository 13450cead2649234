"""Pictures of meshes and clouds, checked pixel by pixel where that is possible."""

import builtins
import subprocess
import sys

import numpy as np
import pytest

from data.rendering import (
    Camera,
    Cloud,
    Material,
    Mesh,
    Renderer,
    cameras_3d_r2n2,
    concatenate,
    sample_exterior,
    sample_surface,
)
from data.rendering.cameras import aim
from data.rendering.renderer import create_context
from tests.support.opengl import needs_opengl
from tests.support.paths import ROOT
from utils.errors import DataError, UserError

QUAD = np.array([[0, 1, 2], [0, 2, 3]])
FRONT = Camera(azimuth=0, elevation=0, fill=1.0)


def box(low, high, color=(0.8, 0.8, 0.8)):
    """Return an axis-aligned box of twelve triangles."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in sides for t in ((a, b, c), (a, c, d))]
    return Mesh.from_triangles(np.asarray(low) + corners * np.subtract(high, low), triangles, color=color)


def square(color=(0.8, 0.8, 0.8), z=0.0):
    """The square from -1 to 1 in x and y."""
    return Mesh.from_triangles([[-1, -1, z], [1, -1, z], [1, 1, z], [-1, 1, z]], QUAD, color=color)


def shade(albedo, normal=(0, 0, 1)):
    """Return a color as the shader lights it: key light, fill light, ambient light, and a floor for black."""
    key = np.dot(normal, np.array([-0.5, 0.75, 0.6]) / np.linalg.norm([-0.5, 0.75, 0.6]))
    fill = np.dot(normal, np.array([0.8, 0.1, 0.5]) / np.linalg.norm([0.8, 0.1, 0.5]))
    light = 0.5 + 0.48 * max(key, 0) + 0.16 * max(fill, 0)
    return np.minimum((0.2 + 0.8 * np.asarray(albedo)) * light, 1) * 255


@pytest.fixture(scope="module")
def renderer():
    with Renderer(32, samples=4) as renderer:
        yield renderer


@needs_opengl
def test_a_square_from_the_front_fills_the_picture_with_its_color(renderer):
    (picture,) = renderer.views(square(color=(0.5, 0.25, 0.0)), [FRONT])
    assert picture.shape == (32, 32, 4) and picture.dtype == np.uint8
    assert (picture[..., 3] == 255).all()
    np.testing.assert_allclose(picture[..., :3], np.broadcast_to(shade([0.5, 0.25, 0.0]), (32, 32, 3)), atol=1)


@needs_opengl
def test_the_background_is_transparent_black_and_edges_are_blended_without_it(renderer):
    triangle = Mesh.from_triangles([[-1, -1, 0], [1, -1, 0], [-1, 1, 0]], [[0, 1, 2]])
    (picture,) = renderer.views(triangle, [FRONT])
    upper_right = np.triu(np.ones((32, 32), bool), 1)  # row 0 is the top
    assert (picture[upper_right] == 0).all()
    assert (picture[np.tril(np.ones((32, 32), bool), -1)][:, 3] == 255).all()
    diagonal = picture[np.arange(32), np.arange(32)]
    assert ((diagonal[:, 3] > 50) & (diagonal[:, 3] < 224)).all()
    # Straight color: a half-covered pixel is as bright as a covered one.
    np.testing.assert_allclose(diagonal[:, :3], np.broadcast_to(shade([0.8] * 3), (32, 3)), atol=3)


@needs_opengl
def test_a_texture_lies_the_right_way_up_and_its_holes_are_cut_out(renderer):
    mesh = square()
    mesh.uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)[QUAD]
    red, green, blue, hole = [255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255], [255, 255, 255, 0]
    texture = np.array([[red, green], [blue, hole]], np.uint8).repeat(16, 0).repeat(16, 1)  # row 0 at v = 0
    mesh.materials = [Material("quarters", np.ones(3, np.float32), texture=texture)]
    (picture,) = renderer.views(mesh, [FRONT])
    np.testing.assert_allclose(picture[24, 8, :3], shade([1, 0, 0]), atol=1)
    np.testing.assert_allclose(picture[24, 24, :3], shade([0, 1, 0]), atol=1)
    np.testing.assert_allclose(picture[8, 8, :3], shade([0, 0, 1]), atol=1)
    assert (picture[8, 24] == 0).all()


@needs_opengl
def test_corner_colors_multiply_the_material_and_blend_across_a_face(renderer):
    mesh = square(color=(1.0, 1.0, 1.0))
    mesh.colors = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32)[QUAD]
    (picture,) = renderer.views(mesh, [FRONT])
    red = picture[16, :, 0].astype(int)
    assert (np.diff(red) >= 0).all() and red[-1] - red[0] > 100
    np.testing.assert_allclose(picture[16, 16, :3], shade([0.5, 0, 0]), atol=4)


@needs_opengl
def test_what_is_nearer_hides_and_glass_lets_through(renderer):
    behind, front = square(color=(1, 0, 0), z=-0.5), square(color=(0, 0, 1), z=0.5)
    (hidden,) = renderer.views(concatenate([behind, front]), [FRONT])
    np.testing.assert_allclose(hidden[16, 16, :3], shade([0, 0, 1]), atol=1)
    front.materials[0].opacity = 0.5
    for order in ([behind, front], [front, behind]):
        (glass,) = renderer.views(concatenate(order), [FRONT])
        np.testing.assert_allclose(glass[16, 16, :3], (shade([0, 0, 1]) + shade([1, 0, 0])) / 2, atol=2)


@needs_opengl
def test_light_does_not_depend_on_the_winding(renderer):
    mesh, turned = box([0, 0, 0], [1, 1, 1]), box([0, 0, 0], [1, 1, 1])
    turned.triangles = turned.triangles[:, ::-1]
    camera = [Camera(30, 25)]
    np.testing.assert_array_equal(renderer.views(mesh, camera), renderer.views(turned, camera))


@needs_opengl
def test_views_center_the_object_and_fill_the_frame_wherever_it_is(renderer):
    here = box([0, 0, 0], [1, 2, 0.5])
    there = here.transformed(np.block([[np.eye(3) * 50, np.array([[900.0], [-70], [3]])], [np.zeros((1, 3)), 1]]))
    cameras = cameras_3d_r2n2(3, seed=0)
    pictures = renderer.views(here, cameras)
    np.testing.assert_allclose(pictures.astype(int), renderer.views(there, cameras), atol=3)
    for picture in pictures:
        rows, columns = np.nonzero(picture[..., 3] > 0)
        assert max(np.ptp(rows), np.ptp(columns)) in (29, 30, 31)  # 94 % of 32
        assert abs(rows.min() + rows.max() - 31) <= 1 and abs(columns.min() + columns.max() - 31) <= 1


@needs_opengl
def test_a_view_matrix_says_where_points_are_in_the_picture(renderer):
    mesh = box([3, 1, -2], [4, 3, -1.5])
    camera = Camera(40, 27)
    (picture,) = renderer.views(mesh, [camera])
    points = sample_surface(mesh, 500, seed=0).points
    clip = np.c_[points, np.ones(500)] @ aim(mesh.spanned(), camera).matrix().T
    x, y = (clip[:, :2] / clip[:, 3:]).T
    # A pixel at the outline may have all of its samples outside.
    assert (picture[((1 - y) * 16).astype(int), ((1 + x) * 16).astype(int), 3] > 0).mean() > 0.98


@needs_opengl
@pytest.mark.parametrize("count", [40, 2000])
def test_a_cloud_becomes_a_closed_picture_in_its_colors(renderer, count):
    points = np.random.default_rng(0).normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    colors = np.where(points[:, 1:2] > 0, [[1, 0, 0]], [[0, 0, 1]]).astype(np.float32)
    (picture,) = renderer.views(Cloud(points, colors), [FRONT])
    disc = np.hypot(*np.mgrid[-15.5:16, -15.5:16]) < 13
    assert (picture[disc][:, 3] > 0).mean() > (0.65 if count == 40 else 0.99)
    # Row 0 is the top: red above, blue below, and nothing in the corners.
    top, bottom = picture[:14][disc[:14]], picture[18:][disc[18:]]
    assert top[:, 0].mean() > 1.5 * top[:, 2].mean() and bottom[:, 2].mean() > 1.5 * bottom[:, 0].mean()
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all()


@needs_opengl
def test_the_same_arguments_give_the_same_bytes(renderer):
    mesh, cameras = box([0, 0, 0], [1, 2, 1]), cameras_3d_r2n2(2, seed=5)
    with Renderer(32, samples=4) as another:
        np.testing.assert_array_equal(renderer.views(mesh, cameras), another.views(mesh, cameras))


@needs_opengl
def test_exterior_points_leave_out_what_is_hidden_inside(renderer):
    room, inside = box([-1, -1, -1], [1, 1, 1]), box([-0.4, -0.4, -0.4], [0.4, 0.4, 0.4])
    mesh = concatenate([room, inside])
    assert (sample_surface(mesh, 1000, seed=0).material == 1).mean() > 0.1
    samples = sample_exterior(mesh, 1000, seed=0, renderer=renderer)
    assert (samples.material == 0).all() and len(samples.points) == 1000
    # All six faces keep their share: nothing of the outside is lost at grazing angles.
    share = [(np.abs(samples.points[:, axis] - side) < 1e-9).mean() for axis in range(3) for side in (-1, 1)]
    assert min(share) > 0.12
    # A box that is open at the top shows what it holds.
    opened = concatenate([room.select(~np.isclose(room.vertices[room.triangles][..., 1], 1).all(1)), inside])
    assert (sample_exterior(opened, 1000, seed=0, renderer=renderer).material == 1).mean() > 0.05


def test_cameras_go_all_round_at_25_to_30_degrees():
    for count in (1, 2, 12):
        cameras = cameras_3d_r2n2(count, seed=3)
        assert len(cameras) == count and cameras == cameras_3d_r2n2(count, seed=3)
        assert all(25 <= camera.elevation <= 30 and 0 <= camera.azimuth < 360 for camera in cameras)
        # Each azimuth has an arc to itself, so the gaps are never wider than two arcs.
        azimuths = np.sort([camera.azimuth for camera in cameras])
        assert np.diff([*azimuths, azimuths[0] + 360]).max() <= 720 / count
    assert cameras_3d_r2n2(2, seed=3) != cameras_3d_r2n2(2, seed=4)


def test_points_are_even_by_area_and_take_the_color_of_their_place():
    mesh = concatenate([box([0, 0, 0], [1, 1, 1], color=(1, 0, 0)), box([5, 0, 0], [7, 2, 2], color=(0, 0, 1))])
    samples = sample_surface(mesh, 5000, seed=1)
    red = samples.points[:, 0] < 2
    assert abs(red.mean() - 0.2) < 0.02  # areas 6 and 24
    assert (samples.colors[red] == [255, 0, 0]).all() and (samples.colors[~red] == [0, 0, 255]).all()
    assert (samples.material == ~red).all()
    face = square(color=(1, 1, 1))
    face.colors = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32)[QUAD]
    samples = sample_surface(face, 500, seed=1)
    np.testing.assert_allclose(samples.colors[:, 0], (samples.points[:, 0] + 1) / 2 * 255, atol=1)


def test_a_surface_that_is_all_cut_away_is_an_error():
    mesh = square()
    mesh.materials[0].texture = np.zeros((2, 2, 4), np.uint8)
    with pytest.raises(DataError, match="cut away"):
        sample_surface(mesh, 10, seed=0)


@needs_opengl
def test_triton_can_be_imported_after_rendering():
    """Mesa and Triton each contain LLVM; loaded in the wrong order, the process crashes."""
    pytest.importorskip("triton")
    code = "from data.rendering import Renderer; Renderer(8).release(); import triton"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_missing_opengl_names_the_packages(monkeypatch):
    moderngl = pytest.importorskip("moderngl")

    def fail(**_):
        raise Exception("libEGL.so not loaded")

    monkeypatch.setattr(moderngl, "create_context", fail)
    with pytest.raises(UserError, match="libEGL.so not loaded.*apt-get install libegl1"):
        create_context()


def test_a_missing_moderngl_names_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "moderngl", raising=False)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "moderngl":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install moderngl"):
        create_context()
