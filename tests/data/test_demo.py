"""The committed demo set is complete and consistent, and its script works (without the renderer)."""

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KDTree

from data.demo_makers import make_demo
from datasets.registry import open_classification_set
from datasets.shapenet_render import ShapeNetRender
from tests.support.files import contents
from tests.support.opengl import needs_opengl
from tests.support.paths import DEMO
from utils.errors import DataError, UserError


@pytest.fixture(scope="module")
def pack():
    """Read everything in the packed file with plain h5py, without this project's reader."""
    with h5py.File(DEMO / "shapenet_render.h5", "r") as file:
        stored = file["points"]
        texts = {f"catalogue/{name}" for name in file["catalogue"]} | {"ids", "view_names", "material_names"}
        content = {name: file[name].asstr()[:] for name in texts}
        content |= {name: file[name][:] for name in file if name not in texts | {"catalogue"}}
        content["points"] = stored[:] * stored.attrs["scale"] + stored.attrs["offset"]
        content["attrs"] = dict(file.attrs)
    return content


@pytest.fixture(scope="module")
def views(pack):
    """Every picture, (m, h, w, 4) uint8."""
    data, offset = pack["image_bytes"].tobytes(), pack["image_offset"]
    files = [data[start:stop] for start, stop in zip(offset, offset[1:], strict=False)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGBA")) for file in files])


def read_split(split):
    folder = DEMO / "demo_hdf5"
    (name,) = (folder / f"{split}_files.txt").read_text().split()
    with h5py.File(folder / name.rpartition("/")[2], "r") as file:
        return file["data"][:].astype(np.float32), file["label"][:], file["ids"].asstr()[:]


def class_names():
    return (DEMO / "demo_hdf5" / "shape_names.txt").read_text().split()


# ------------------------------------------------------------------------------------------- the packed pairs


def test_pack_tables_agree(pack):
    count = len(pack["ids"])
    assert pack["attrs"]["format"] == "crossnet-pack" and pack["attrs"]["version"] == 1
    assert count > 800
    assert len(set(pack["ids"])) == count
    assert list(pack["ids"]) == sorted(pack["ids"])
    assert all(name.count("/") == 1 and " " not in name for name in pack["ids"])
    assert pack["points"].shape == (count, 1024, 3)
    for name in ("view", "image", "material"):
        offset = pack[f"{name}_offset"]
        assert offset[0] == 0 and (np.diff(offset) > 0).all()
    assert len(pack["view_offset"]) == len(pack["material_offset"]) == count + 1
    assert pack["view_offset"][-1] == len(pack["view_names"]) == len(pack["image_offset"]) - 1
    assert pack["image_offset"][-1] == len(pack["image_bytes"])
    assert pack["material_offset"][-1] == len(pack["material_names"])
    for name, values in pack.items():
        if name.startswith("catalogue/") or name in (
            "point_colour",
            "point_material",
            "centre_m",
            "radius_m",
            "size_m",
        ):
            assert len(values) == count


def test_shards_are_there_and_named_relative_to_the_index(pack, tmp_path, monkeypatch):
    # HDF5 fills in zeros for a missing shard, so reading would not reveal a wrong name.
    with h5py.File(DEMO / "shapenet_render.h5", "r") as file:
        sources = {source.file_name for name in ("points", "image_bytes") for source in file[name].virtual_sources()}
    assert sources and all("/" not in name and (DEMO / name).is_file() for name in sources)
    assert {path.name for path in DEMO.glob("shapenet_render_*.h5")} == sources
    monkeypatch.chdir(tmp_path)
    with h5py.File(DEMO.resolve() / "shapenet_render.h5", "r") as file:
        assert (file["points"][-1] > 0).any() and (file["points"][0] > 0).any()


def test_clouds_fill_the_unit_sphere(pack):
    radius = np.linalg.norm(pack["points"], axis=2).max(1)
    np.testing.assert_allclose(radius, 1, atol=1e-3)
    np.testing.assert_allclose(pack["points"].mean(1), 0, atol=1e-3)


def test_clouds_are_not_degenerate(pack):
    distinct = [len(np.unique(cloud, axis=0)) for cloud in pack["points"]]
    assert min(distinct) > 900


def test_clouds_in_meters_have_the_catalogue_size(pack):
    meters = pack["points"] * pack["radius_m"][:, None, None] + pack["centre_m"][:, None]
    low, high = meters.min(1), meters.max(1)
    extent, size = high - low, pack["size_m"]
    slack = 2e-3 * size.max(1, keepdims=True)
    assert (extent <= size + slack).all()
    assert (low[:, 1] >= -slack[:, 0]).all()
    assert np.median(extent / size) > 0.95


def test_y_is_up(pack):
    kind, size = pack["catalogue/class"], pack["points"].max(1) - pack["points"].min(1)
    for name in ("door", "window"):
        assert (size[kind == name, 1] > 2 * size[kind == name, 2]).all()
    assert (size[kind == "bottle"].argmax(1) == 1).all()
    assert (size[kind == "bed"].argmin(1) == 1).mean() > 0.8
    # Most of a table's surface is its top.
    assert (np.median(pack["points"][kind == "table"][..., 1], axis=1) > 0).mean() > 0.8


def test_colors_and_materials_are_in_their_tables(pack):
    assert pack["palette"].shape == (256, 3)
    assert pack["point_colour"].shape == pack["point_material"].shape == pack["points"].shape[:2]
    assert (pack["point_material"].max(1) < np.diff(pack["material_offset"])).all()
    assert all(pack["material_names"])
    trees = pack["palette"][pack["point_colour"][pack["ids"] == "exterior/scopia-poplar"][0]].astype(int)
    assert (trees[:, 1] > trees[:, 2]).mean() > 0.9, "a poplar is green and brown"


def test_views_decode_to_one_size_and_fill_the_frame(views):
    height, width = views.shape[1:3]
    assert height == width
    seen = views[..., 3] > 128
    assert seen.any((1, 2)).all()
    rows, columns = seen.any(2), seen.any(1)
    longest = np.maximum(rows.sum(1), columns.sum(1))
    assert np.median(longest) > 0.85 * width
    assert not seen[:, 0].any() and not seen[:, :, 0].any(), "nothing is cut off by the frame"


def test_views_are_not_blank_and_show_shading(views):
    for picture in views:
        solid = picture[picture[..., 3] > 128][:, :3]
        assert len(solid) > 30
        assert len(np.unique(solid @ (1, 256, 256**2))) >= 4
        assert solid.max() > 25


def test_transparent_ground_is_black(views):
    # Readers that drop alpha instead of compositing get the released code's black ground.
    assert not views[views[..., 3] == 0].any()


def test_every_shape_has_two_different_views(pack, views):
    assert (np.diff(pack["view_offset"]) == 2).all()
    assert list(pack["view_names"]) == ["00.png", "01.png"] * len(pack["ids"])
    different = (views[0::2] != views[1::2]).any((1, 2, 3))
    assert different.mean() > 0.99


# ------------------------------------------------------------------------------------------ the classes of the SVM


def test_splits_have_the_official_layout():
    names = class_names()
    assert len(names) == len(set(names)) >= 8
    for split in ("train", "test"):
        points, label, ids = read_split(split)
        assert points.shape[1:] == (1024, 3) and label.shape == (len(points), 1) and len(ids) == len(points)
        assert set(label[:, 0]) == set(range(len(names))), "every class is in this split"
        np.testing.assert_allclose(np.linalg.norm(points, axis=2).max(1), 1, atol=2e-3)


def test_labels_follow_the_catalogue_and_no_model_is_in_both_splits(pack):
    kind = dict(zip(pack["ids"], pack["catalogue/class"], strict=True))
    names, seen = class_names(), []
    for split in ("train", "test"):
        _, label, ids = read_split(split)
        assert [kind[i] for i in ids] == [names[c] for c in label[:, 0]]
        seen += list(ids)
    assert len(set(seen)) == len(seen)
    assert sorted(seen) == sorted(i for i, name in kind.items() if name)


def test_every_class_keeps_about_a_third_for_testing():
    train, test = (np.bincount(read_split(split)[1][:, 0]) for split in ("train", "test"))
    assert (train >= 5).all() and (test >= 3).all()
    np.testing.assert_allclose(test / (train + test), 0.35, atol=0.1)


def test_variants_of_a_design_are_on_one_side(pack):
    creator = dict(zip(pack["ids"], pack["catalogue/creator"], strict=True))
    families = {}
    for split in ("train", "test"):
        _, label, ids = read_split(split)
        for i, c in zip(ids, label[:, 0], strict=True):
            model = SimpleNamespace(key=i.partition("/")[2], creator=creator[i])
            families.setdefault((c, make_demo.family(model)), set()).add(split)
    assert all(len(splits) == 1 for splits in families.values())
    assert len(families) < sum(len(read_split(split)[0]) for split in ("train", "test"))


def test_svm_clouds_are_new_draws_of_the_same_models(pack):
    row = {name: i for i, name in enumerate(pack["ids"])}
    points, _, ids = read_split("test")
    for cloud, name in zip(points[::5], ids[::5], strict=True):
        gap = KDTree(pack["points"][row[name]]).query(cloud)[0]
        assert gap.mean() < 0.06
        assert (gap > 1e-3).mean() > 0.5


# ------------------------------------------------------------------------------------------------ papers and sizes


def test_every_model_is_attributed(pack):
    rows = [line.strip("| ").split(" | ") for line in (DEMO / "ATTRIBUTION.md").read_text("utf-8").splitlines()]
    table = {row[0]: row for row in rows if len(row) == 5 and "/" in row[0]}
    assert set(table) == set(pack["ids"])
    for name, creator, licence in zip(pack["ids"], pack["catalogue/creator"], pack["catalogue/licence"], strict=True):
        _, title, stated_creator, stated_licence, origin = table[name]
        assert title and creator and origin
        assert (stated_creator, stated_licence) == (creator, licence)
        assert licence in make_demo.LICENCES


def test_licence_links_are_given():
    text = (DEMO / "ATTRIBUTION.md").read_text("utf-8")
    assert all(name in text and link in text for name, link in make_demo.LICENCES.values())


def test_readme_gives_the_counts(pack):
    text = (DEMO / "README.md").read_text("utf-8")
    assert f"{len(pack['ids'])} furniture models" in text
    sizes = [np.bincount(read_split(split)[1][:, 0]) for split in ("train", "test")]
    for name, train, test in zip(class_names(), *sizes, strict=True):
        assert f"| {name} | {train} | {test} |" in text


def test_files_are_small_enough_to_commit():
    sizes = {path: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert max(sizes.values()) <= 4_000_000
    mine = [s for p, s in sizes.items() if p.parent.name == "demo_hdf5" or p.name.startswith("shapenet_render")]
    assert sum(mine) <= 13_000_000
    assert sum(sizes.values()) <= 24_000_000


# ----------------------------------------------------------------------------------------------------- the script

CUBE_CORNERS = [(x, y, z) for x in (0, 2) for y in (0, 1) for z in (0, 1)]
CUBE_FACES = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]


def write_library(path, models):
    """Write a furniture library of boxes of two materials and sheets without thickness.

    ``models``: id -> name, mesh, and width, height and depth in cm; the first one is turned.
    """
    box = "mtllib box.mtl\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in CUBE_CORNERS)
    box += "usemtl red\n" + "".join(f"f {face}\n" for face in CUBE_FACES[:3])
    box += "usemtl blue paint\n" + "".join(f"f {face}\n" for face in CUBE_FACES[3:])
    sheet = "".join(f"v {x} 0 {z}\n" for x, z in ((0, 0), (1, 0), (1, 1), (0, 1))) + "f 1 2 3 4\n"
    catalogue = ["# comment", "modelRotation#1=0 -1 0 1 0 0 0 0 1"]
    for number, (key, (name, mesh, (width, height, depth))) in enumerate(models.items(), 1):
        catalogue += [f"id#{number}=Kator Legaz#{key}", f"name#{number}={name}", f"category#{number}=Living room"]
        catalogue += [f"model#{number}=/m/{mesh}.obj", f"creator#{number}=Someone"]
        catalogue += [f"width#{number}={width}", f"height#{number}={height}", f"depth#{number}={depth}"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(make_demo.CATALOGUE, "\n".join(catalogue))
        archive.writestr("m/box.obj", box)
        archive.writestr("m/box.mtl", "newmtl red\nKd 1 0 0\nnewmtl blue paint\nKd 0 0 1\nd 0.5\n")
        archive.writestr("m/sheet.obj", sheet)
    return path


@pytest.fixture
def library(tmp_path):
    """Return a furniture library with a box and a sheet."""
    models = {"box": ("B\\u00f6x", "box", (40, 80, 20)), "sheet": ("Sheet", "sheet", (40, 80, 20))}
    return write_library(tmp_path / "KatorLegaz.sh3f", models)


def test_catalogue_is_read(library):
    box, sheet = make_demo.read_catalogue(library)
    assert (box.name, box.creator, box.licence) == ("B\u00f6x", "Someone", "CC-BY-3.0-US")
    assert box.id == "living_room/katorlegaz-box"
    assert box.size_cm == (40, 80, 20)
    assert sheet.rotation is None and len(box.rotation) == 9


def test_mesh_is_turned_and_scaled_to_the_catalogue_size(library):
    box = make_demo.read_catalogue(library)[0]
    with zipfile.ZipFile(library) as archive:
        mesh = make_demo.place(make_demo.read_model(archive, box.obj), box)
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    np.testing.assert_allclose(low, [-0.2, 0, -0.1], atol=1e-12)
    np.testing.assert_allclose(high, [0.2, 0.8, 0.1], atol=1e-12)
    assert len(mesh.triangles) == 12


def test_points_lie_on_the_surface_with_the_color_of_their_face(library):
    box = make_demo.read_catalogue(library)[0]
    with zipfile.ZipFile(library) as archive:
        mesh = make_demo.place(make_demo.read_model(archive, box.obj), box)
    points, color, material, _ = make_demo.sample_surface(mesh, 2000, seed=3)
    on_side = np.isclose(np.abs(points - [0, 0.4, 0]), [0.2, 0.4, 0.1], atol=1e-9).any(1)
    assert on_side.all()
    names = np.asarray([m.name for m in mesh.materials])[material]
    assert (color[names == "red"] == [255, 0, 0]).all() and (color[names == "blue paint"] == [0, 0, 255]).all()
    large = np.isclose(np.abs(points[:, 2]), 0.1).mean()
    assert large == pytest.approx(2 * 0.32 / (2 * (0.32 + 0.16 + 0.08)), abs=0.05), "even by area"
    again = make_demo.sample_surface(mesh, 2000, seed=3)[0]
    np.testing.assert_array_equal(points, again)


def test_flat_model_is_left_out(library):
    sheet = make_demo.read_catalogue(library)[1]
    with zipfile.ZipFile(library) as archive:
        mesh = make_demo.read_model(archive, sheet.obj)
    with pytest.raises(make_demo.SkippedModelError, match="flat"):
        make_demo.place(mesh, sheet)


def test_quantizing_rounds_by_less_than_the_jitter():
    points = np.random.default_rng(0).uniform(-1, 1, (100, 3))
    back = make_demo.quantize(points) * make_demo.POINT_SCALE + make_demo.POINT_OFFSET
    np.testing.assert_allclose(back, points, atol=1.3e-4)


def test_encoded_view_keeps_shape_and_colors():
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[4:12, 4:12] = (200, 30, 40, 255)
    picture[4:12, 8:12] = (20, 90, 240, 255)
    decoded = np.asarray(Image.open(io.BytesIO(make_demo.encode_view(picture, 8))).convert("RGBA"))
    np.testing.assert_array_equal(decoded, picture)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("scopia-little_lamp1", "scopia-little_lamp3", True),
        ("scopia-window_2x3", "scopia-window_2x3_arched", True),
        ("katorlegaz-concept_sedan_01v1", "katorlegaz-concept_sedan_01v2", True),
        ("scopia-window_2x3", "scopia-window_2x4", False),
        ("scopia-chair", "katorlegaz-chair", False),
    ],
)
def test_family_of_variants(first, second, same):
    families = {make_demo.family(SimpleNamespace(key=key, creator="c")) for key in (first, second)}
    assert (len(families) == 1) is same


