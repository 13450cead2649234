import json

import h5py
import numpy as np
import pytest
import torch

from datasets.shapenet_part import PartTaxonomy, ShapeNetPart, draw_rows, official_taxonomy, part_colors, read_taxonomy
from tests.support.files import write_h5
from tests.support.segmentation_sets import write_part_text
from utils.errors import DataError, UserError

FOLDER = "shapenet_part_seg_hdf5_data"
TEXT = "shapenetcore_partanno_segmentation_benchmark_v0"
CHAIR, MUG = 4, 11


def parts_for(categories, *, size, taxonomy=None, seed=0):
    """Random parts of each category, (n, size)."""
    taxonomy = taxonomy or official_taxonomy()
    generator = np.random.default_rng(seed)
    rows = [generator.choice(taxonomy.parts_of(category), size) for category in categories]
    return np.array(rows, dtype="u1").reshape(len(categories), size)


def write(path, categories, *, size=8, seed=0, taxonomy=None, **arrays):
    """Write one official-style file; ``arrays`` replaces or (None) removes its arrays."""
    content = {
        "data": np.random.default_rng(seed).uniform(-1, 1, (len(categories), size, 3)).astype("f4"),
        "label": np.array(categories, dtype="u1")[:, None],
        "pid": parts_for(categories, size=size, taxonomy=taxonomy, seed=seed),
    } | arrays
    write_h5(path, **content)
    return content


def write_tables(folder, names, counts, *, synsets=None):
    """Write the two tables of a data set with custom categories."""
    synsets = synsets or [f"{90000000 + i}" for i in range(len(names))]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\t{synset}" for name, synset in zip(names, synsets, strict=True)]
    (folder / "all_object_categories.txt").write_text("\n".join(lines) + "\n")
    rows = [[synset, part + 1] for synset, count in zip(synsets, counts, strict=True) for part in range(count)]
    (folder / "overallid_to_catid_partid.json").write_text(json.dumps(rows))
    return PartTaxonomy.build(names, counts, synsets=synsets)


@pytest.fixture
def root(tmp_path):
    """Two train files, listed in reverse order with another machine's folder, a val and a test file."""
    folder = tmp_path / FOLDER
    first = write(folder / "ply_data_train0.h5", [0, CHAIR, 15], seed=1)
    second = write(folder / "ply_data_train1.h5", [CHAIR, MUG], seed=2, label=np.array([CHAIR, MUG], "u1"))
    val = write(folder / "ply_data_val0.h5", [CHAIR], seed=3)
    test = write(folder / "ply_data_test0.h5", [15, CHAIR], seed=4)
    (folder / "train_hdf5_file_list.txt").write_text("./hdf5_data/ply_data_train1.h5\nhdf5_data/ply_data_train0.h5\n")
    (folder / "val_hdf5_file_list.txt").write_text("ply_data_val0.h5\n")
    return tmp_path, [second, first, val, test]


# --- HDF5 ---


def test_reads_the_listed_files_in_order(root):
    path, (second, first, val, test) = root
    dataset = ShapeNetPart(path, "train")
    assert [file.name for file in dataset.files] == ["ply_data_train1.h5", "ply_data_train0.h5"]
    np.testing.assert_array_equal(dataset.points, np.concatenate([second["data"], first["data"]]))
    np.testing.assert_array_equal(dataset.parts, np.concatenate([second["pid"], first["pid"]]))
    np.testing.assert_array_equal(dataset.categories, [CHAIR, MUG, 0, CHAIR, 15])
    assert (dataset.points.dtype, dataset.parts.dtype, dataset.categories.dtype) == (np.float32, np.int64, np.int64)
    np.testing.assert_array_equal(ShapeNetPart(path, "test").points, test["data"])
    np.testing.assert_array_equal(ShapeNetPart(path, "trainval").points[-1:], val["data"])
    assert [len(ShapeNetPart(path, split)) for split in ("train", "val", "trainval", "test")] == [5, 1, 6, 2]


def test_an_item_is_a_copy(root):
    path, (second, *_) = root
    dataset = ShapeNetPart(path, "train")
    points, category, parts = dataset[1]
    assert (points.dtype, parts.dtype, category) == (torch.float32, torch.int64, MUG)
    np.testing.assert_array_equal(points, second["data"][1])
    np.testing.assert_array_equal(parts, second["pid"][1])
    points.zero_(), parts.zero_()
    np.testing.assert_array_equal(dataset.points[1], second["data"][1])
    np.testing.assert_array_equal(dataset.parts[1], second["pid"][1])
    assert "5 shapes of 8 points, 4 categories" in repr(dataset)


