"""Own meshes become clouds that the pretraining reader takes."""

import numpy as np
import pytest
import trimesh
from PIL import Image

from data.prepare_meshes import load_mesh, main, sample_cloud
from datasets import ShapeNetRender
from datasets.untrusted import read_ply
from utils.errors import DataError, UserError


@pytest.fixture
def meshes(tmp_path):
    """Boxes in every format, in folders of one, two and no level."""
    folder = tmp_path / "meshes"
    box = trimesh.creation.box(extents=(2, 1, 1))
    for name in ("box/a.off", "box/train/b.obj", "box/c.ply", "d.stl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        box.export(folder / name)
    far = box.copy().apply_translation([9, 0, 0])
    (folder / "pair").mkdir()
    trimesh.Scene([box, far]).export(folder / "pair" / "two.glb")
    (folder / "box" / "notes.txt").write_text("no mesh")
    return folder


def convert(meshes, *words):
    out = meshes.parent / "out"
    return out, main(["--meshes", str(meshes), "--out", str(out), "--num_points", "64", *words])


def clouds_in(out):
    return {str(p.relative_to(out / "ShapeNet")): read_ply(p) for p in (out / "ShapeNet").rglob("*.ply")}


def test_every_format_becomes_a_centered_cloud_in_the_unit_sphere(meshes):
    out, report = convert(meshes)
    assert report == {"written": 5, "kept": 0, "skipped": []}
    clouds = clouds_in(out)
    assert clouds.keys() == {"box/a.ply", "box/train-b.ply", "box/c.ply", "00000000/d.ply", "pair/two.ply"}
    for cloud in clouds.values():
        assert cloud.shape == (64, 3)
        np.testing.assert_allclose(cloud.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(cloud, axis=1).max(), 1, rtol=1e-5)
    # The glb holds two boxes, nine apart and two wide: the parts of a scene stay where they stand.
    assert np.diff(np.sort(clouds["pair/two.ply"][:, 0])).max() > 1


def test_the_files_are_what_the_pretraining_reader_takes(meshes):
    out, _ = convert(meshes)
    view = out / "ShapeNetRendering" / "box" / "a" / "rendering" / "00.png"
    view.parent.mkdir(parents=True)
    Image.new("RGBA", (8, 8)).save(view)
    dataset = ShapeNetRender(out)
    assert dataset.ids == ["box/a"] and len(dataset.skipped) == 4 and dataset.cloud_size == 64


def test_points_lie_on_the_surface_and_are_spread_by_area():
    # Far more and finer triangles on one of two equal boxes must not draw more points there.
    fine = trimesh.creation.box().subdivide().subdivide()
    coarse = trimesh.creation.box().apply_translation([5, 0, 0])
    cloud = sample_cloud(trimesh.util.concatenate([fine, coarse]), 4000, seed=0)
    assert abs((cloud[:, 0] > 0).mean() - 0.5) < 0.05
    # Each of the points of a box lies on one of its faces, wherever centring and scaling put them.
    cloud = sample_cloud(trimesh.creation.box(extents=(2, 1, 1)), 1000, seed=0)
    low, high = cloud.min(0), cloud.max(0)
    assert np.minimum(cloud - low, high - cloud).min(1).max() < 1e-6


def test_z_up_is_turned_to_y_up_without_mirroring():
    tripod = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 0, 5.0]], [[0, 1, 2]], process=False)
    y_up, z_up = (sample_cloud(tripod, 500, seed=0, up=axis) for axis in "yz")
    np.testing.assert_allclose(z_up, y_up[:, [0, 2, 1]] * [1, 1, -1], atol=1e-6)
    assert np.ptp(z_up[:, 1]) > 3 * np.ptp(z_up[:, 0])


def test_the_same_seed_gives_the_same_clouds_whatever_else_is_there(meshes):
    first = clouds_in(convert(meshes)[0])
    (meshes / "d.stl").unlink()
    trimesh.creation.box().export(meshes / "box" / "0.off")
    again = clouds_in(convert(meshes, "--overwrite")[0])
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    other = clouds_in(convert(meshes, "--overwrite", "--seed", "2")[0])
    assert not np.array_equal(first["box/a.ply"], other["box/a.ply"])
    assert not np.array_equal(first["box/a.ply"], first["box/c.ply"])


def test_clouds_that_are_there_are_kept_unless_their_size_differs(meshes):
    out, _ = convert(meshes)
    (out / "ShapeNet" / "box" / "a.ply").unlink()
    assert convert(meshes)[1] == {"written": 1, "kept": 4, "skipped": []}
    with pytest.raises(UserError, match="has 64 points, not 32"):
        convert(meshes, "--num_points", "32")
    assert convert(meshes, "--num_points", "32", "--overwrite")[1]["written"] == 5


BAD = {
    "empty.off": "",
    "truncated.off": "OFF\n4 2 0\n0 0 0\n1 0 0\n",
    "index.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    "nan.off": "OFF\n3 1 0\n0 0 0\n1 0 nan\n0 1 0\n3 0 1 2\n",
    "flat.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n",
    "points.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\n",
    "noise.glb": "glTF, not really",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mesh_is_an_error_that_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_text(BAD[name])
    with pytest.raises(DataError, match=name):
        load_mesh(path)


def test_bad_meshes_are_counted_and_the_others_converted(meshes, capsys):
    for name, text in BAD.items():
        (meshes / "box" / name).write_text(text)
    _, report = convert(meshes)
    assert report["written"] == 5 and len(report["skipped"]) == len(BAD)
    printed = capsys.readouterr().out
    assert all(name in printed for name in BAD)


def test_nothing_usable_or_two_of_one_name_is_an_error(tmp_path, meshes):
    with pytest.raises(DataError, match="is no folder"):
        convert(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no mesh below"):
        convert(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "flat.off").write_text(BAD["flat.off"])
    with pytest.raises(DataError, match="none of the 1 meshes"):
        convert(tmp_path / "bad")
    trimesh.creation.box().export(meshes / "box" / "a.ply")
    with pytest.raises(DataError, match="would both become box/a.ply"):
        convert(meshes)


def test_an_unwritable_place_is_an_error(meshes):
    (meshes.parent / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        convert(meshes)