def test_split_keeps_variants_and_twins_together():
    rng = np.random.default_rng(0)

    def shape(seed):
        draw = np.random.default_rng(seed)
        basis = np.random.default_rng(seed // 10).normal(size=(3, 3))
        cloud, other = (draw.normal(size=(300, 3)) @ basis for _ in range(2))
        return SimpleNamespace(points=cloud, svm_points=other)

    keys = ["a1", "a2", "b", "c", "d", "e", "f", "g"]
    models = [SimpleNamespace(key=f"lib-{key}", creator="x") for key in keys]
    shapes = [shape(seed) for seed in (10, 20, 30, 31, 40, 50, 60, 70)]  # b and c: two draws of one surface
    sides = [make_demo.split_class(models, shapes, test_fraction=0.4, rng=rng) for _ in range(20)]
    assert all(side[0] == side[1] and side[2] == side[3] for side in sides)
    assert all(2 <= side.sum() <= 3 for side in sides)
    assert len({tuple(side) for side in sides}) > 3


def test_missing_source_names_the_package(tmp_path):
    with pytest.raises(DataError, match="sweethome3d-furniture"):
        make_demo.main(["--source", str(tmp_path), "--out", str(tmp_path / "out")])


def test_library_of_unknown_licence_is_refused(tmp_path):
    path = tmp_path / "Mine.sh3f"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="license is not known"):
        make_demo.main(["--source", str(path), "--out", str(tmp_path / "out")])