@pytest.mark.parametrize("name", ["hdf5_data", "shapenetpart_hdf5_2048", None])
def test_folders_of_other_names(root, name):
    path, _ = root
    here = path / FOLDER
    if name is not None:
        here = here.rename(path / name).parent
    assert len(ShapeNetPart(here, "train")) == 5


def test_without_lists_files_are_read_by_number(root):
    path, (second, first, *_) = root
    for file in (path / FOLDER).glob("*.txt"):
        file.unlink()
    (path / FOLDER / "ply_data_train0.h5").rename(path / FOLDER / "ply_data_train10.h5")
    dataset = ShapeNetPart(path, "train")
    assert [file.name for file in dataset.files] == ["ply_data_train1.h5", "ply_data_train10.h5"]
    np.testing.assert_array_equal(dataset.points, np.concatenate([second["data"], first["data"]]))


def test_trainval_of_a_set_without_validation_is_train(root):
    path, _ = root
    for file in (path / FOLDER).glob("*val*"):
        file.unlink()
    assert len(ShapeNetPart(path, "trainval")) == 5
    with pytest.raises(DataError, match=r"neither val_hdf5_file_list\.txt nor ply_data_val"):
        ShapeNetPart(path, "val")


def test_class_choice(root):
    path, (second, first, *_) = root
    chairs = ShapeNetPart(path, "train", class_choice="Chair")
    np.testing.assert_array_equal(chairs.categories, [CHAIR, CHAIR])
    np.testing.assert_array_equal(chairs.points, np.stack([second["data"][0], first["data"][1]]))
    assert chairs.category == CHAIR and set(chairs.parts.ravel()) <= {12, 13, 14, 15}
    assert ShapeNetPart(path, "train").category is None


def test_class_choice_that_finds_nothing(root):
    path, _ = root
    with pytest.raises(UserError, match="unknown category 'sofa'; the categories are: airplane, bag, .*, table"):
        ShapeNetPart(path, "train", class_choice="sofa")
    with pytest.raises(UserError, match=rf"the test split in .*{FOLDER} has no shape of category 'mug'"):
        ShapeNetPart(path, "test", class_choice="mug")


def test_num_points_takes_the_first_rows(root):
    path, (second, *_) = root
    dataset = ShapeNetPart(path, "train", num_points=5)
    np.testing.assert_array_equal(dataset.points[:2], second["data"][:, :5])
    np.testing.assert_array_equal(dataset.parts[:2], second["pid"][:, :5])
    with pytest.raises(UserError, match=r"9 points .* have 8"):
        ShapeNetPart(path, "train", num_points=9)
    with pytest.raises(UserError, match="at least 1"):
        ShapeNetPart(path, "train", num_points=0)


def damaged_files():
    pid = parts_for([CHAIR, MUG], size=8)
    nan = np.zeros((2, 8, 3), np.float32)
    nan[1, 2, 0] = np.nan
    swapped, large, fraction = pid.copy(), pid.copy(), pid.astype("f4")
    swapped[1, 3], large[0, 0], fraction[0, 0] = 11, 50, 12.5
    return {
        "no parts": ({"pid": None}, r"no array 'pid' \(it holds 'data', 'label'\)"),
        "no categories": ({"label": None}, "no array 'label'"),
        "not finite": ({"data": nan}, "1 of 2 clouds .* non-finite .* first is cloud 1"),
        "unknown category": ({"label": np.array([4, 16], "u1")}, "below 16, but goes up to 16"),
        "part of another category": (
            {"pid": swapped},
            r"1 of 2 shapes .* shape 1 \('mug', parts 36..37\), whose point 3 has part 11",
        ),
        "unknown part": ({"pid": large}, r"in 0..49, as .* 16 categories with 50 parts, but is in 1\d?..50"),
        "negative part": ({"pid": pid.astype("i2") - 40}, r"in 0..49, .* but is in -"),
        "fractions": ({"pid": fraction}, "whole numbers"),
        "fewer parts": ({"pid": pid[:, :7]}, r"'pid' must be \(n, N\), .* but is \(2, 7\) for \(2, 8, 3\)"),
        "more parts": ({"pid": np.concatenate([pid, pid], 1)}, "16 parts per shape for 8 points"),
        "fewer shapes": ({"pid": pid[:1]}, r"but is \(1, 8\)"),
    }


