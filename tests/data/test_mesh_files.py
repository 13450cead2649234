"""Every mesh format, with colors, and every way in which a file can be bad."""

import importlib.util
import io
import json
import math
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from data.rendering import Cloud, cameras_3d_r2n2, read_mesh, read_shape, sample_surface
from data.rendering.cameras import Camera, aim
from data.rendering.gltf import to_linear, to_srgb
from data.rendering.polygons import triangulate
from utils.errors import DataError

SQUARE = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
# An L of six corners: a fan from its first corner would leave the outline.
ELL = [(2, 1, 0), (2, 0, 0), (0, 0, 0), (0, 2, 0), (1, 2, 0), (1, 1, 0)]
DART = [(0, 0, 0), (2, 2, 0), (0, 1, 0), (-2, 2, 0)]


def obj_text(points, *faces):
    return "".join(f"v {x} {y} {z}\n" for x, y, z in points) + "".join(f"f {face}\n" for face in faces)


def off_text(points, *faces, header="OFF"):
    rows = [" ".join(map(str, row)) for row in points]
    return "\n".join([header, f"{len(points)} {len(faces)} 0", *rows, *faces]) + "\n"


def png(*colors):
    """Return a picture of one row."""
    out = io.BytesIO()
    Image.fromarray(np.array([colors], np.uint8)).save(out, "PNG")
    return out.getvalue()


def colors_of(mesh):
    """Return the distinct colors of a shape's points."""
    return {tuple(int(c) for c in color) for color in sample_surface(mesh, 200, seed=0).colors}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --------------------------------------------------------------------------------------------------------- polygons


def test_a_concave_quad_keeps_its_outline():
    darts = np.array([DART, [(0, 0, 0), (1, 0, 0), (0.2, 0.2, 0), (0, 1, 0)]], float)
    face, corners = triangulate(darts)
    a, b, c = (darts[face, corners[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    np.testing.assert_allclose(np.bincount(face, area), [2.0, 0.2])


def ply_text(points, *faces):
    header = (
        f"ply\nformat ascii 1.0\nelement vertex {len(points)}\nproperty float x\nproperty float y\nproperty float z\n"
    )
    header += f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    return header + "".join(f"{x} {y} {z}\n" for x, y, z in points) + "".join(f"{face}\n" for face in faces)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])  # in each of the three planes
@pytest.mark.parametrize("kind", ["obj", "off", "ply"])
@pytest.mark.parametrize(("outline", "area"), [(ELL, 3), (DART, 2)])
def test_concave_polygons_keep_their_outline_in_every_format(tmp_path, kind, outline, area, axes):
    points = [tuple(point[axis] for axis in axes) for point in outline]
    size = len(points)
    numbers = " ".join(map(str, range(size)))
    texts = {
        "obj": lambda: obj_text(points, " ".join(str(i + 1) for i in range(size))),
        "off": lambda: off_text(points, f"{size} {numbers}"),
        "ply": lambda: ply_text(points, f"{size} {numbers}"),
    }
    mesh = read_mesh(write(tmp_path / f"m.{kind}", texts[kind]()))
    assert len(mesh.triangles) == size - 2
    assert mesh.areas().sum() == pytest.approx(area)
    # The notch of the L and of the dart stays empty.
    flat = sample_surface(mesh, 500, seed=0).points[:, np.argsort(axes)]
    notch = (flat[:, :2] > 1.001).all(1) if outline is ELL else flat[:, 1] > np.abs(flat[:, 0]) / 2 + 1.001
    assert not notch.any()


def test_a_camera_centers_and_fills_the_frame():
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (500, 3)) * [1, 0.3, 0.1] + [0.1, 0.3, 0]
    for azimuth, elevation in ((0, 20), (60, 30), (-40, 25)):
        view = aim(points, Camera(azimuth, elevation))
        clip = np.c_[points, np.ones(len(points))] @ view.matrix().T
        flat = clip[:, :3] / clip[:, 3:]
        np.testing.assert_allclose(flat[:, :2].min(0), -flat[:, :2].max(0), atol=1e-9)
        assert np.abs(flat[:, :2]).max() == pytest.approx(0.94)
        assert np.abs(flat[:, 2]).max() < 1
        assert view.field_of_view < 40
    view = aim(points, Camera(0, 20)).view
    assert view[1, 1] > 0.9 and view[0, 0] == pytest.approx(1), "y up, x to the right, seen from the front"
    assert cameras_3d_r2n2(0, seed=1) == []