def test_broken_library_is_named(tmp_path):
    path = tmp_path / "Scopia.sh3f"
    path.write_bytes(b"no zip file")
    with pytest.raises(DataError, match="Scopia.sh3f is not a furniture library"):
        make_demo.main(["--source", str(path), "--out", str(tmp_path / "out")])


def test_a_packed_file_of_the_user_is_not_overwritten(library, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with h5py.File(out / "shapenet_render.h5", "w") as file:
        file.attrs["source"] = "ShapeNet"
    with pytest.raises(UserError, match="is not a demo set"):
        make_demo.main(["--source", str(library), "--out", str(out)])
    with h5py.File(out / "shapenet_render.h5") as file:
        assert file.attrs["source"] == "ShapeNet"


@needs_opengl
def test_the_command_makes_a_set_that_the_readers_take(tmp_path, monkeypatch, capsys):
    def one_thread(workers, context, start, arguments):
        return ThreadPoolExecutor(1, initializer=start, initargs=arguments)

    monkeypatch.setattr(make_demo, "_renderer", None)
    monkeypatch.setattr(make_demo, "worker_pool", one_thread)  # a fresh process would first import everything
    monkeypatch.setattr(make_demo, "CLASSES", {"flat": ({"Slab", "Board"}, set()), "tall": ({"Tower", "Post"}, set())})
    sizes = {"Slab": (80, 10, 80), "Board": (90, 4, 30), "Tower": (20, 90, 20), "Post": (20, 90, 4)}
    models = {name.lower(): (name, "box", size) for name, size in sizes.items()} | {
        "mat": ("Mat", "sheet", (40, 80, 20))
    }
    source = write_library(tmp_path / "KatorLegaz.sh3f", models)
    content = ["--points", "64", "--views", "1", "--size", "24", "--colours", "8", "--test_fraction", "0.5"]
    counts = make_demo.main(["--source", str(source), "--out", str(tmp_path / "out"), *content])
    assert (counts["models"], counts["left_out"], counts["classes"]) == (4, 1, {"flat": (1, 1), "tall": (1, 1)})
    assert "left out: living_room/katorlegaz-mat: flat" in capsys.readouterr().out
    pairs = ShapeNetRender(tmp_path / "out", strict=True)
    assert pairs.ids == sorted(f"living_room/katorlegaz-{name.lower()}" for name in sizes)
    assert pairs[0]["points"].shape == (64, 3) and pairs.cloud_size == 64
    picture = Image.open(io.BytesIO(pairs.source.image_file(0, 0)))
    assert picture.size == (24, 24) and len(picture.getcolors()) <= 8
    labeled = [open_classification_set("demo", tmp_path / "out", split) for split in ("train", "test")]
    assert [(len(part), part.class_names) for part in labeled] == [(2, ("flat", "tall"))] * 2
    assert " ".join(content) in (tmp_path / "out" / "README.md").read_text()
    before = contents(tmp_path / "out")
    write_library(source, {"tower": models["tower"]})
    with pytest.raises(DataError, match="class flat has 0 models; are all libraries in --source?"):
        make_demo.main(["--source", str(source), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == before


FURNITURE = Path(os.environ.get("CROSSNET_FURNITURE", "/usr/share/sweethome3d/furniture"))


@needs_opengl
@pytest.mark.skipif(
    not FURNITURE.is_dir(), reason=f"{FURNITURE} is not there (Debian: sweethome3d-furniture, or CROSSNET_FURNITURE)"
)
def test_the_committed_set_is_what_the_script_makes(pack, monkeypatch):
    """Clouds and views of a few models, made again, are the committed ones."""
    models = [model for library in make_demo.find_libraries(FURNITURE) for model in make_demo.read_catalogue(library)]
    ids = list(pack["ids"])
    chosen = [model for model in sorted(models, key=lambda model: model.id) if model.id in ids][::200]
    assert len(chosen) == 5
    make_demo._make_renderer(make_demo.Content().size)
    different = []
    for model in chosen:
        shape, i = make_demo.build_shape((model, 1, 1024, 2, 64)), ids.index(model.id)
        stored = make_demo.quantize(shape.points) * make_demo.POINT_SCALE + make_demo.POINT_OFFSET
        np.testing.assert_array_equal(stored, pack["points"][i])
        for j, view in zip(range(*pack["view_offset"][i : i + 2]), shape.views, strict=True):
            committed = pack["image_bytes"][slice(*pack["image_offset"][j : j + 2])].tobytes()
            pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), float) for data in (committed, view)]
            different.append(np.abs(pictures[0] - pictures[1]).mean())
    monkeypatch.setattr(make_demo, "_renderer", None)
    # Another version of Mesa may round a pixel differently, and the palette may then differ.
    assert max(different) < 2, different
