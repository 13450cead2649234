"""check_data reports complete, partial, missing and broken sets, and the command that fixes them."""

import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data import check_data as module
from data.check_data import check, format_table, main
from data.pair_folder import write_ply
from data.unpack import KNOWN_MD5
from datasets import pack
from datasets.shapenet_part import PartTaxonomy
from tests.support.commands import command
from tests.support.files import cut, write_h5
from tests.support.paths import DEMO
from tests.support.segmentation_sets import write_part_text, write_parts
from tests.support.shape_files import write_class_folders, write_meshes, write_point_cloud_datasets, write_resampled
from utils.errors import DataError

REAL = os.environ.get("CROSSNET_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="CROSSNET_REAL_DATA names no folder with real data")
MODELNET, PART, ROOMS = "modelnet40_ply_hdf5_2048", "shapenet_part_seg_hdf5_data", "indoor3d_sem_seg_hdf5_data"


def clouds(count, points=4, channels=3):
    return np.random.default_rng(0).random((count, points, channels), dtype=np.float32)


def add_pairs(root):
    for i in range(3):
        write_ply(root / "ShapeNet" / "02691156" / f"{i}.ply", clouds(1, 16)[0])
        view = root / "ShapeNetRendering" / "02691156" / str(i) / "rendering" / "00.png"
        view.parent.mkdir(parents=True)
        Image.new("RGBA", (4, 4)).save(view)


def add_modelnet(root, train, test):
    folder = root / MODELNET
    for split, labels in (("train", train), ("test", test)):
        write_h5(folder / f"ply_data_{split}0.h5", data=clouds(len(labels)), label=np.array(labels, "u1")[:, None])
        (folder / f"{split}_files.txt").write_text(f"data/{MODELNET}/ply_data_{split}0.h5\n")


def add_labeled(folder):
    """As data.prepare_meshes writes them."""
    for split in ("train", "test"):
        write_h5(folder / f"ply_data_{split}0.h5", data=clouds(2), label=np.arange(2))
        (folder / f"{split}_files.txt").write_text(f"{folder.name}/ply_data_{split}0.h5\n")
    (folder / "shape_names.txt").write_text("a\nb\n")


def add_part(root):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        labels = {"label": np.zeros((count, 1), "u1"), "pid": np.zeros((count, 4), "u1")}
        write_h5(root / PART / f"ply_data_{split}0.h5", data=clouds(count), **labels)
        (root / PART / f"{split}_hdf5_file_list.txt").write_text(f"ply_data_{split}0.h5\n")


def add_rooms(root, name=ROOMS, blocks=(3, 2)):
    for number, count in enumerate(blocks):
        labels = {key: np.zeros((count, 4), "u1") for key in ("label", "index")}
        write_h5(root / name / f"ply_data_all_{number}.h5", data=clouds(count, 4, 9), **labels)
    listed = [f"{ROOMS}/ply_data_all_{number}.h5\n" for number in range(len(blocks))]
    (root / name / "all_files.txt").write_text("".join(listed))
    (root / name / "room_filelist.txt").write_text("Area_1_office_1\n" * sum(blocks))


@pytest.fixture
def root(tmp_path):
    """Write a small set of every kind."""
    add_pairs(tmp_path)
    add_modelnet(tmp_path, [0, 1, 8], [39, 35])
    for split, count in (("train", 3), ("test", 2)):
        write_h5(tmp_path / "ScanObjectNN" / "main_split" / f"{split}.h5", data=clouds(count), label=np.arange(count))
    add_part(tmp_path)
    add_rooms(tmp_path)
    add_rooms(tmp_path, ROOMS + "_test", (1,))
    return tmp_path


def broken(root, **options):
    """Return the names of the broken sets, and all problems."""
    rows = check(root, **options)
    return {name for name, row in rows.items() if row.state == "broken"}, [p for r in rows.values() for p in r.problems]


def test_small_sound_sets_are_partial_with_their_counts(root):
    rows = check(root)
    assert {name: (row.state, row.found) for name, row in rows.items()} == {
        "ShapeNet pairs": ("partial", {"pairs": 3}),
        "ModelNet40": ("partial", {"train": 3, "test": 2}),
        "ModelNet10": ("partial", {"train": 2, "test": 1}),
        "ScanObjectNN OBJ_BG": ("partial", {"train": 3, "test": 2}),
        "ScanObjectNN OBJ_ONLY": ("missing", {}),
        "ScanObjectNN PB_T50_RS": ("missing", {}),
        "ShapeNetPart": ("partial", {"train": 5, "val": 2, "test": 3}),
        "S3DIS blocks": ("partial", {"blocks": 5}),
        "S3DIS whole rooms": ("ok", {"blocks": 1}),
    }
    assert rows["ModelNet40"].get == f"bash data/download_data.sh --dir {root} modelnet40"
    assert "clouds of 16 points" in rows["ShapeNet pairs"].notes
    assert rows["S3DIS whole rooms"].get == ""


def test_published_counts_are_ok_and_need_no_command(root, monkeypatch):
    monkeypatch.setattr(module, "SHAPENET_SHAPES", 3)
    monkeypatch.setattr(module.ModelNet40, "official_sizes", {"train": 3, "test": 2})
    monkeypatch.setattr(module.ModelNet10, "official_sizes", {"train": 4, "test": 1})  # a gap of up to 3 is known
    monkeypatch.setattr(module, "SCANOBJECTNN_SIZES", {"OBJ_BG": {"train": 3, "test": 2}})
    monkeypatch.setattr(module, "SHAPENETPART_SIZES", {"train": 5, "val": 2, "test": 3})
    monkeypatch.setattr(module, "S3DIS_BLOCKS", 5)
    rows = check(root)
    others = {name for name, row in rows.items() if row.state != "ok"}
    assert others == {"ScanObjectNN OBJ_ONLY", "ScanObjectNN PB_T50_RS"}
    assert all(row.get == "" for row in rows.values() if row.state == "ok")
    monkeypatch.setattr(module.ModelNet10, "official_sizes", {"train": 6, "test": 1})
    assert check(root)["ModelNet10"].state == "partial"


def test_an_empty_root_lists_every_set_with_the_command_that_gets_it(tmp_path, capsys):
    report = main(["--data_root", str(tmp_path)])
    assert report["broken"] == 0
    states = {name: row["state"] for name, row in report["sets"].items()}
    assert set(states.values()) == {"missing"}
    assert {"ShapeNet pairs", "ModelNet40", "ModelNet10", "ShapeNetPart", "S3DIS blocks"} <= set(states)
    printed = capsys.readouterr().out
    for names in ("shapenet shapenet_render", "modelnet40", "scanobjectnn", "shapenetpart", "s3dis"):
        assert f"bash data/download_data.sh --dir {tmp_path} {names} " in printed
    assert "ModelNet40, ModelNet10" in printed
    assert f"python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version --out {tmp_path} " in printed
    # Commands without a target are shell lines that can be pasted.
    assert "bash data/download_data.sh --list  " in printed


def test_half_of_the_pairs_is_named_with_the_half_that_is_missing(tmp_path):
    add_pairs(tmp_path)
    (tmp_path / "ShapeNet").rename(tmp_path / "elsewhere")
    row = check(tmp_path)["ShapeNet pairs"]
    assert row.state == "partial" and row.found == {"pairs": 0}
    assert row.get.endswith(" shapenet") and str(tmp_path / "ShapeNet") in row.notes[0]
    (tmp_path / "elsewhere").rename(tmp_path / "ShapeNet")
    (tmp_path / "ShapeNetRendering").rename(tmp_path / "elsewhere")
    assert check(tmp_path)["ShapeNet pairs"].get.endswith(" shapenet_render")


def test_clouds_without_rendering_are_counted(root):
    (root / "ShapeNetRendering" / "02691156" / "1" / "rendering" / "00.png").unlink()
    row = check(root)["ShapeNet pairs"]
    assert row.found == {"pairs": 2} and "1 clouds have no rendering, 02691156/1 for one" in row.notes


def written(**arrays):
    return lambda path: write_h5(path, **arrays)


PAIRS, ROOM_BLOCKS, WHOLE_ROOMS, OBJ_BG = "ShapeNet pairs", "S3DIS blocks", "S3DIS whole rooms", "ScanObjectNN OBJ_BG"
VIEW, SCANS = "ShapeNetRendering/02691156/2/rendering/00.png", "ScanObjectNN/main_split"
DAMAGE = {
    "truncated PLY": ("ShapeNet/02691156/1.ply", cut, {PAIRS}),
    "text for PNG": (VIEW, lambda path: path.write_text("no picture"), {PAIRS}),
    "truncated h5": (f"{MODELNET}/ply_data_test0.h5", cut, {"ModelNet40", "ModelNet10"}),
    "no label": (f"{MODELNET}/ply_data_train0.h5", written(data=clouds(3)), {"ModelNet40", "ModelNet10"}),
    "NaN": (f"{SCANS}/test.h5", written(data=clouds(2) * np.nan, label=np.zeros(2)), {OBJ_BG}),
    "label too large": (f"{SCANS}/train.h5", written(data=clouds(2), label=np.array([3, 15])), {OBJ_BG}),
    "no pid": (f"{PART}/ply_data_val0.h5", written(data=clouds(2), label=np.zeros((2, 1))), {"ShapeNetPart"}),
    "fewer labels": (
        f"{PART}/ply_data_test0.h5",
        written(data=clouds(2), label=np.zeros((1, 1)), pid=np.zeros((2, 4))),
        {"ShapeNetPart"},
    ),
    "gone but listed": (f"{PART}/ply_data_train0.h5", Path.unlink, {"ShapeNetPart"}),
    "six channels": (
        f"{ROOMS}/ply_data_all_1.h5",
        written(data=clouds(2, 4, 6), label=np.zeros((2, 4))),
        {ROOM_BLOCKS},
    ),
    "no point numbers": (
        f"{ROOMS}_test/ply_data_all_0.h5",
        written(data=clouds(1, 4, 9), label=np.zeros((1, 4))),
        {WHOLE_ROOMS},
    ),
    "empty h5": (f"{ROOMS}/ply_data_all_0.h5", lambda path: path.write_bytes(b""), {ROOM_BLOCKS}),
    "rooms cut": (f"{ROOMS}_test/room_filelist.txt", lambda path: path.write_text(""), {WHOLE_ROOMS}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_file_is_named_and_only_its_sets_are_broken(root, case):
    name, damage, sets = DAMAGE[case]
    damage(root / name)
    found, problems = broken(root)
    assert found == sets
    assert all(str(root / name) in problem for problem in problems) and problems


def test_every_broken_file_of_a_set_is_named(root):
    for split in ("train", "test"):
        cut(root / MODELNET / f"ply_data_{split}0.h5")
    (root / MODELNET / "train_files.txt").write_text("ply_data_train0.h5\nply_data_train1.h5\n")
    _, problems = broken(root)
    assert len(problems) == 2 * 3
    assert {text.split()[0].rsplit("/", 1)[-1] for text in problems} == {
        "ply_data_train0.h5",
        "ply_data_train1.h5",
        "ply_data_test0.h5",
    }


def test_checksums_are_compared_on_demand(root, monkeypatch):
    assert broken(root) == (set(), [])
    found, problems = broken(root, md5=True)
    assert found == {"ModelNet40", "ShapeNetPart"}
    assert any(KNOWN_MD5["modelnet40"]["ply_data_test0.h5"] in problem for problem in problems)
    add_modelnet(root, [1, 8], [35])  # a ModelNet10 release: no checksum is known for it
    assert broken(root, md5=True)[0] == {"ShapeNetPart"}


def test_only_a_spread_part_of_many_pairs_is_read_unless_all_are_wanted(root, monkeypatch):
    cut(root / "ShapeNet" / "02691156" / "1.ply")
    monkeypatch.setattr(module, "SAMPLED_SHAPES", 2)
    row = check(root)["ShapeNet pairs"]
    assert row.state == "partial" and "read 2 of 3 shapes; --full reads all" in row.notes
    assert check(root, full=True)["ShapeNet pairs"].state == "broken"


def test_a_packed_file_counts_as_pairs_in_a_root_and_as_a_root(root):
    packed = root / "shapenet_render.h5"
    pack.main(["--data_root", str(root), "--out", str(packed)])
    assert check(packed)["ShapeNet pairs, packed"].found == {"pairs": 3}
    assert list(check(root))[:2] == ["ShapeNet pairs, packed", "ShapeNet pairs"]
    cut(packed)
    assert broken(packed)[0] == {"ShapeNet pairs, packed"}


def test_a_missing_shard_of_a_packed_file_is_named(root):
    packed, shard = root / "shapenet_render.h5", root / "shard_0.h5"
    pack.main(["--data_root", str(root), "--out", str(packed)])
    with h5py.File(packed, "r+") as file:
        points = file["points"][()]
        del file["points"]
        write_h5(shard, points=points)
        layout = h5py.VirtualLayout(points.shape, points.dtype)
        layout[:] = h5py.VirtualSource(shard.name, "points", points.shape)
        file.create_virtual_dataset("points", layout)
    assert check(packed)["ShapeNet pairs, packed"].state == "partial"
    shard.unlink()
    found, problems = broken(packed)
    assert found == {"ShapeNet pairs, packed"} and str(shard) in problems[0]


def test_the_demo_set_of_the_repository_is_sound():
    rows = check(DEMO, full=True)
    sets = ("pairs", "labeled", "parts", "rooms, blocks", "rooms, whole")
    assert {rows[f"demo {name}"].state for name in sets} == {"ok"}
    assert rows["demo pairs"].found["pairs"] > 500
    assert rows["demo parts"].found == {"train": 240, "val": 64, "test": 96}
    assert not {"ShapeNet pairs", "ShapeNetPart", "S3DIS blocks"} & rows.keys()


def test_a_broken_part_of_the_demo_set_comes_back_from_the_repository(root):
    (root / "demo_hdf5").mkdir()
    cut(root / PART / "ply_data_test0.h5")
    row = check(root)["demo parts"]
    assert row.state == "broken" and "ply_data_test0.h5" in row.problems[0]
    assert row.get == "git checkout -- data/demo"


def test_json_holds_what_the_table_shows(root, tmp_path, capsys):
    cut(root / MODELNET / "ply_data_test0.h5")
    file = tmp_path / "report.json"
    report = main(["--data_root", str(root), "--json", str(file)])
    assert json.loads(file.read_text()) == report
    assert report["broken"] == 2 and report["sets"]["ShapeNetPart"]["found"] == {"train": 5, "val": 2, "test": 3}
    printed = capsys.readouterr().out
    assert "Broken:" in printed and "12,137 train, 1,870 val, 2,874 test" in printed
    # A file that breaks two sets is listed once.
    assert printed.split("Broken:")[1].count("ply_data_test0.h5") == 1


def test_long_lists_of_broken_files_are_cut(root):
    rows = check(root)
    rows["ModelNet40"].problems = [f"file {number}" for number in range(30)]
    text = format_table(rows)
    assert "file 19" in text and "file 20" not in text and "and 10 more" in text


def test_exit_codes_of_the_script(root):
    sound = command("data/check_data.py", "--data_root", root)
    assert sound.returncode == 0 and "ModelNet40" in sound.stdout, sound.stderr
    cut(root / MODELNET / "ply_data_test0.h5")
    bad = command("-m", "data.check_data", "--data_root", root)
    assert bad.returncode == 1 and "ply_data_test0.h5" in bad.stdout, bad.stderr
    absent = command("-m", "data.check_data", "--data_root", root / "none")
    assert absent.returncode == 2 and absent.stderr.startswith("error: ") and "Traceback" not in absent.stderr


def test_a_root_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "none")


@needs_real
def test_real_modelnet10_is_complete():
    rows = check(Path(REAL) / "modelnet10")
    assert rows["ModelNet10"].state == "ok" and rows["ModelNet10"].found == {"train": 3991, "test": 908}
    assert rows["ModelNet40"].state == "partial"
    inner = check(REAL)
    assert inner["ModelNet10 in modelnet10"].state == "ok" and "ModelNet40 in modelnet10" not in inner


@needs_real
def test_real_pairs_are_sound():
    row = check(Path(REAL) / "shapenet2k", full=True)["ShapeNet pairs"]
    assert row.state == "partial" and row.found == {"pairs": 2033} and "clouds of 2,048 points" in row.notes


def counts(rows, *names):
    return {name: (rows[name].state, rows[name].found) for name in names}


def test_every_layout_of_modelnet_is_counted(tmp_path, monkeypatch):
    write_point_cloud_datasets(tmp_path / "a")
    write_resampled(tmp_path / "b")
    write_meshes(tmp_path / "c")
    for name, layout in (("a", "HDF5 of PointCloudDatasets"), ("b", "text of"), ("c", "meshes as published")):
        rows = check(tmp_path / name)
        assert counts(rows, "ModelNet40", "ModelNet10") == {
            "ModelNet40": ("partial", {"train": 8, "test": 4}),
            "ModelNet10": ("partial", {"train": 4, "test": 2}),
        }
        assert rows["ModelNet40"].expected == {"train": 9843, "test": 2468}
        assert rows["ModelNet40"].notes[0].startswith(layout)
    monkeypatch.setattr(module, "MODELNET40_TRAIN", 8)
    monkeypatch.setattr(module.ModelNet40, "official_sizes", {"train": 5, "test": 4})
    assert all(check(tmp_path / name)["ModelNet40"].state == "ok" for name in "abc")
    # Its own files, alone.
    write_point_cloud_datasets(tmp_path / "d", "modelnet10")
    write_meshes(tmp_path / "e", "ModelNet10")
    for name in "de":
        assert check(tmp_path / name)["ModelNet10"].found == {"train": 4, "test": 2}
        assert check(tmp_path / name)["ModelNet40"].state == "missing"


def test_damaged_and_missing_files_of_the_other_layouts_are_named(tmp_path):
    write_resampled(tmp_path / "b")
    write_meshes(tmp_path / "c")
    cut(write_point_cloud_datasets(tmp_path / "a") / "train1.h5")
    (tmp_path / "b/modelnet40_normal_resampled/xbox/xbox_0001.txt").write_text("1,2\n")
    (tmp_path / "b/modelnet40_normal_resampled/xbox/xbox_0002.txt").unlink()
    cut(tmp_path / "c/ModelNet40/xbox/train/xbox_0001.off")
    expected = {
        "a": ["train1.h5"],
        "b": ["xbox_0001.txt", "1 of 8 .* missing, .*xbox_0002.txt"],
        "c": ["xbox_0001.off"],
    }
    for root, names in expected.items():
        problems = "\n".join(check(tmp_path / root)["ModelNet40"].problems)
        assert all(re.search(name, problems) for name in names), problems


def test_parts_of_point_cloud_datasets_are_counted(tmp_path):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        labels = {"label": np.zeros((count, 1), "u1"), "seg": np.zeros((count, 4), "u1")}
        write_h5(tmp_path / "shapenetpart_hdf5_2048" / f"{split}0.h5", data=clouds(count), **labels)
    row = check(tmp_path)["ShapeNetPart"]
    assert (row.state, row.found) == ("partial", {"train": 5, "val": 2, "test": 3})
    assert row.notes == ["HDF5 of PointCloudDatasets"]


TEXT_SHAPES = {
    "train": [("03797390", "m1"), ("03001627", "c1")],
    "val": [("03001627", "c2")],
    "test": [("03797390", "m2")],
}


@pytest.mark.parametrize("normals", [True, False])
def test_the_text_release_is_counted_and_read(tmp_path, normals):
    folder = tmp_path / ("shapenetcore_partanno_segmentation_benchmark_v0" + "_normal" * normals)
    names = {name for shapes in TEXT_SHAPES.values() for _, name in shapes}
    write_part_text(folder, TEXT_SHAPES, normals=names if normals else ())
    row = check(tmp_path)["ShapeNetPart"]
    assert (row.state, row.found, row.notes) == ("partial", {"train": 2, "val": 1, "test": 1}, ["text release"])
    assert row.expected["train"] == 12137 and row.get.endswith(" shapenetpart")
    broken_file = folder / "03001627" / ("c2.txt" if normals else "points_label/c2.seg")
    broken_file.write_text("1\n")
    row = check(tmp_path)["ShapeNetPart"]
    assert row.state == "broken" and str(broken_file) in row.problems[0] and len(row.problems) == 1


def test_part_data_with_tables_of_its_own_is_not_a_broken_shapenetpart(tmp_path, capsys):
    folder = write_parts(tmp_path / "hdf5")
    report = main(["--data_root", str(tmp_path / "hdf5")])
    ((name, row),) = report["sets"].items()
    assert (name, row["state"], row["expected"], row["get"]) == ("own parts", "ok", {}, "")
    assert row["found"] == {"train": 8, "val": 4, "test": 6} and row["notes"][0].startswith("2 categories and 5 parts")
    printed = capsys.readouterr().out
    assert f"main_partseg.py --data_root {tmp_path / 'hdf5'}" in printed and "download_data" not in printed
    assert list(check(folder)) == ["own parts"]  # the folder itself, too
    with h5py.File(folder / "ply_data_val0.h5", "r+") as file:
        file["pid"][0] = 9
    assert broken(tmp_path / "hdf5")[0] == {"own parts"}
    taxonomy = PartTaxonomy.build(["box", "rod"], [2, 1], synsets=["9", "8"])
    shapes = {split: [("9", split), ("8", split)] for split in ("train", "val", "test")}
    write_part_text(tmp_path / "text", shapes, taxonomy=taxonomy)
    (tmp_path / "text" / "overallid_to_catid_partid.json").write_text('[["9", 1], ["9", 2], ["8", 1]]')
    ((name, row),) = check(tmp_path / "text").items()
    assert (name, row.state, row.found) == ("own parts", "ok", {"train": 2, "val": 2, "test": 2})


def test_own_pairs_are_not_an_unfinished_shapenet(tmp_path):
    add_pairs(tmp_path / "mine")
    tmp_path /= "mine"
    for part in ("ShapeNet", "ShapeNetRendering"):
        (tmp_path / part / "02691156").rename(tmp_path / part / "lamps")
    pack.main(["--data_root", str(tmp_path), "--out", str(tmp_path.with_name("packed.h5"))])
    for root, name in ((tmp_path, "own pairs"), (tmp_path.with_name("packed.h5"), "own pairs, packed")):
        ((found, row),) = check(root).items()
        assert (found, row.state, row.found, row.get) == (name, "ok", {"pairs": 3}, "")
        assert row.use == f"python train_crossnet_con.py --data_root {root}"
    (tmp_path / "ShapeNetRendering").rename(tmp_path / "elsewhere")
    row = check(tmp_path)["own pairs"]
    assert row.state == "partial"
    assert row.get == f"python -m data.prepare_meshes --meshes {tmp_path / 'ShapeNet'} --out data/mine"
    add_labeled(tmp_path / "labeled_hdf5")
    assert list(check(tmp_path)) == ["own pairs", "own labeled clouds"]
    assert list(check(tmp_path / "labeled_hdf5")) == ["own labeled clouds"]  # not ModelNet40


def test_sets_of_ones_own_in_folders_of_the_root_are_named_with_their_command(tmp_path, capsys):
    add_pairs(tmp_path / "mine")
    add_labeled(tmp_path / "mine" / "labeled_hdf5")
    write_class_folders(tmp_path / "scans")
    pack.main(["--data_root", str(tmp_path / "mine"), "--out", str(tmp_path / "shapes.h5")])
    (tmp_path / "made").mkdir()
    os.link(tmp_path / "shapes.h5", tmp_path / "made" / "3.h5")
    report = main(["--data_root", str(tmp_path)])
    pairs = ["pairs in made/3.h5", "pairs in mine", "pairs in shapes.h5"]
    assert sorted(report["sets"]) == ["labeled clouds in mine", "labeled clouds in scans", *pairs]
    assert {row["state"] for row in report["sets"].values()} == {"ok"}
    printed = capsys.readouterr().out
    for place in ("made/3.h5", "mine", "shapes.h5"):
        assert f"train_crossnet_con.py --data_root {tmp_path / place} " in printed
    for place in ("mine/labeled_hdf5", "scans"):
        assert f"--dataset folder --data_root {tmp_path / place} " in printed
    add_part(tmp_path)  # beside a published set, too
    report = main(["--data_root", str(tmp_path)])
    assert {"ShapeNetPart", "ModelNet40", *pairs} <= set(report["sets"])
    view = tmp_path / "mine" / "ShapeNetRendering" / "02691156" / "0" / "rendering" / "00.png"
    view.write_text("hello")
    assert broken(tmp_path)[0] == {"pairs in mine"}


def test_modelnet_in_a_folder_of_the_root_is_named_with_its_command(tmp_path, capsys):
    write_point_cloud_datasets(tmp_path / "mn")
    report = main(["--data_root", str(tmp_path)])
    assert {name: row["found"] for name, row in report["sets"].items()} == {
        f"{name} in mn": row.found for name, row in check(tmp_path / "mn").items() if name.startswith("ModelNet")
    }
    assert f"--dataset modelnet40 --data_root {tmp_path / 'mn'} " in capsys.readouterr().out


def test_own_meshes_and_clouds_are_told_of_the_commands_that_prepare_them(tmp_path, capsys):
    mesh = tmp_path / "one" / "deep" / "a.off"
    mesh.parent.mkdir(parents=True)
    mesh.write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    main(["--data_root", str(tmp_path / "one")])
    printed = capsys.readouterr().out
    assert f"python -m data.prepare_meshes --meshes {tmp_path / 'one'} --out data/mine" in printed
    assert "1 shapes" in printed and not re.search("ShapeNet|download|prepare_clouds", printed)
    for name in ("lamp/1.npy", "lamp/2.npy", "sofa/1.npy", "sofa/2.npy"):
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "two" / name, clouds(1, 8)[0])
    main(["--data_root", str(tmp_path / "two")])
    printed = capsys.readouterr().out
    for prepare in ("prepare_meshes --meshes", "prepare_clouds --clouds"):
        assert f"python -m data.{prepare} {tmp_path / 'two'} " in printed
    mesh.write_text("OFF\n3 1 0\n0 0 0\n")
    assert broken(tmp_path / "one")[0] == {"own meshes and clouds"}


def test_clouds_of_ones_own_are_the_only_row_where_there_is_nothing_else(tmp_path, capsys):
    write_class_folders(tmp_path / "a")
    (tmp_path / "a/train/ball/._0.ply").write_bytes(b"\0\5")
    (row,) = check(tmp_path / "a").values()
    assert (row.state, row.found, row.get) == ("ok", {"train": 30, "test": 15}, "")
    (tmp_path / "a/test/rod/1.xyz").write_text("hello")
    report = main(["--data_root", str(tmp_path / "a")])
    assert report["broken"] == 1 and list(report["sets"]) == ["own labeled clouds"]
    assert "rod/1.xyz" in capsys.readouterr().out
    for split, count in (("train", 5), ("test", 3)):
        write_h5(tmp_path / "b" / f"{split}.h5", data=clouds(count), label=np.arange(count))
    (row,) = check(tmp_path / "b").values()
    assert (row.state, row.found) == ("ok", {"train": 5, "test": 3})


def test_files_of_an_operating_system_are_no_shapes(root):
    before = {name: row.found for name, row in check(root).items()}
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for file in [*folder.iterdir()]:
            if file.is_file() and not file.name.startswith("._"):
                file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
        (folder / "Thumbs.db").write_bytes(b"\0")
    rows = check(root)
    assert {name: row.found for name, row in rows.items()} == before
    assert not any(row.problems for row in rows.values())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_in_any_encoding_are_read(root, encoding):
    before = {name: row.found for name, row in check(root).items()}
    for path in root.rglob("*.txt"):
        path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    rows = check(root)
    assert {name: row.found for name, row in rows.items()} == before
    assert not any(row.problems for row in rows.values())