# -------------------------------------------------------------------------------------------------------------- OBJ


def test_obj_with_materials_textures_and_every_form_of_a_face(tmp_path):
    """A texture by a Windows path in another case, relative and repeated indices, a name with blanks."""
    write(tmp_path / "Maps" / "Half Red.PNG", png((255, 0, 0), (0, 0, 255)))
    mtl = "newmtl green paint\nKd 0 1 0\n\nnewmtl half\nKd 0.5 0.5 0.5\nmap_Kd -s 1 1 1 maps\\half red.png\n"
    write(tmp_path / "my materials.mtl", mtl)
    points = [*SQUARE, *[(x + 2, y, z) for x, y, z in SQUARE], *[(x + 4, y, z) for x, y, z in SQUARE]]
    text = "mtllib my materials.mtl\n" + obj_text(points) + "vt 0.25 0\nvt 0.75 0\nvn 0 0 1\n"
    text += "usemtl green paint\nf 1 2 3\nf 1//1 3//1 4//1\n"
    text += "usemtl half\nf 5/1/1 6/1/1 7/1/1\nf -8/-1 -6/-1 \\\n-5/-1\nl 1 2\n"
    text += "usemtl\tgreen  paint\nf\t9/1 10 11//1\n"  # forms mixed in one face
    mesh = read_mesh(write(tmp_path / "m.obj", text))
    assert mesh.notes == [] and mesh.areas().sum() == pytest.approx(2.5)
    points, colors, material, _ = sample_surface(mesh, 500, seed=0)
    side = points[:, 0] // 2
    names = np.array([m.name for m in mesh.materials])[material]
    assert (names[side != 1] == "green paint").all() and (names[side == 1] == "half").all()
    assert (colors[side != 1] == [0, 255, 0]).all()
    # The lower triangle has the texture's left half, the upper one its right half.
    lower = points[:, 0] - 2 > points[:, 1]
    assert (colors[(side == 1) & lower] == [255, 0, 0]).all()
    assert (colors[(side == 1) & ~lower] == [0, 0, 255]).all()


def test_obj_colors_of_vertices_and_opacity(tmp_path):
    text = "".join(f"v {x} {y} {z} 1 0.5 0\n" for x, y, z in SQUARE) + "f 1 2 3 4\n"
    for words in ("1 0.5 0", "1.01 0.5 0", "255 128 0"):
        path = write(tmp_path / "m.obj", text.replace("1 0.5 0\n", f"{words}\n"))
        assert colors_of(read_mesh(path)) == {(255, 128, 0)}
    write(tmp_path / "g.mtl", "newmtl glass\nd 0.25\nKd 1 nan 0\nTr 0.9\n")
    mesh = read_mesh(
        write(tmp_path / "g.obj", "mtllib g.mtl\n" + obj_text(SQUARE, "1 2 3 4").replace("f", "usemtl glass\nf"))
    )
    (glass,) = [m for m in mesh.materials if m.name == "glass"]
    assert glass.opacity == 0.25 and np.isfinite(glass.color).all()


def test_what_an_obj_misses_is_noted_and_the_mesh_used(tmp_path):
    text = "mtllib none.mtl\n" + obj_text(SQUARE, "1 2 3 4")
    assert "none.mtl is missing" in read_mesh(write(tmp_path / "m.obj", text)).notes[0]
    write(tmp_path / "m.mtl", "newmtl a\nmap_Kd C:\\pictures\\gone.png\nnewmtl b\nmap_Kd text.png\n")
    write(tmp_path / "text.png", "not a picture")
    text = "mtllib m.mtl\nusemtl a\n" + obj_text(SQUARE, "1 2 3") + "usemtl c\nf 1 3 4\n"
    notes = read_mesh(write(tmp_path / "n.obj", text)).notes
    assert [n.split(",")[0] for n in notes] == [
        "its texture C:\\pictures\\gone.png is missing",
        "its texture text.png is not a readable picture",
        "1 of its materials are not in its material library",
    ]
    # A path on another disk is looked up in the folder of the file.
    write(tmp_path / "gone.png", png((9, 9, 9)))
    assert len(read_mesh(tmp_path / "n.obj").notes) == 2


