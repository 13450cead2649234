"""A user's meshes and clouds become pairs for pretraining and labeled clouds for the SVM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import trimesh
from PIL import Image

from data import prepare_meshes
from data.pair_folder import PairFolder, PairSettings, make_pair
from data.prepare_meshes import main
from data.rendering import Mesh, Renderer
from data.shape_files import find_shapes, read_labels, split_shapes
from datasets import ShapeNetRender
from datasets.untrusted import read_ply
from downstream.classification.main import main as svm
from tests.support.opengl import needs_opengl
from tests.support.paths import ROOT
from utils.errors import DataError, UserError

SMALL = ["--num_points", "64", "--views", "2", "--image_size", "16", "--workers", "1"]


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
    (folder / "box" / "notes.txt").write_text("not a mesh")
    (folder / "box" / "._a.off").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other disks
    np.save(folder / "pair" / "cloud.npy", np.random.default_rng(0).normal(size=(40, 3)))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Make pairs in this process: starting another one takes a second, and one test covers it."""

    class Here:
        def __init__(self, workers, context, start, arguments):
            start(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            prepare_meshes._worker = None

        def submit(self, work, shape):
            future = prepare_meshes.Future()
            try:
                future.set_result(work(shape))
            except Exception as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(prepare_meshes, "worker_pool", Here)


def convert(meshes, *words, small=SMALL):
    out = meshes.parent / "out"
    return out, main(["--meshes", str(meshes), "--out", str(out), *small, *words])


def content(out):
    """Every file below a folder with its bytes, without the records (they hold times)."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".jsonl"}


def clouds_in(out):
    return {str(p.relative_to(out / "ShapeNet")): read_ply(p) for p in (out / "ShapeNet").rglob("*.ply")}


NAMES = {"box/a", "box/train-b", "box/c", "00000000/d", "pair/two", "pair/cloud"}


@needs_opengl
def test_every_format_becomes_a_pair_that_pretraining_reads(meshes):
    """The command itself, with its processes."""
    out = meshes.parent / "out"
    words = ["--meshes", str(meshes), "--out", str(out), *SMALL[:-1], "2", "--json", str(out / "counts.json")]
    result = subprocess.run(
        [sys.executable, "data/prepare_meshes.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "counts.json").read_text())
    assert (report["written"], report["kept"], report["skipped"]) == (6, 0, [])
    assert report["noted"] == [f"{meshes}/pair/cloud.npy: it has 40 points, so some repeat"]
    dataset = ShapeNetRender(out)
    assert set(dataset.ids) == NAMES and not dataset.skipped and dataset.cloud_size == 64
    for name in NAMES:
        cloud = read_ply(out / "ShapeNet" / f"{name}.ply")
        np.testing.assert_allclose(cloud.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(cloud, axis=1).max(), 1, rtol=1e-5)
        views = out / "ShapeNetRendering" / name / "rendering"
        assert sorted(os.listdir(views)) == ["00.png", "01.png", "cameras.json"]
        cameras = json.loads((views / "cameras.json").read_text())
        for file, camera in zip(("00.png", "01.png"), cameras, strict=True):
            picture = Image.open(views / file)
            assert picture.size == (16, 16) and picture.mode == "RGBA"
            assert 25 <= camera["elevation"] <= 30 and 0 <= camera["azimuth"] < 360
            # The matrix takes the cloud to the picture: its points are where the picture is not transparent.
            clip = np.c_[cloud, np.ones(64)] @ np.transpose(camera["matrix"])
            x, y = (clip[:, :2] / clip[:, 3:]).T
            assert max(np.abs(x).max(), np.abs(y).max()) < 1
            solid = np.asarray(picture)[((1 - y) * 8).astype(int), ((1 + x) * 8).astype(int), 3] > 0
            assert solid.mean() > (0.9 if name != "pair/two" else 0.7)  # two boxes a pixel wide and far apart
    # The glb holds two boxes, nine apart and two wide: the parts of a scene stay where they are.
    assert np.diff(np.sort(read_ply(out / "ShapeNet/pair/two.ply")[:, 0])).max() > 1


@needs_opengl
def test_a_pair_is_a_function_of_its_name_and_settings_alone(meshes, in_process):
    out, _ = convert(meshes)
    first = content(out)
    (meshes / "d.stl").unlink()
    trimesh.creation.box().export(meshes / "box" / "0.off")
    again = content(convert(meshes, "--overwrite")[0])
    for name, data in first.items():
        if name.startswith("ShapeNet"):
            assert again[name] == data
    other = content(convert(meshes, "--overwrite", "--seed", "2")[0])
    for name in ("ShapeNet/box/a.ply", "ShapeNetRendering/box/a/rendering/00.png"):
        assert other[name] != first[name]
    assert first["ShapeNet/box/a.ply"] != first["ShapeNet/box/c.ply"]


@needs_opengl
def test_a_stopped_run_continues_and_ends_as_if_it_had_not_stopped(meshes, in_process, monkeypatch):
    out, _ = convert(meshes)
    whole = content(out)
    for file in sorted(out.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()

    real, made = prepare_meshes.make_pair, []

    def stop_after_three(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(prepare_meshes, "make_pair", stop_after_three)
    monkeypatch.setattr(prepare_meshes, "_QUEUE", 1)
    with pytest.raises(KeyboardInterrupt):
        convert(meshes)
    assert 0 < len(clouds_in(out)) < 6
    # What a killed process leaves: a picture without the rest, half a line in the records.
    half = out / "ShapeNetRendering" / "pair" / "two" / "rendering" / "00.png.tmp"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    with open(out / "prepared_files.jsonl", "a") as file:
        file.write('{"name": "pair/tw')
    monkeypatch.setattr(prepare_meshes, "make_pair", real)
    _, report = convert(meshes)
    assert report["written"] + report["kept"] == 6 and report["kept"] >= 2
    assert content(out) == whole
    assert convert(meshes)[1]["kept"] == 6


@needs_opengl
def test_pairs_of_other_settings_are_refused_and_overwrite_makes_them_again(meshes, in_process):
    out, _ = convert(meshes)
    before = content(out)
    for words, message in [
        (["--up", "z"], "--up y, now z"),
        (["--seed", "9"], "--seed 1, now 9"),
        (["--num_points", "32"], "--num_points 64, now 32"),
        (["--views", "3"], "--views 2, now 3"),
        (["--image_size", "8"], "--image_size 16, now 8"),
        (["--remove_interior"], "--remove_interior False, now True"),
    ]:
        with pytest.raises(UserError, match=f"made with {message}.*--overwrite"):
            convert(meshes, *words)
        assert content(out) == before
    _, report = convert(meshes, "--views", "1", "--overwrite")
    assert report["written"] == 6 and report["kept"] == 0
    assert sorted(os.listdir(out / "ShapeNetRendering/box/a/rendering")) == ["00.png", "cameras.json"]
    assert convert(meshes, "--views", "1")[1]["kept"] == 6


@needs_opengl
def test_an_interrupted_overwrite_is_continued_and_leaves_no_old_pair(meshes, in_process, monkeypatch):
    out, _ = convert(meshes)
    wanted = content(convert(meshes, "--seed", "2", "--overwrite")[0])
    convert(meshes, "--overwrite")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_meshes, "_start_worker", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(meshes, "--seed", "2", "--overwrite")
    assert convert(meshes, "--seed", "2")[1]["kept"] == 0
    assert content(out) == wanted


@needs_opengl
def test_a_file_that_changed_or_a_pair_that_is_damaged_is_made_again(meshes, in_process):
    out, _ = convert(meshes)
    box = trimesh.creation.box(extents=(1, 5, 1))
    box.export(meshes / "box" / "a.off")
    os.utime(meshes / "box" / "a.off", ns=(1, 1))
    (out / "ShapeNet/box/c.ply").unlink()
    (out / "ShapeNetRendering/pair/two/rendering/01.png").unlink()
    _, report = convert(meshes)
    assert (report["written"], report["kept"]) == (3, 3)
    assert np.ptp(read_ply(out / "ShapeNet/box/a.ply")[:, 1]) > 1.5
    # A file that broke takes its old pair with it.
    (meshes / "box" / "a.off").write_text("OFF\n")
    _, report = convert(meshes)
    assert len(report["skipped"]) == 1 and not (out / "ShapeNet/box/a.ply").exists()
    assert "box/a" not in ShapeNetRender(out).ids


@needs_opengl
def test_clouds_and_pictures_of_others_are_not_replaced(meshes, in_process):
    out = meshes.parent / "out"
    picture = out / "ShapeNetRendering" / "box" / "a" / "rendering" / "00.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGBA", (8, 8)).save(picture)
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="00.png comes from another renderer.*--views 0"):
            convert(meshes, *words)
    assert Image.open(picture).size == (8, 8) and not (out / "prepared.json").exists()
    _, report = convert(meshes, "--views", "0")
    assert report["written"] == 6 and ShapeNetRender(out).ids == ["box/a"]
    # A cloud of unknown settings.
    (out / "prepared.json").unlink()
    (out / "prepared_files.jsonl").unlink()
    with pytest.raises(UserError, match="its settings are not known.*--overwrite"):
        convert(meshes, "--views", "0")
    assert convert(meshes, "--views", "0", "--overwrite")[1]["written"] == 6


def test_clouds_alone_need_no_opengl(meshes, in_process, monkeypatch):
    def fail(*_):
        raise UserError("no OpenGL here")

    monkeypatch.setattr(prepare_meshes, "create_context", fail)
    monkeypatch.setattr(prepare_meshes, "Renderer", fail)
    with pytest.raises(UserError, match="no OpenGL here"):
        convert(meshes)
    assert not (meshes.parent / "out").exists()
    out, report = convert(meshes, "--views", "0")
    assert report["written"] == 6 and not (out / "ShapeNetRendering").exists()
    assert convert(meshes, "--views", "0")[1]["kept"] == 6


def test_a_linked_folder_is_a_category(meshes, in_process):
    (meshes / "linked").symlink_to(Path("..") / "elsewhere")
    (meshes.parent / "elsewhere").mkdir()
    trimesh.creation.box().export(meshes.parent / "elsewhere" / "e.off")
    out, report = convert(meshes, "--views", "0")
    assert report["written"] == 7 and (out / "ShapeNet" / "linked" / "e.ply").is_file()


@pytest.mark.parametrize("up", ["y", "z"])
def test_z_up_is_turned_to_y_up_without_mirroring(up):
    tripod = Mesh.from_triangles([[0, 0, 0], [1, 0, 0], [0, 0, 5.0]], [[0, 1, 2]])
    points = make_pair(tripod, "a/b", PairSettings(num_points=500, views=0, up=up), None).points
    tall = {"y": 2, "z": 1}[up]
    assert np.ptp(points, axis=0).argmax() == tall and np.ptp(points[:, tall]) > 3 * np.ptp(points[:, 0])
    # The long end is thin, and on top where z is up; (x, y, z) -> (x, z, -y) keeps it from being a mirror image.
    assert points[:, tall].max() > -points[:, tall].min()


@needs_opengl
def test_the_interior_can_be_left_out(tmp_path):
    inner = trimesh.creation.box(extents=(0.5, 0.5, 0.5))
    mesh = trimesh.util.concatenate([trimesh.creation.box(), inner])
    shape = Mesh.from_triangles(mesh.vertices, mesh.faces)
    near = {}
    with Renderer(16) as renderer:
        for remove in (False, True):
            points = make_pair(shape, "a/b", PairSettings(num_points=400, remove_interior=remove), renderer).points
            near[remove] = (np.abs(points).max(1) < 0.4).mean()
    assert near[False] > 0.1 and near[True] == 0


# ------------------------------------------------------------------------------------------------- names and labels


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_shapenet_core_gives_its_own_names(tmp_path):
    touch(tmp_path, "02691156/abc/models/model_normalized.obj", "02691156/abc/models/model_normalized.mtl")
    touch(tmp_path, "02958343/def/model.obj", "02691156/abc/images/texture0.jpg")
    assert [shape.name for shape in find_shapes(tmp_path)] == ["02691156/abc", "02958343/def"]
    # One synset alone keeps its name; a folder of any other name does not become a category.
    assert [shape.name for shape in find_shapes(tmp_path / "02691156")] == ["02691156/abc"]
    (tmp_path / "02691156").rename(tmp_path / "planes")
    assert [shape.name for shape in find_shapes(tmp_path / "planes")] == ["00000000/abc"]
    # In any other layout, a file that happens to be called model.obj is a file like others.
    touch(tmp_path / "others", "chairs/model.obj")
    assert [shape.name for shape in find_shapes(tmp_path / "others")] == ["chairs/model"]


def test_splits_come_from_folders_inside_or_outside_of_the_category(tmp_path):
    touch(tmp_path / "inside", "bed/train/1.off", "bed/test/2.off")
    touch(tmp_path / "outside", "train/bed/1.off", "test/bed/1.off")
    for name, ids in (("inside", ["test-2", "train-1"]), ("outside", ["test-1", "train-1"])):
        shapes = find_shapes(tmp_path / name)
        assert [shape.name for shape in shapes] == [f"bed/{i}" for i in ids]
        sides = split_shapes(shapes, test_fraction=0.5, seed=1)
        assert {side: [shape.id for shape in chosen] for side, chosen in sides.items()} == {
            "train": ids[1:],
            "test": ids[:1],
        }


def test_the_split_keeps_a_share_of_each_category_for_testing(tmp_path):
    touch(tmp_path, *[f"a/{i}.off" for i in range(10)], *[f"b/{i}.off" for i in range(2)], "lonely/0.off", "x.off")
    sides = split_shapes(find_shapes(tmp_path), test_fraction=0.3, seed=1)
    sizes = {side: sorted(shape.category for shape in chosen) for side, chosen in sides.items()}
    assert sizes == {"train": ["a"] * 7 + ["b"], "test": ["a"] * 3 + ["b"]}
    names = {side: {shape.name for shape in chosen} for side, chosen in sides.items()}
    assert names != {
        side: {s.name for s in chosen}
        for side, chosen in split_shapes(find_shapes(tmp_path), test_fraction=0.3, seed=2).items()
    }


CLA = "PSB 1\n3 4\n\nanimal 0 0\n\nbiped animal 2\n12\n7\n\nplane 0 2\n3\n100\n\n"


def test_labels_of_the_princeton_shape_benchmark(tmp_path):
    folder = touch(tmp_path / "psb", "db/0/m12/m12.off", "db/0/m7/m7.off", "db/0/m3/m3.off", "db/1/m100/m100.off")
    touch(folder, "db/1/m101/m101.off")
    (tmp_path / "base_train.cla").write_text(CLA)
    (tmp_path / "base_test.cla").write_text("PSB 1\n1 1\n\nplane 0 1\n101\n")
    shapes = find_shapes(folder, [tmp_path / "base_train.cla", tmp_path / "base_test.cla"])
    assert {shape.path.stem: (shape.category, shape.split) for shape in shapes} == {
        "m12": ("biped", "train"),
        "m7": ("biped", "train"),
        "m3": ("plane", "train"),
        "m100": ("plane", "train"),
        "m101": ("plane", "test"),
    }


def test_labels_of_a_list_by_path_name_or_stem(tmp_path):
    folder = touch(tmp_path / "m", "x/one.obj", "x/two.obj", "three.stl", "four.stl")
    text = "# comment\nx/one.obj, arm chair\ntwo, table, test\nthree.stl\tlamp/desk\ttrain\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
    shapes = {shape.path.stem: shape for shape in find_shapes(folder, [tmp_path / "labels.csv"])}
    assert shapes["one"].name == "arm_chair/x-one" and shapes["one"].split is None
    assert (shapes["two"].category, shapes["two"].split) == ("table", "test")
    assert (shapes["three"].category, shapes["three"].split) == ("lamp_desk", "train")
    assert (shapes["four"].category, shapes["four"].labeled) == ("00000000", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no labels"),
        ("one\n", "line 1: expected 'name category'"),
        ("one chair valid\n", "line 1: expected 'name category'"),
        (CLA[:-8], "truncated"),
        (CLA.replace("3 4", "3 5"), "promises 5 models and lists 4"),
    ],
)
def test_a_label_file_that_is_not_as_described_is_named(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=f"labels.txt.*{message}"):
        read_labels(tmp_path / "labels.txt")


def test_labels_that_name_nothing_or_disagree_are_errors(tmp_path):
    folder = touch(tmp_path / "m", "one.obj")
    (tmp_path / "a.txt").write_text("two chair\n")
    with pytest.raises(DataError, match="names none of the files"):
        find_shapes(folder, [tmp_path / "a.txt"])
    (tmp_path / "b.txt").write_text("two table\n")
    with pytest.raises(DataError, match="b.txt gives two the label table, another file chair"):
        find_shapes(folder, [tmp_path / "a.txt", tmp_path / "b.txt"])
    with pytest.raises(DataError, match="cannot read the labels"):
        find_shapes(folder, [tmp_path / "none.txt"])


@needs_opengl
def test_categories_make_a_labeled_set_that_the_svm_reads(tmp_path, in_process, capsys):
    folder = tmp_path / "meshes"
    for i in range(5):
        for name, extents in (("flat", (2, 0.1, 2)), ("tall", (0.2, 3 + i, 0.2))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            trimesh.creation.box(extents=extents).export(folder / name / f"{i}.off")
    (folder / "lone").mkdir()
    trimesh.creation.box().export(folder / "lone" / "0.off")
    out, report = convert(folder, "--test_fraction", "0.4")
    assert report["classes"] == {"flat": (3, 2), "tall": (3, 2)}
    assert "left out there: lone\n" in capsys.readouterr().out
    with h5py.File(out / "labeled_hdf5" / "ply_data_test0.h5") as file:
        assert file["data"].shape == (4, 64, 3) and sorted(file["label"][:, 0]) == [0, 0, 1, 1]
        name = file["ids"].asstr()[0]
        np.testing.assert_array_equal(file["data"][0], read_ply(out / "ShapeNet" / f"{name}.ply"))
    words = ["--dataset", "folder", "--data_root", str(out / "labeled_hdf5"), "--random_init", "--num_points", "32"]
    result = svm([*words, "--k", "4", "--emb_dims", "16", "--device", "cpu", "--json", str(tmp_path / "svm.json")])
    assert result and json.loads((tmp_path / "svm.json").read_text())


# ------------------------------------------------------------------------------------------------------- bad folders

BAD = {
    "empty.off": "",
    "truncated.off": "OFF\n4 2 0\n0 0 0\n1 0 0\n",
    "index.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    "nan.off": "OFF\n3 1 0\n0 0 0\n1 0 nan\n0 1 0\n3 0 1 2\n",
    "flat.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n",
    "points.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\n",
    "noise.glb": "glTF, not really",
    "short.xyz": "0 0 0\n1 1 1\n2 2",
}


def test_bad_files_are_counted_with_their_reason_and_the_others_converted(meshes, in_process, capsys):
    for name, text in BAD.items():
        (meshes / "box" / name).write_text(text)
    out, report = convert(meshes, "--views", "0")
    assert report["written"] == 6 and len(report["skipped"]) == len(BAD)
    printed = capsys.readouterr().out
    table = [line.split("\t") for line in (out / "prepared_report.tsv").read_text().splitlines()]
    refused = {Path(file).name: reason for file, result, reason in table[1:] if result == "left out"}
    assert refused.keys() == BAD.keys()
    assert all(name in printed for name in BAD)
    assert "promises 4 vertices and 2 faces and holds 2 and 0" in refused["truncated.off"]
    assert "vertex 7, the file has 0 to 2" in refused["index.off"]
    # They are tried again, since a missing package may have been the reason, and what is there is kept.
    assert convert(meshes, "--views", "0")[1]["kept"] == 6


def test_pairs_below_the_meshes_are_not_read_as_meshes(meshes, in_process, monkeypatch):
    monkeypatch.chdir(meshes)
    for kept in (0, 6):
        report = main(["--meshes", str(meshes), "--out", "mine", *SMALL, "--views", "0"])
        assert (report["written"], report["kept"]) == (6 - kept, kept)


def test_nothing_usable_or_two_of_one_name_is_an_error(tmp_path, meshes, in_process):
    with pytest.raises(DataError, match="is not a folder"):
        convert(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no mesh or cloud below"):
        convert(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "flat.off").write_text(BAD["flat.off"])
    with pytest.raises(DataError, match="none of the 1 files"):
        convert(tmp_path / "bad", "--views", "0")
    strange = meshes / "box" / os.fsdecode(b"\xff.off")
    strange.write_text((meshes / "box" / "a.off").read_text())
    with pytest.raises(DataError, match="its name is not UTF-8. Rename it"):
        convert(meshes, "--views", "0")
    strange.unlink()
    (meshes / "box" / "A.off").write_text((meshes / "box" / "a.off").read_text())  # one name on macOS and Windows
    with pytest.raises(DataError, match="would both become box/"):
        convert(meshes, "--views", "0")


def test_pairs_of_files_that_moved_are_named_and_stay(meshes, in_process, capsys):
    convert(meshes, "--views", "0")
    (meshes / "box").rename(meshes / "crate")
    out, report = convert(meshes, "--views", "0")
    assert report["earlier"] and all(name.startswith("box/") for name in report["earlier"])
    assert f"also holds {len(report['earlier'])} pairs of earlier calls" in capsys.readouterr().out
    assert (out / "ShapeNet" / f"{report['earlier'][0]}.ply").is_file()


def test_an_unwritable_place_is_an_error(meshes, in_process):
    (meshes.parent / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot (write|read)"):
        convert(meshes, "--views", "0")


def test_settings_of_another_version_are_refused(tmp_path):
    (tmp_path / "prepared.json").write_text('{"format": "crossnet-prepared", "version": 9, "settings": {}}')
    with pytest.raises(UserError, match="another version.*--overwrite"):
        PairFolder(tmp_path, PairSettings(), overwrite=False)


def test_a_process_that_dies_names_the_files_it_had(meshes, in_process, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    def die(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(prepare_meshes, "make_pair", die)
    with pytest.raises(UserError, match=r"a process ended abruptly.*d\.stl.*fewer --workers"):
        convert(meshes, "--views", "0")
