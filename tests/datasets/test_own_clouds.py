import sys
import unicodedata

import numpy as np
import pytest

from datasets.own_clouds import OwnClouds, find_class_folders
from datasets.registry import find_datasets, open_classification_set
from tests.support.files import write_h5
from tests.support.pairs import cloud
from tests.support.shape_files import STRETCH, write_class_folders, write_shape
from utils.errors import DataError, UserError


@pytest.mark.parametrize("nested", [False, True])
def test_five_classes_of_files_in_every_format(tmp_path, nested):
    write_class_folders(tmp_path, nested=nested)
    for junk in ("._0.ply", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.md"):
        (tmp_path / ("ball/train" if nested else "train/ball") / junk).write_bytes(b"\0\5\x16\7")
    (tmp_path / "train" / ".git").mkdir(parents=True, exist_ok=True) if not nested else None
    train, test = (OwnClouds(tmp_path, split, num_points=64) for split in ("train", "test"))
    assert train.class_names == test.class_names == tuple(sorted(STRETCH))
    assert np.bincount(train.labels).tolist() == [6] * 5 and np.bincount(test.labels).tolist() == [3] * 5
    assert train.points.shape == (30, 64, 3) and train.points.dtype == np.float32
    assert np.linalg.norm(train.points, axis=2).max() == pytest.approx(1, abs=1e-4)  # whatever their units
    assert train.repeated == (train.sizes < 64).sum() > 0
    assert train.origin() == {
        "layout": "<split>/<class>/<file>",
        "folder": str(tmp_path),
        "clouds": 30,
        "clouds_with_repeated_points": train.repeated,
    }
    whole = OwnClouds(tmp_path, "train")
    assert whole.points.shape == (30, 2048, 3)
    np.testing.assert_array_equal(whole.points[:, :64], train.points)
    assert find_datasets(tmp_path) == ["folder"]
    assert len(open_classification_set("folder", tmp_path, "test", num_points=8)) == 15


def test_class_names_are_one_whatever_system_wrote_them(tmp_path):
    for split, form in (("train", "NFD"), ("TEST", "NFC")):
        write_shape(tmp_path / split / unicodedata.normalize(form, "Stühle") / "a.xyz", cloud(1))
        write_shape(tmp_path / split / "Tisch" / "a.xyz", cloud(1))
    assert OwnClouds(tmp_path, "train").class_names == OwnClouds(tmp_path, "test").class_names == ("Stühle", "Tisch")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names that differ in case are one folder there")
def test_classes_that_differ_in_case_are_both_read(tmp_path):
    for name in ("Chair", "chair"):
        for split in ("train", "test"):
            write_shape(tmp_path / name / split / "a.xyz", cloud(1))
    assert OwnClouds(tmp_path, "train").class_names == ("Chair", "chair") and len(OwnClouds(tmp_path, "test")) == 2


@pytest.mark.parametrize("names", ["ply_data_{}0.h5", "{}.h5", "my_{}_2.h5"])
def test_hdf5_files_of_any_classes(tmp_path, names):
    for split, count in (("train", 6), ("test", 3)):
        points = np.stack([cloud(i, 12) for i in range(count)])
        write_h5(tmp_path / names.format(split), data=points, label=np.arange(count) % 3)
    assert OwnClouds(tmp_path, "train").class_names == ("class 0", "class 1", "class 2")
    (tmp_path / "shape_names.txt").write_bytes("Bär\r\nAmeise\r\nWal\r\n".encode("utf-16"))
    dataset = OwnClouds(tmp_path, "train", num_points=5)
    assert dataset.class_names == ("Bär", "Ameise", "Wal") and dataset.points.shape == (6, 5, 3)
    np.testing.assert_array_equal(dataset.points[4], cloud(4, 12)[:5])
    assert find_datasets(tmp_path)[-1] in ("folder", "modelnet10", "modelnet40")
    with pytest.raises(UserError, match="13 points requested"):
        OwnClouds(tmp_path, "train", num_points=13)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match=f"no labeled clouds in {tmp_path}; expected train/<class>/"):
        OwnClouds(tmp_path, "train")
    write_shape(tmp_path / "chair" / "a.ply", cloud(1))
    write_shape(tmp_path / "table" / "a.ply", cloud(1))
    with pytest.raises(
        DataError, match=f"not split into train and test; .*prepare_clouds --clouds {tmp_path} .*--test_fraction"
    ):
        OwnClouds(tmp_path, "train")
    (tmp_path / "train" / "chair").mkdir(parents=True)
    (tmp_path / "test" / "chair").mkdir(parents=True)
    with pytest.raises(DataError, match="no clouds of the train split"):
        OwnClouds(tmp_path, "train")
    (tmp_path / "train" / "chair" / "a.ply").write_text("hello")
    with pytest.raises(DataError, match="train/chair/a.ply is not|train/chair/a.ply is no"):
        OwnClouds(tmp_path, "train")
    with pytest.raises(ValueError, match="split must be"):
        OwnClouds(tmp_path, "val")
    with pytest.raises(UserError, match="at least 1"):
        OwnClouds(tmp_path, "train", num_points=0)
    assert find_class_folders(tmp_path / "none") is None