@pytest.mark.parametrize("case", damaged_files())
def test_damaged_content_is_named(tmp_path, case):
    arrays, message = damaged_files()[case]
    path = tmp_path / FOLDER / "ply_data_train0.h5"
    write(path, [CHAIR, MUG], **arrays)
    with pytest.raises(DataError, match=message) as error:
        ShapeNetPart(tmp_path, "train")
    assert str(path) in str(error.value) and "data.check_data" in str(error.value)


def test_a_set_of_more_parts_is_told_what_it_lacks(tmp_path):
    write(tmp_path / FOLDER / "ply_data_train0.h5", [0], pid=np.full((1, 8), 93, "u1"))
    needed = r"A set of other categories needs all_object_categories\.txt and overallid_to_catid_partid\.json"
    with pytest.raises(DataError, match=needed):
        ShapeNetPart(tmp_path, "train")


def test_missing_and_unequal_files_are_named(root):
    path, _ = root
    with pytest.raises(DataError, match=f"no ShapeNetPart in .*{FOLDER}.*download_data.sh shapenetpart"):
        ShapeNetPart(path / "absent", "train")
    (path / FOLDER / "ply_data_train0.h5").unlink()
    with pytest.raises(DataError, match=r"ply_data_train0\.h5 is missing; train_hdf5_file_list\.txt lists it"):
        ShapeNetPart(path, "train")
    write(path / FOLDER / "ply_data_train0.h5", [1], size=9)
    with pytest.raises(DataError, match="different size .*train1.h5: 8, ply_data_train0.h5: 9"):
        ShapeNetPart(path, "train")
    assert ShapeNetPart(path, "train", num_points=8).points.shape == (3, 8, 3)
    with pytest.raises(ValueError, match="split"):
        ShapeNetPart(path, "validation")


def test_modelnet_is_not_taken_for_it(tmp_path):
    write(tmp_path / "ply_data_train0.h5", [1], pid=None)
    (tmp_path / "train_files.txt").write_text("ply_data_train0.h5\n")
    with pytest.raises(DataError, match="no ShapeNetPart"):
        ShapeNetPart(tmp_path, "train")


# --- categories and parts ---


def test_the_official_table():
    taxonomy = official_taxonomy()
    assert (len(taxonomy.category_names), taxonomy.num_parts) == (16, 50)
    assert taxonomy.part_starts == (0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47)
    assert list(taxonomy.category_names) == sorted(taxonomy.category_names)
    assert [part for c in range(16) for part in taxonomy.parts_of(c)] == list(range(50))
    assert taxonomy.part_names[13] == "chair part 1"
    assert taxonomy.category_number("MOTOR") == taxonomy.category_number("motorbike") == 10


def test_official_tables_in_the_folder_change_nothing(root):
    path, _ = root
    official = official_taxonomy()
    names = [name.capitalize() for name in official.category_names]
    write_tables(path / FOLDER, names, official.part_counts, synsets=list(official.synsets))
    assert ShapeNetPart(path, "train").taxonomy == official
    (path / FOLDER / "overallid_to_catid_partid.json").unlink()
    assert read_taxonomy(path / FOLDER) == official


def test_a_set_of_19_categories_and_94_parts(tmp_path):
    names, counts = [f"Thing {i}" for i in range(19)], [3] * 9 + [6] * 9 + [13]
    folder = tmp_path / "my_parts"
    taxonomy = write_tables(folder, names, counts)
    written = write(folder / "ply_data_train0.h5", list(range(19)), taxonomy=taxonomy)
    dataset = ShapeNetPart(folder, "train")
    assert dataset.taxonomy == taxonomy and dataset.taxonomy.num_parts == 94
    np.testing.assert_array_equal(dataset.parts, written["pid"])
    assert dataset.parts.max() > 80
    assert len(ShapeNetPart(folder, "train", class_choice="thing 18")) == 1
    write(folder / "ply_data_train0.h5", [0], pid=np.full((1, 8), 94, "u1"))
    with pytest.raises(DataError, match=r"in 0\.\.93, as the set has 19 categories with 94 parts"):
        ShapeNetPart(folder, "train")


def test_parts_may_have_names(tmp_path):
    write_tables(tmp_path, ["chair"], [2])
    (tmp_path / "part_names.txt").write_text("seat\nleg\n")
    assert read_taxonomy(tmp_path).part_names == ("seat", "leg")
    (tmp_path / "part_names.txt").write_text("seat\n")
    with pytest.raises(DataError, match="1 names for 2 parts"):
        read_taxonomy(tmp_path)


