import os
import shutil

import h5py
import numpy as np
import pytest

from data.prepare_clouds import main
from datasets.own_clouds import OwnClouds
from tests.support.pairs import cloud
from tests.support.shape_files import STRETCH, write_class_folders, write_shape
from utils.errors import DataError, UserError


def convert(clouds, out, *more):
    return main(["--clouds", str(clouds), "--out", str(out), "--num_points", "60", *map(str, more)])


def test_class_folders_become_the_same_clouds_in_hdf5(tmp_path, capsys):
    write_class_folders(tmp_path / "mine")
    counts = convert(tmp_path / "mine", tmp_path / "out")
    assert (counts["train"], counts["test"], counts["classes"]) == (30, 15, 5)
    for split in ("train", "test"):
        before, after = (OwnClouds(root, split, num_points=60) for root in (tmp_path / "mine", tmp_path / "out"))
        assert after.class_names == before.class_names == tuple(sorted(STRETCH))
        np.testing.assert_array_equal(after.labels, before.labels)
        # Points of meshes are drawn anew for another number of them.
        clouds = [i for i, path in enumerate(sorted((tmp_path / "mine").glob(f"{split}/*/*"))) if path.suffix != ".off"]
        np.testing.assert_allclose(after.points[clouds], before.points[clouds], atol=1e-6)
        assert counts[f"{split}_with_repeated_points"] == before.repeated > 0
    assert "read it with --dataset folder" in capsys.readouterr().out
    with pytest.raises(UserError, match="shape_names.txt exists; --overwrite"):
        convert(tmp_path / "mine", tmp_path / "out")
    convert(tmp_path / "mine", tmp_path / "out", "--overwrite", "--up", "z")
    turned = OwnClouds(tmp_path / "out", "train").points[0]
    np.testing.assert_allclose(turned[:, 1], OwnClouds(tmp_path / "mine", "train", num_points=60).points[0][:, 2])


def test_folders_without_a_split_are_divided_class_by_class(tmp_path):
    for name, count in (("a", 10), ("b", 3), ("c", 1)):
        for i in range(count):
            write_shape(tmp_path / "mine" / name / f"{i}.xyz", cloud(i, 70))
    with pytest.raises(UserError, match="--test_fraction 0.2"):
        convert(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    counts = convert(tmp_path / "mine", tmp_path / "out", "--test_fraction", 0.2)
    assert (counts["train"], counts["test"]) == (8 + 2 + 1, 2 + 1)
    train, test = (OwnClouds(tmp_path / "out", split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8, 2, 1] and np.bincount(test.labels).tolist() == [2, 1]
    clouds = np.concatenate([train.points[train.labels == 0], test.points[test.labels == 0]]).round(4)
    assert len({tuple(sorted(map(tuple, points.tolist()))) for points in clouds}) == 10  # each in one of both
    with h5py.File(tmp_path / "out" / "ply_data_train0.h5") as file:
        assert file["data"].dtype == np.float32 and file["label"].shape == (11, 1)
    with pytest.raises(UserError, match="leave --test_fraction out"):
        write_class_folders(tmp_path / "divided", train=1, test=1)
        convert(tmp_path / "divided", tmp_path / "other", "--test_fraction", 0.5)


def test_what_cannot_be_converted_is_said(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "mine" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no two clouds of a class"):
        convert(tmp_path / "mine", tmp_path / "out", "--test_fraction", 0.2)
    with pytest.raises(SystemExit):
        convert(tmp_path / "mine", tmp_path / "out", "--test_fraction", 1.5)
    strange = tmp_path / "mine" / os.fsdecode(b"\xff")
    for i in range(2):
        write_shape(strange / f"{i}.xyz", cloud(i))
    with pytest.raises(DataError, match="its name is not UTF-8. Rename it"):
        convert(tmp_path / "mine", tmp_path / "out", "--test_fraction", 0.2)
    shutil.rmtree(strange)
    for split in ("train", "test"):
        (tmp_path / "mine" / "a" / split).mkdir()
        (tmp_path / "mine" / "a" / split / "b.pcd").write_text("hello")
    with pytest.raises(DataError, match="b.pcd"):
        convert(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
