import h5py
import numpy as np
import pytest

from datasets.scanobjectnn import VARIANTS, ScanObjectNN, resolve_variant
from tests.support.files import cut, write_h5
from utils.errors import DataError, UserError

OFFICIAL = {
    "OBJ_BG": "main_split/{}_objectdataset.h5",
    "OBJ_ONLY": "main_split_nobg/{}_objectdataset.h5",
    "PB_T25": "main_split/{}_objectdataset_augmented25_norot.h5",
    "PB_T25_R": "main_split/{}_objectdataset_augmented25rot.h5",
    "PB_T50_R": "main_split/{}_objectdataset_augmentedrot.h5",
    "PB_T50_RS": "main_split/{}_objectdataset_augmentedrot_scale75.h5",
}


def write(path, value, *, size=6, column=False):
    """Write two clouds whose coordinates are all ``value``."""
    labels = np.array([[14], [3]] if column else [14, 3])
    return write_h5(path, data=np.full((2, size, 3), value, np.float32), label=labels, mask=np.zeros((2, size)))


@pytest.mark.parametrize("parent", ["h5_files", "ScanObjectNN/h5_files", "ScanObjectNN", "."])
@pytest.mark.parametrize("variant", OFFICIAL)
def test_every_variant_has_its_own_official_files(tmp_path, variant, parent):
    paths = {}
    for number, (name, pattern) in enumerate(OFFICIAL.items()):
        for offset, word in ((0, "training"), (100, "test")):
            paths[name, word] = write(tmp_path / parent / pattern.format(word), number + offset)
    number = list(OFFICIAL).index(variant)
    train, test = (ScanObjectNN(tmp_path, split, variant=variant) for split in ("train", "test"))
    assert (train.source, test.source) == (paths[variant, "training"], paths[variant, "test"])
    assert (train.points == number).all() and (test.points == number + 100).all()
    assert set(VARIANTS) == set(OFFICIAL)


@pytest.mark.parametrize("column", [False, True])
def test_released_names_are_obj_bg(tmp_path, column):
    path = write(tmp_path / "ScanObjectNN/main_split/train.h5", 7, column=column)
    dataset = ScanObjectNN(tmp_path, "train")
    assert dataset.source == path and dataset.variant == "OBJ_BG"
    np.testing.assert_array_equal(dataset.labels, [14, 3])
    assert [dataset.class_names[label] for label in dataset.labels] == ["toilet", "cabinet"]


@pytest.mark.parametrize("variant", [name for name in OFFICIAL if name != "OBJ_BG"])
def test_released_names_are_no_other_variant(tmp_path, variant):
    write(tmp_path / "ScanObjectNN/main_split/train.h5", 7)
    with pytest.raises(DataError, match=f"no ScanObjectNN {variant} .*{OFFICIAL[variant].format('training')}"):
        ScanObjectNN(tmp_path, "train", variant=variant)


def test_the_official_file_wins(tmp_path):
    write(tmp_path / "ScanObjectNN/main_split/train.h5", 1)
    official = write(tmp_path / "h5_files/main_split/training_objectdataset.h5", 2)
    assert ScanObjectNN(tmp_path, "train").source == official


def test_root_may_be_the_split_folder(tmp_path):
    path = write(tmp_path / "main_split_nobg/test_objectdataset.h5", 2)
    assert ScanObjectNN(path.parent, "test", variant="OBJ_ONLY").source == path


def test_points_are_not_normalized_and_cut_from_the_front(tmp_path):
    path = tmp_path / "h5_files/main_split/test_objectdataset.h5"
    write(path, 0)
    points = 5 + np.arange(36, dtype=np.float32).reshape(2, 6, 3)
    with h5py.File(path, "r+") as file:
        file["data"][...] = points
    np.testing.assert_array_equal(ScanObjectNN(tmp_path, "test").points, points)
    np.testing.assert_array_equal(ScanObjectNN(tmp_path, "test", num_points=4)[1][0].numpy(), points[1, :4])
    with pytest.raises(UserError, match=r"7 points .* have 6"):
        ScanObjectNN(tmp_path, "test", num_points=7)


@pytest.mark.parametrize(
    ("given", "name"), [("T25", "PB_T25"), ("t50_rs", "PB_T50_RS"), ("pb_t50_r", "PB_T50_R"), ("obj_only", "OBJ_ONLY")]
)
def test_short_names(given, name):
    assert resolve_variant(given) == name


def test_unknown_variant_lists_those_there_are(tmp_path):
    with pytest.raises(UserError, match="'OBJ'; .*OBJ_BG, OBJ_ONLY, .*PB_T50_RS"):
        ScanObjectNN(tmp_path, "train", variant="OBJ")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="main_split/train.h5.*download_data.sh scanobjectnn"):
        ScanObjectNN(tmp_path, "train")
    path = write(tmp_path / "h5_files/main_split/training_objectdataset.h5", 1)
    with h5py.File(path, "r+") as file:
        del file["label"]
    with pytest.raises(DataError, match="no array 'label' .*it holds 'data', 'mask'") as error:
        ScanObjectNN(tmp_path, "train")
    assert str(path) in str(error.value)
    cut(path)
    with pytest.raises(DataError, match="truncated"):
        ScanObjectNN(tmp_path, "train")
    write_h5(path, data=np.zeros((1, 6, 3)), label=np.array([15]))
    with pytest.raises(DataError, match="below 15"):
        ScanObjectNN(tmp_path, "train")