def wrong_tables():
    return {
        "unknown synset": ("chair 1\n", [["1", 1], ["2", 1]], "has parts of 2, .* not in all_object_categories.txt"),
        "no parts": ("chair 1\nmug 2\n", [["1", 1]], "lists no part of 2"),
        "other order": ("chair 1\nmug 2\n", [["2", 1], ["1", 1]], "part 0 belongs to 2, expected 1"),
        "torn apart": ("chair 1\nmug 2\n", [["1", 1], ["2", 1], ["1", 2]], "part 1 belongs to 2, expected 1"),
        "no pairs": ("chair 1\n", ["1"], "a list of .synset, part number."),
        "no list": ("chair 1\n", 3, "a list of .synset, part number."),
        "no synset": ("chair\n", [["1", 1]], "line 1 is 'chair'; expected a category name and its synset"),
        "synset twice": ("chair 1\nmug 1\n", [["1", 1]], "line 2: synset 1 occurs twice"),
        "name twice": ("chair 1\nChair 2\n", [["1", 1], ["2", 1]], "a category is named twice"),
        "empty": ("\n", [["1", 1]], "is empty"),
    }


@pytest.mark.parametrize("case", wrong_tables())
def test_wrong_tables_are_named(tmp_path, case):
    categories, rows, message = wrong_tables()[case]
    (tmp_path / "all_object_categories.txt").write_text(categories)
    (tmp_path / "overallid_to_catid_partid.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as error:
        read_taxonomy(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_half_of_the_tables_is_an_error(tmp_path):
    write_tables(tmp_path, ["chair"], [2])
    (tmp_path / "overallid_to_catid_partid.json").unlink()
    with pytest.raises(DataError, match=r"overallid_to_catid_partid\.json is missing; .* published categories"):
        read_taxonomy(tmp_path)
    write_tables(tmp_path, ["chair"], [2])
    (tmp_path / "all_object_categories.txt").unlink()
    with pytest.raises(DataError, match=r"all_object_categories\.txt is missing"):
        read_taxonomy(tmp_path)


@pytest.mark.parametrize("counts", [official_taxonomy().part_counts, [12, 1, 7]])
def test_parts_of_a_category_have_distinct_colors_and_none_is_gray(counts):
    colors = part_colors(counts)
    assert np.ptp(colors, axis=1).min() > 0.5  # the input and the errors of a sheet are gray
    assert colors.shape == (sum(counts), 3) and colors.min() >= 0 and colors.max() <= 1
    start = 0
    for count in counts:
        own = colors[start : start + count]
        distance = np.abs(own[:, None] - own[None]).sum(axis=2) + 10 * np.eye(count)
        assert distance.min() > 0.25
        start += count


# --- text release ---


SHAPES = {
    "train": [("03797390", "m1"), ("03001627", "c1"), ("03001627", "c2")],
    "val": [("03001627", "c3")],
    "test": [("03797390", "m2")],
}


@pytest.mark.parametrize("normals", [True, False])
def test_text_release(tmp_path, normals):
    names = [name for rows in SHAPES.values() for _, name in rows]
    written = write_part_text(tmp_path / (TEXT + "_normal" * normals), SHAPES, normals=names if normals else ())
    dataset = ShapeNetPart(tmp_path, "trainval", num_points=30)
    np.testing.assert_array_equal(dataset.categories, [MUG, CHAIR, CHAIR, CHAIR])
    for row, name in enumerate(("m1", "c1", "c2", "c3")):
        points, local = written[name]
        points = points - points.mean(axis=0)
        points /= np.linalg.norm(points, axis=1).max()
        start = dataset.taxonomy.part_starts[dataset.categories[row]]
        expected = sorted(zip(points.round(4).tolist(), (local + start).tolist(), strict=True))
        found = zip(dataset.points[row].astype(float).round(4).tolist(), dataset.parts[row].tolist(), strict=True)
        for (a, part_a), (b, part_b) in zip(sorted(found), expected, strict=True):
            assert a == pytest.approx(b, abs=2e-4) and part_a == part_b
    assert ShapeNetPart(tmp_path, "test").points.shape == (1, 2048, 3)


def test_what_is_drawn_from_the_text_release_depends_on_seed_and_shape_alone(tmp_path):
    write_part_text(tmp_path / TEXT, SHAPES)

    def drawn(**arguments):
        return ShapeNetPart(tmp_path, "train", num_points=12, **arguments)

    np.testing.assert_array_equal(drawn().points, drawn().points)
    np.testing.assert_array_equal(drawn(class_choice="chair").points, drawn().points[1:])
    assert (drawn(seed=1).points != drawn().points).any()
    assert len(np.unique(drawn().points[0], axis=0)) == 12
    assert len(np.unique(ShapeNetPart(tmp_path, "train", num_points=70).points[0], axis=0)) == 30


def test_damage_in_the_text_release_is_named(tmp_path):
    folder = tmp_path / TEXT
    write_part_text(folder, SHAPES)
    labels, points = folder / "03797390/points_label/m2.seg", folder / "03797390/points/m2.pts"
    sound = labels.read_text()
    for text, message in (
        ("3\n" + sound[2:], r"parts of 'mug' must be in 1\.\.2, but are in 1\.\.3"),
        (sound[2:], r"has 29 parts for the 30 points of .*m2\.pts"),
        ("x\n" + sound[2:], r"m2\.seg cannot be read; expected on every line"),
        ("1.5\n" + sound[2:], "whole numbers"),
    ):
        labels.write_text(text)
        with pytest.raises(DataError, match=message) as error:
            ShapeNetPart(tmp_path, "test")
        assert "m2.seg" in str(error.value)
    labels.write_text(sound)
    points.write_text("nan 0 0\n" + points.read_text().split("\n", 1)[1])
    with pytest.raises(DataError, match=r"m2\.pts has a non-finite number.* in row 1"):
        ShapeNetPart(tmp_path, "test")
    points.unlink()
    with pytest.raises(DataError, match=r"03797390/m2\.txt is missing"):
        ShapeNetPart(tmp_path, "test")
    with pytest.raises(UserError, match="no shape of category 'chair'"):
        ShapeNetPart(tmp_path, "test", class_choice="chair")
    (folder / "train_test_split" / "shuffled_test_file_list.json").write_text('["shape_data/00000001/a"]')
    with pytest.raises(DataError, match="lists a shape of 00000001, which is not a category"):
        ShapeNetPart(tmp_path, "test")
    (folder / "train_test_split" / "shuffled_test_file_list.json").unlink()
    with pytest.raises(DataError, match=r"shuffled_test_file_list\.json is missing"):
        ShapeNetPart(tmp_path, "test")


def test_draw_rows_takes_all_before_it_repeats():
    generator = np.random.default_rng(0)
    assert sorted(draw_rows(9, 9, generator)) == list(range(9))
    assert len(set(draw_rows(9, 5, generator))) == 5
    assert set(draw_rows(9, 20, generator)) == set(range(9))


def test_files_stay_untouched(root):
    path, _ = root
    files = [file for file in path.rglob("*") if file.is_file()]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    for split in ("trainval", "test"):
        ShapeNetPart(path, split)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def write_point_cloud_datasets(root, *, within=False):
    """Write the layout of PointCloudDatasets: train0.h5 and so on, parts in ``seg``."""
    taxonomy = official_taxonomy()
    folder = root / "shapenetpart_hdf5_2048"
    generator = np.random.default_rng(0)
    expected = {}
    for split, files in (("train", 2), ("val", 1), ("test", 1)):
        for number in range(files):
            categories = np.array([0, 1, 15, 10])
            counts = np.asarray(taxonomy.part_counts)[categories]
            parts = generator.integers(0, counts[:, None], (4, 6))
            parts[:, 0] = 0
            whole = parts + np.asarray(taxonomy.part_starts)[categories][:, None]
            expected.setdefault(split, []).append(whole)
            arrays = {"label": categories[:, None].astype("u1"), "seg": (parts if within else whole).astype("u1")}
            points = generator.normal(size=(4, 6, 3)).astype("f4")
            write_h5(folder / f"{split}{number}.h5", data=points, **arrays)
    return folder, {split: np.concatenate(parts) for split, parts in expected.items()}


@pytest.mark.parametrize("within", [False, True])
def test_files_of_point_cloud_datasets(tmp_path, within):
    folder, expected = write_point_cloud_datasets(tmp_path, within=within)
    for root in (tmp_path, folder):
        for split, parts in expected.items():
            shapes = ShapeNetPart(root, split)
            assert shapes.folder == folder and shapes.categories[:4].tolist() == [0, 1, 15, 10]
            np.testing.assert_array_equal(shapes.parts, parts)
        assert [file.name for file in ShapeNetPart(root, "trainval").files] == ["train0.h5", "train1.h5", "val0.h5"]
    with h5py.File(folder / "test0.h5", "r+") as file:
        file["seg"][0, 0] = 60
    with pytest.raises(DataError, match="test0.h5.*must be in 0..49"):
        ShapeNetPart(tmp_path, "test")
    # The classification set of the same collection is another one.
    folder.rename(tmp_path / "shapenetcorev2_hdf5_2048")
    with pytest.raises(DataError, match="no ShapeNetPart"):
        ShapeNetPart(tmp_path, "train")