# ----------------------------------------------------------------------------------------------------- OFF, PLY, STL


def test_off_as_modelnet_writes_it_and_with_colors(tmp_path):
    text = off_text(SQUARE, "4 0 1 2 3").replace("OFF\n", "OFF")  # ModelNet's missing line end
    assert read_mesh(write(tmp_path / "a.off", text)).areas().sum() == pytest.approx(1)
    text = off_text(SQUARE, "3 0 1 2 255 0 0", "3 0 2 3 0 0 1.0", header="# made by hand\nOFF # comment")
    assert colors_of(read_mesh(write(tmp_path / "b.off", text))) == {(255, 0, 0), (0, 0, 1)}
    text = off_text(SQUARE, "3 0 1 2 0.5 0 0", "3 0 2 3")
    assert colors_of(read_mesh(write(tmp_path / "c.off", text))) == {(128, 0, 0), (204, 204, 204)}
    text = off_text([(*point, 10, 20, 30, 255) for point in SQUARE], "4 0 1 2 3", header="COFF")
    assert colors_of(read_mesh(write(tmp_path / "d.off", text))) == {(10, 20, 30)}


@pytest.mark.parametrize(
    ("kind", "color"),
    [("uchar", "255 51 0"), ("int", "255 51 0"), ("ushort", "65535 13107 0"), ("float", "1.01 0.2 0")],
)
def test_ply_colors_of_every_type(tmp_path, kind, color):
    text = ply_text(SQUARE, "4 0 1 2 3").replace(
        "property list", "".join(f"property {kind} {name}\n" for name in ("red", "green", "blue")) + "property list"
    )
    path = write(tmp_path / "m.ply", text.replace("4 0 1 2 3", f"{color} 4 0 1 2 3"))
    assert colors_of(read_mesh(path)) == {(255, 51, 0)}


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_ply_with_colors(tmp_path, encoding):
    square = trimesh.Trimesh(SQUARE, [[0, 1, 2], [0, 2, 3]], process=False)
    square.visual.vertex_colors = [[10, 20, 30, 255]] * 4
    path = write(tmp_path / "a.ply", square.export(file_type="ply", encoding=encoding))
    assert colors_of(read_mesh(path)) == {(10, 20, 30)}
    square.visual = trimesh.visual.ColorVisuals(square, face_colors=[[255, 0, 0, 255], [0, 255, 0, 255]])
    path = write(tmp_path / "b.ply", square.export(file_type="ply", encoding=encoding))
    assert colors_of(read_mesh(path)) == {(255, 0, 0), (0, 255, 0)}


def test_ply_of_mixed_polygons_with_meshlabs_texture(tmp_path):
    write(tmp_path / "t.png", png((255, 0, 0), (0, 0, 255)))
    text = ply_text([*SQUARE, (2, 0, 0)], "4 0 1 2 3 8 .2 0 .2 0 .2 0 .2 0", "3 1 4 2 6 .7 0 .7 0 .7 0")
    text = text.replace("ascii 1.0\n", "ascii 1.0\ncomment TextureFile t.png\ncomment Häuser\n")
    text = text.replace("vertex_indices\n", "vertex_indices\nproperty list uchar float texcoord\n")
    mesh = read_mesh(write(tmp_path / "m.ply", text))
    assert mesh.areas().sum() == pytest.approx(1.5)
    samples = sample_surface(mesh, 200, seed=0)
    left = samples.points[:, 0] < 1
    assert (samples.colors[left] == [255, 0, 0]).all() and (samples.colors[~left] == [0, 0, 255]).all()


