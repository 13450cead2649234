import numpy as np
import pytest
import torch

from datasets.modelnet import (
    MESHES,
    MODELNET10_LABELS,
    MODELNET40_CLASSES,
    POINT_CLOUD_DATASETS,
    RELEASED,
    RESAMPLED,
    DemoShapes,
    ModelNet10,
    ModelNet40,
)
from tests.support.files import cut, write_h5
from tests.support.shape_files import MODELNET_CLASSES, write_meshes, write_point_cloud_datasets, write_resampled
from utils.errors import DataError, UserError

FOLDER = "modelnet40_ply_hdf5_2048"


def write(path, labels, *, size=8, seed=0, dtype="f4", column=True, **arrays):
    """Write one official-style file; ``arrays`` replaces or (None) removes its arrays."""
    labels = np.asarray(labels, dtype="u1")
    points = np.random.default_rng(seed).uniform(-1, 1, (len(labels), size, 3)).astype(dtype)
    write_h5(path, **{"data": points, "label": labels[:, None] if column else labels, **arrays})
    return points


@pytest.fixture
def root(tmp_path):
    """Two train files, listed in reverse order with another machine's folders, and one test file."""
    folder = tmp_path / FOLDER
    first = write(folder / "ply_data_train0.h5", [0, 1, 39], seed=1)
    second = write(folder / "ply_data_train1.h5", [8, 5], seed=2, column=False)
    test = write(folder / "ply_data_test0.h5", [35, 0], seed=3)
    lines = f"data/{FOLDER}/ply_data_train1.h5\r\n\ndata\\{FOLDER}\\ply_data_train0.h5\n"
    (folder / "train_files.txt").write_bytes(lines.encode())
    (folder / "test_files.txt").write_text("ply_data_test0.h5\n")
    return tmp_path, np.concatenate([second, first]), test