def test_ply_without_faces_is_a_cloud(tmp_path):
    points = np.random.default_rng(0).random((20, 3))
    cloud = trimesh.PointCloud(points, colors=[[255, 0, 51, 255]] * 20)
    path = write(tmp_path / "c.ply", cloud.export(file_type="ply"))
    read = read_shape(path)
    assert isinstance(read, Cloud)
    np.testing.assert_allclose(read.points, points, atol=1e-6)
    np.testing.assert_allclose(read.colors, np.broadcast_to([1, 0, 0.2], (20, 3)), atol=1e-6)
    with pytest.raises(DataError, match="no faces"):
        read_mesh(path)


@pytest.mark.parametrize("kind", ["stl", "stl_ascii"])
def test_stl(tmp_path, kind):
    path = write(tmp_path / "m.stl", trimesh.creation.box().export(file_type=kind))
    mesh = read_mesh(path)
    assert mesh.areas().sum() == pytest.approx(6) and colors_of(mesh) == {(204, 204, 204)}


# ------------------------------------------------------------------------------------------------------------- glTF


def glb(scene, **changes):
    """Bytes of a scene; ``changes`` are merged into its JSON."""
    data = scene.export(file_type="glb")
    length = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[20 : 20 + length]) | changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + length :]
    return (
        struct.pack("<4sII", b"glTF", 2, 20 + len(text) + len(rest))
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + rest
    )


def painted(factor, uv=None, image=None, mode=None):
    square = trimesh.Trimesh(SQUARE, [[0, 1, 2], [0, 2, 3]], process=False)
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=factor, baseColorTexture=image, alphaMode=mode)
    square.visual = trimesh.visual.TextureVisuals(uv=np.zeros((4, 2)) if uv is None else uv, material=material)
    return square


def test_srgb_is_the_standards_curve_and_its_inverse():
    np.testing.assert_allclose(to_srgb(np.array([0, 0.0031308, 0.5, 1])), [0, 0.04045, 0.7353569, 1], atol=1e-5)
    values = np.linspace(0, 1, 100)
    np.testing.assert_allclose(to_srgb(to_linear(values)), values, atol=1e-9)