def test_reads_the_listed_files_in_order(root):
    path, train, test = root
    dataset = ModelNet40(path, "train")
    assert [file.name for file in dataset.files] == ["ply_data_train1.h5", "ply_data_train0.h5"]
    np.testing.assert_array_equal(dataset.points, train)
    np.testing.assert_array_equal(dataset.labels, [8, 5, 0, 1, 39])
    assert (dataset.points.dtype, dataset.labels.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(ModelNet40(path, "test").points, test)


def test_item_is_a_copy_and_goes_through_the_transform(root):
    path, train, _ = root
    dataset = ModelNet40(path, "train", transform=lambda cloud: 2 * cloud)
    cloud, label = dataset[2]
    assert label == 0 and cloud.dtype == torch.float32
    torch.testing.assert_close(cloud, 2 * torch.from_numpy(train[2]))
    plain = ModelNet40(path, "train")
    plain[0][0].zero_()
    np.testing.assert_array_equal(plain.points, train)
    assert len(plain) == 5 and "5 clouds of 8 points" in repr(plain)


def test_class_names_follow_the_labels(root):
    dataset = ModelNet40(root[0], "train")
    names = [dataset.class_names[label] for label in dataset.labels]
    assert names == ["chair", "bottle", "airplane", "bathtub", "xbox"]
    assert len(set(MODELNET40_CLASSES)) == 40


def test_the_folder_itself_is_accepted(root):
    path, train, _ = root
    np.testing.assert_array_equal(ModelNet40(path / FOLDER, "train").points, train)


def test_without_a_list_sorted_files_are_read(root):
    path, train, _ = root
    (path / FOLDER / "train_files.txt").unlink()
    np.testing.assert_array_equal(ModelNet40(path, "train").points, np.concatenate([train[2:], train[:2]]))


def test_modelnet10_keeps_its_classes_and_their_numbers(root):
    path, train, _ = root
    dataset = ModelNet10(path, "train")
    np.testing.assert_array_equal(dataset.labels, [8, 1])
    np.testing.assert_array_equal(dataset.points, train[[0, 3]])
    names = "bathtub bed chair desk dresser monitor night_stand sofa table toilet".split()
    assert [MODELNET40_CLASSES[label] for label in MODELNET10_LABELS] == names


def test_modelnet10_without_any_of_its_classes(tmp_path):
    write(tmp_path / FOLDER / "ply_data_train0.h5", [0, 3])
    with pytest.raises(DataError, match="no cloud of a ModelNet10 class"):
        ModelNet10(tmp_path, "train")


def test_num_points_takes_the_first_rows(root):
    path, train, _ = root
    np.testing.assert_array_equal(ModelNet40(path, "train", num_points=5).points, train[:, :5])
    np.testing.assert_array_equal(ModelNet40(path, "train", num_points=8).points, train)


def test_num_points_above_the_clouds_names_both(root):
    with pytest.raises(UserError, match=r"9 points .* have 8"):
        ModelNet40(root[0], "train", num_points=9)
    with pytest.raises(UserError, match="at least 1"):
        ModelNet40(root[0], "train", num_points=0)


def test_half_precision_files(tmp_path):
    points = write(tmp_path / FOLDER / "ply_data_train0.h5", [1, 2], dtype="f2")
    dataset = ModelNet40(tmp_path, "train")
    np.testing.assert_array_equal(dataset.points, points.astype(np.float32))
    assert dataset.points.dtype == np.float32


def test_unknown_split(root):
    with pytest.raises(ValueError, match="split"):
        ModelNet40(root[0], "val")


def test_demo_set_reads_its_class_names(tmp_path):
    folder = tmp_path / "demo_hdf5"
    write(folder / "ply_data_test0.h5", [1, 0])
    assert DemoShapes(tmp_path, "test").class_names == ("class 0", "class 1")
    (folder / "shape_names.txt").write_text("chair\nlamp\n")
    assert DemoShapes(tmp_path, "test").class_names == ("chair", "lamp")
    (folder / "shape_names.txt").write_text("chair\n")
    with pytest.raises(DataError, match="below 1"):
        DemoShapes(tmp_path, "test")


def test_another_set_is_not_taken_for_modelnet(tmp_path):
    write(tmp_path / "ply_data_train0.h5", [1])
    assert len(ModelNet40(tmp_path, "train")) == 1
    (tmp_path / "shape_names.txt").write_text("chair\nlamp\n")
    with pytest.raises(DataError, match="2 classes instead of 40"):
        ModelNet40(tmp_path, "train")
    (tmp_path / "train_hdf5_file_list.txt").write_text("ply_data_train0.h5\n")  # ShapeNetPart
    with pytest.raises(DataError, match="no ModelNet40"):
        ModelNet40(tmp_path, "train")


def damaged_files():
    points = np.zeros((2, 8, 3), np.float32)
    nan = points.copy()
    nan[1, 3, 2] = np.nan
    return {
        "no label": ({"label": None}, r"no array 'label' \(it holds 'data'\)"),
        "no data": ({"data": None}, "no array 'data'"),
        "not finite": ({"data": nan}, "1 of 2 clouds .* non-finite .* first is cloud 1"),
        "infinite": ({"data": points + np.inf}, "2 of 2 clouds"),
        "two columns": ({"data": points[:, :, :2]}, r"must be \(n, N, 3\)"),
        "whole numbers": ({"data": points.astype("i4")}, "floating point"),
        "fewer labels": ({"label": np.zeros((1, 1), "u1")}, r"\(2,\) or \(2, 1\), one per cloud"),
        "more columns": ({"label": np.zeros((2, 2), "u1")}, r"\(2,\) or \(2, 1\)"),
        "unknown class": ({"label": np.array([3, 40], "u1")}, "below 40, but goes up to 40"),
        "negative": ({"label": np.array([-1, 4])}, "integers >= 0"),
        "fractions": ({"label": np.array([0.5, 4])}, "integers >= 0"),
        "empty": ({"data": points[:0], "label": np.zeros(0, "u1")}, "no clouds"),
    }


@pytest.mark.parametrize("case", damaged_files())
def test_damaged_content_is_named(tmp_path, case):
    arrays, message = damaged_files()[case]
    path = tmp_path / FOLDER / "ply_data_train0.h5"
    write(path, [1, 2], **arrays)
    with pytest.raises(DataError, match=message) as error:
        ModelNet40(tmp_path, "train")
    assert str(path) in str(error.value)
    assert "data.check_data" in str(error.value) and "data/download_data.sh modelnet40" in str(error.value)


@pytest.mark.parametrize("keep", [0, 2e-4, 0.3, 0.95])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / FOLDER / "ply_data_train0.h5"
    write(path, [1] * 40, size=64)
    cut(path, keep)
    with pytest.raises(DataError, match="cannot be read; it may be truncated") as error:
        ModelNet40(tmp_path, "train")
    assert str(path) in str(error.value)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match=f"no ModelNet40 in .*{FOLDER}/ply_data_train.*download_data.sh modelnet40"):
        ModelNet40(tmp_path, "train")
    with pytest.raises(DataError, match="no DemoShapes in .*demo_hdf5.*data/demo"):
        DemoShapes(tmp_path / "absent", "train")
    folder = tmp_path / FOLDER
    write(folder / "ply_data_train0.h5", [1])
    with pytest.raises(DataError, match="neither test_files.txt nor ply_data_test"):
        ModelNet40(tmp_path, "test")
    (folder / "train_files.txt").write_text("ply_data_train0.h5\nply_data_train1.h5\n")
    with pytest.raises(DataError, match=r"ply_data_train1\.h5 is missing; train_files\.txt lists it"):
        ModelNet40(tmp_path, "train")
    (folder / "train_files.txt").write_text("a/ply_data_train0.h5\nb/ply_data_train0.h5\n")
    with pytest.raises(DataError, match="2 times"):
        ModelNet40(tmp_path, "train")
    (folder / "train_files.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        ModelNet40(tmp_path, "train")
    (folder / "train_files.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="list of file names"):
        ModelNet40(tmp_path, "train")


def test_files_of_different_cloud_size(tmp_path):
    write(tmp_path / FOLDER / "ply_data_train0.h5", [1], size=8)
    write(tmp_path / FOLDER / "ply_data_train1.h5", [1], size=9)
    with pytest.raises(DataError, match="different size .*train0.h5: 8, ply_data_train1.h5: 9"):
        ModelNet40(tmp_path, "train")
    assert ModelNet40(tmp_path, "train", num_points=8).points.shape == (2, 8, 3)


def test_files_stay_untouched(root):
    path = root[0]
    files = sorted((path / FOLDER).iterdir())
    for file in files:
        file.chmod(0o444)
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    ModelNet40(path, "train")
    ModelNet10(path, "test")
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def summary(dataset):
    return dataset.layout, dataset.points.shape, [dataset.class_names[label] for label in dataset.labels]


def test_files_of_point_cloud_datasets(tmp_path):
    folder = write_point_cloud_datasets(tmp_path)
    for root in (tmp_path, folder):
        train = ModelNet40(root, "train", num_points=20)
        assert summary(train) == (POINT_CLOUD_DATASETS, (8, 20, 3), list(MODELNET_CLASSES) * 2)
        assert [file.name for file in train.files] == ["train0.h5", "train1.h5"]
        assert train.official_sizes == {"train": 9843, "test": 2468}
        ten = ModelNet10(root, "test")
        assert summary(ten) == (POINT_CLOUD_DATASETS, (2, 30, 3), ["bathtub", "night_stand"])
        assert ten.official_sizes == {"train": 3991, "test": 908}
    # The release with PointNet comes first, where both are there.
    for split in ("train", "test"):
        write(tmp_path / FOLDER / f"ply_data_{split}0.h5", [1, 2, 3])
    assert ModelNet40(tmp_path, "train").layout == RELEASED
    assert ModelNet40(folder, "train").layout == POINT_CLOUD_DATASETS


def test_modelnet10_of_point_cloud_datasets_keeps_the_numbers_of_modelnet40(tmp_path):
    folder = write_point_cloud_datasets(tmp_path, "modelnet10")
    for root in (tmp_path, folder):
        assert summary(ModelNet10(root, "test")) == (POINT_CLOUD_DATASETS, (2, 30, 3), ["bathtub", "toilet"])
    with pytest.raises(DataError, match="no ModelNet40"):
        ModelNet40(tmp_path, "train")


def test_text_files_of_the_resampled_set(tmp_path):
    folder = write_resampled(tmp_path)
    (folder / "modelnet40_train.txt").write_bytes(
        ("﻿" + (folder / "modelnet40_train.txt").read_text().replace("\n", "\r\n")).encode("utf-8")
    )
    names = [name for name in MODELNET_CLASSES for _ in range(2)]
    for root in (tmp_path, folder):
        train = ModelNet40(root, "train", num_points=8)
        assert summary(train) == (RESAMPLED, (8, 8, 3), names) and train.repeated == 0
        assert train.origin() == {"layout": RESAMPLED, "folder": str(folder), "clouds": 8}
        rows = np.loadtxt(folder / "airplane" / "airplane_0001.txt", delimiter=",")[:, :3]
        rows -= rows.mean(0)
        # The first rows of the file, in its unit sphere.
        expected = (rows / np.linalg.norm(rows, axis=1).max()).astype("f4")
        np.testing.assert_allclose(train.points[0], expected[:8], rtol=1e-6)
        ten = ModelNet10(root, "train")
        assert summary(ten) == (RESAMPLED, (4, 2048, 3), ["bathtub"] * 2 + ["night_stand"] * 2) and ten.repeated == 4
    assert ModelNet40(tmp_path, "train").official_sizes["train"] == 9843


def test_meshes_as_published_are_sampled_and_turned_to_y_up(tmp_path):
    folder = write_meshes(tmp_path)
    (folder / "bathtub" / "train" / "._bathtub_0001.off").write_bytes(b"\0\5")
    (folder / "README.txt").write_text("not a class\n")
    for root in (tmp_path, folder):
        test = ModelNet40(root, "test", num_points=100)
        assert summary(test) == (MESHES, (4, 100, 3), list(MODELNET_CLASSES))
        assert (np.ptp(test.points, axis=1).argmax(axis=1) == 1).all()  # long along z in the files
        assert np.linalg.norm(test.points, axis=2).max() == pytest.approx(1, abs=0.1)
        np.testing.assert_array_equal(ModelNet40(root, "test", num_points=50).points, test.points[:, :50])
    assert summary(ModelNet10(tmp_path, "train"))[2] == ["bathtub"] * 2 + ["night_stand"] * 2
    assert summary(ModelNet10(write_meshes(tmp_path / "ten", "ModelNet10"), "test"))[2] == ["bathtub", "night_stand"]
    (folder / "dog" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="it has dog. For other classes use --dataset folder"):
        ModelNet40(tmp_path, "train")


def test_bad_text_files_are_named(tmp_path):
    folder = write_resampled(tmp_path)
    path = folder / "xbox" / "xbox_0001.txt"
    for text in ("", "1,2\n", "a,b,c\n", "1e300,0,0\n1,1,1\n", "nan,0,0\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=f"{path} "):
            ModelNet40(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{path}"):
        ModelNet40(tmp_path, "train")
    for text, message in (
        ("../xbox_0001\n", "lists '../xbox_0001'"),
        ("dog_0001\n", "lists 'dog_0001'"),
        ("", "empty"),
    ):
        (folder / "modelnet40_train.txt").write_text(text)
        with pytest.raises(DataError, match=f"modelnet40_train.txt.*{message}"):
            ModelNet40(tmp_path, "train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_lists_and_class_names_in_any_encoding(tmp_path, encoding):
    for split in ("train", "test"):
        write(tmp_path / "demo_hdf5" / f"ply_data_{split}0.h5", [0, 1])
        (tmp_path / "demo_hdf5" / f"{split}_files.txt").write_bytes(f"ply_data_{split}0.h5\r\n".encode(encoding))
    (tmp_path / "demo_hdf5" / "shape_names.txt").write_bytes("Bär\nant\n".encode(encoding))
    (tmp_path / "demo_hdf5" / "._ply_data_train0.h5").write_bytes(b"\0\5")
    assert DemoShapes(tmp_path, "train").class_names == ("Bär", "ant")
    (tmp_path / "demo_hdf5" / "train_files.txt").unlink()
    assert len(DemoShapes(tmp_path, "train")) == 2  # without its list: ._ply_data_train0.h5 is not a file of it