def test_gltf_colors_are_linear_and_instances_keep_their_places(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(painted([128, 0, 255, 255]), node_name="one", geom_name="shape")
    for i in (1, 2):
        place = trimesh.transformations.translation_matrix([3 * i, 0, 0]) @ np.diag([2, 2, 2, 1])
        scene.graph.update(frame_to=f"copy{i}", matrix=place, geometry="shape")
    for suffix in ("glb", "gltf"):
        if suffix == "glb":
            path = write(tmp_path / "m.glb", glb(scene))
        else:
            for name, data in scene.export(file_type="gltf").items():
                write(tmp_path / "scene" / name, data)
            path = tmp_path / "scene" / "model.gltf"
        mesh = read_mesh(path)
        assert mesh.areas().sum() == pytest.approx(1 + 4 + 4)
        np.testing.assert_allclose(mesh.vertices.max(0), [8, 2, 0])
        ((red, green, blue),) = colors_of(mesh)
        assert (green, blue) == (0, 255) and abs(red - 188) <= 1  # 128 / 255 of linear light


def test_gltf_textures_are_srgb_and_tinted_in_linear_light(tmp_path):
    image = Image.fromarray(np.array([[[200, 200, 200, 255], [10, 20, 30, 255]]], np.uint8))
    uv = [[0.25, 0.5]] * 4
    path = write(tmp_path / "a.glb", glb(trimesh.Scene(painted([255, 255, 255, 255], uv, image))))
    assert colors_of(read_mesh(path)) == {(200, 200, 200)}
    path = write(tmp_path / "b.glb", glb(trimesh.Scene(painted([128, 255, 255, 255], uv, image))))
    ((red, green, _),) = colors_of(read_mesh(path))
    assert green == 200 and abs(red - 255 * to_srgb(to_linear(np.float64(200 / 255)) * 128 / 255)) <= 1


@pytest.mark.parametrize("transform", [{"offset": [0, 0.5]}, {"scale": [1, 3]}, {"rotation": math.pi / 2}])
@pytest.mark.parametrize("binary", [True, False])
def test_gltf_textures_lie_where_their_transform_puts_them(tmp_path, transform, binary):
    """Sketchfab and Blender write KHR_texture_transform."""
    image = Image.fromarray(np.array([[[200, 0, 0, 255]], [[0, 200, 0, 255]]], np.uint8))  # red above green
    scene = trimesh.Scene(painted([255, 255, 255, 255], [[0.25, 0.75]] * 4, image))
    for change, color in (({}, (200, 0, 0)), ({"extensions": {"KHR_texture_transform": transform}}, (0, 200, 0))):
        texture = {"index": 0} | change
        materials = [{"name": "twice"}, {"name": "twice", "pbrMetallicRoughness": {"baseColorTexture": texture}}]
        files = scene.export(file_type="gltf")
        header = json.loads(files["model.gltf"]) | {"materials": materials}
        header["meshes"][0]["primitives"][0]["material"] = 1
        for name, data in (files | {"model.gltf": json.dumps(header).encode()}).items():
            write(tmp_path / name, data)
        path = tmp_path / "model.gltf"
        if binary:
            path = write(tmp_path / "m.glb", glb(scene, materials=materials, meshes=header["meshes"]))
        assert colors_of(read_mesh(path)) == {color}


def test_gltf_opacity_counts_where_the_material_says_so(tmp_path):
    for mode, opacity in ((None, 1.0), ("BLEND", 0.5)):
        path = write(tmp_path / "m.glb", glb(trimesh.Scene(painted([255, 255, 255, 127], mode=mode))))
        assert read_mesh(path).materials[0].opacity == pytest.approx(opacity, abs=0.01)


def test_gltf_colors_of_vertices(tmp_path):
    square = trimesh.Trimesh(SQUARE, [[0, 1, 2], [0, 2, 3]], process=False)
    square.visual.vertex_colors = [[128, 0, 255, 255]] * 4
    ((red, green, blue),) = colors_of(read_mesh(write(tmp_path / "m.glb", glb(trimesh.Scene(square)))))
    assert (green, blue) == (0, 255) and abs(red - 188) <= 1


def test_draco_is_decoded_or_the_package_named(tmp_path, monkeypatch):
    pytest.importorskip("DracoPy")
    scene = trimesh.Scene(trimesh.creation.icosphere(3))
    path = write(tmp_path / "m.glb", scene.export(file_type="glb", extension_draco=True))
    assert b"KHR_draco_mesh_compression" in path.read_bytes()
    assert read_mesh(path).areas().sum() == pytest.approx(4 * np.pi, rel=0.02)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"m.glb is Draco-compressed.*pip install DracoPy"):
        read_mesh(path)


# -------------------------------------------------------------------------------------------------------- bad files

BOX = trimesh.creation.box()
TRIANGLE = obj_text(SQUARE, "1 2 3")
GLB = glb(trimesh.Scene(BOX))
STL = BOX.export(file_type="stl")
SCENE = trimesh.Scene(BOX).export(file_type="gltf")
MESHOPT = glb(trimesh.Scene(BOX), extensionsRequired=["EXT_meshopt_compression"])
BAD = {
    "empty.obj": (b"", "is empty"),
    "faceless.obj": (obj_text(SQUARE), "has no faces"),
    "index.obj": (TRIANGLE + "f 1 2 9\n", "vertex 9, the file has 4"),
    "zero.obj": (TRIANGLE + "f 0 1 2\n", "a face refers to vertex"),
    "back.obj": (TRIANGLE + "f -5 1 2\n", "a face refers to vertex"),
    "uv.obj": (TRIANGLE + "vt 0 0\nf 1/1 2/1 3/2\n", "texture coordinate 2, the file has 1"),
    "cut.obj": ("v 0 0 0\nv 1 0 0\nv 0 1\nf 1 2 3\n", "a vertex is not three numbers"),
    "word.obj": ("v 0 0 0\nv 1 x 0\nv 0 1 0\nf 1 2 3\n", "a vertex is not three numbers"),
    "face.obj": (TRIANGLE + "f 1 2 x\n", "a face is not a list of numbers"),
    "nan.obj": (TRIANGLE.replace("v 1 0 0", "v nan 0 0"), "not finite"),
    "line.obj": (obj_text([(0, 0, 0), (1, 0, 0), (2, 0, 0)], "1 2 3"), "no usable surface"),
    "header.off": ("NOPE\n3 1 0\n", "does not begin with OFF"),
    "binary.off": ("OFF BINARY\n\0\0\0\4", "binary OFF"),
    "counts.off": ("OFF\n", "does not say how many"),
    "vertices.off": (
        off_text(SQUARE, "3 0 1 2").replace("4 1 0", "5 1 0"),
        "promises 5 vertices and 1 faces and holds 5",
    ),
    "faces.off": (off_text(SQUARE, "3 0 1 2").replace("4 1 0", "4 2 0"), "4 vertices and 2 faces and holds 4 and 1"),
    "corner.off": (off_text(SQUARE, "3 0 1"), "promises 3 corners and has 2"),
    "index.off": (off_text(SQUARE, "3 0 1 4"), "vertex 4, the file has 0 to 3"),
    "word.off": (off_text(SQUARE, "3 0 1 two"), "a face is not a list of numbers"),
    "rows.off": (off_text([(0, 0), (1, 0), (1, 1)], "3 0 1 2"), "a vertex has 2 numbers"),
    "magic.ply": ("plx\n", "does not begin with ply"),
    "cut.ply": (BOX.export(file_type="ply")[:-20], "holds less than its header promises"),
    "text.ply": (ply_text(SQUARE, "3 0 1 2", "3 0 2 3")[:-8], "holds less than its header promises"),
    "index.ply": (ply_text(SQUARE, "3 0 1 4"), "vertex 4, the file has 4"),
    "huge.ply": (ply_text(SQUARE, "3 0 1 2").replace("vertex 4", "vertex 99999999999"), "promises 99999999999 rows"),
    "xyz.ply": (ply_text(SQUARE, "3 0 1 2").replace("float z", "float w"), "no vertices with x, y and z"),
    "strips.ply": (ply_text(SQUARE, "3 0 1 2").replace("element face", "element tristrips"), "triangle strips"),
    "cut.stl": (STL[:-30], "promises 12 triangles and holds 11"),
    "short.stl": (b"solid", "fewer than its header"),
    "text.stl": (BOX.export(file_type="stl_ascii")[:-200], "does not end in a line endsolid"),
    "magic.glb": (b"glTF, not really, but long enough", "is glTF version|is not a GLB"),
    "cut.glb": (GLB[:-100], "promises .* bytes and has .*: it is truncated"),
    "json.gltf": (b'{"asset": ', "JSON is damaged or truncated"),
    "bin.gltf": (SCENE["model.gltf"], "missing from its folder|not a readable GLTF"),
    "extension.glb": (MESHOPT, "EXT_meshopt_compression"),
    "scene.glb": (glb(trimesh.Scene(BOX), nodes=[{}], scenes=[{"nodes": [0]}]), "no triangles"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mesh_is_refused_by_name_and_reason(tmp_path, name):
    content, reason = BAD[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"{name}.*({reason})"):
        read_mesh(path)


@pytest.mark.parametrize("kind", ["off", "ply", "stl", "glb"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.97])
def test_a_file_that_was_cut_off_is_never_a_smaller_shape(tmp_path, kind, share):
    data = trimesh.creation.icosphere(2).export(file_type=kind)
    data = data.encode() if isinstance(data, str) else data
    path = write(tmp_path / f"m.{kind}", data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"m\."):
        read_mesh(path)


@pytest.mark.parametrize("share", [0.1, 0.4])  # within its vertices; faces come last and may end anywhere
def test_an_obj_that_was_cut_off_before_its_faces_is_refused(tmp_path, share):
    data = trimesh.creation.icosphere(2).export(file_type="obj").encode()
    with pytest.raises(DataError):
        read_mesh(write(tmp_path / "m.obj", data[: int(len(data) * share)]))


def test_missing_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="cannot read .*none.obj"):
        read_mesh(tmp_path / "none.obj")
    with pytest.raises(DataError, match=r"expected a file ending in \.off"):
        read_mesh(write(tmp_path / "m.fbx", "x"))
