import shutil

import h5py
import numpy as np
import pytest

from datasets.s3dis import CLASS_NAMES, S3DIS, S3DISRooms
from datasets.s3dis_prepare import (
    BlockSettings,
    Room,
    block_starts,
    choose_points,
    class_of,
    main,
    read_annotation,
    read_room,
    room_file,
    write_room,
)
from tests.support.segmentation_sets import write_raw_room
from utils.errors import DataError, UserError

N = 32  # points of a block
SMALL = ["--num_points", str(N), "--min_points", "10"]


@pytest.fixture
def raw(tmp_path):
    """Two areas with two rooms and one room; rooms by name, as ``write_raw_room`` returns them."""
    root = tmp_path / "raw"
    rooms = {
        "Area_1_office_1": write_raw_room(root, 1, "office_1", seed=1),
        "Area_1_hallway_2": write_raw_room(root, 1, "hallway_2", seed=2, size=(0.4, 5.05, 2.0)),
        "Area_3_office_1": write_raw_room(root, 3, "office_1", seed=3),
    }
    (root / "Area_1" / "Area_1_alignmentAngle.txt").write_text("not a room\n")
    (root / "Area_1" / "office_1" / "Annotations" / ".hidden.txt").write_text("not an object\n")
    return root, rooms


def prepare(root, out, *more):
    return main(["--raw", str(root), "--out", str(out), "--areas", "1", "3", *SMALL, *more])


# --- the whole command ---


def test_every_point_of_a_room_is_in_a_test_block(raw, tmp_path):
    root, rooms = raw
    prepare(root, tmp_path / "out")
    for area in (1, 3):
        dataset = S3DISRooms(tmp_path / "out", area, in_channels=9)
        assert dataset.rooms == tuple(sorted(name for name in rooms if name.startswith(f"Area_{area}")))
        for number, name in enumerate(dataset.rooms):
            values, names = rooms[name]
            points, labels = dataset.room_cloud(number)
            np.testing.assert_allclose(points[:, :3], values[:, :3] - values[:, :3].min(axis=0), atol=1e-5)
            np.testing.assert_allclose(points[:, 3:], values[:, 3:] / 255, atol=1e-6)
            expected = [CLASS_NAMES.index(n if n in CLASS_NAMES else "clutter") for n in names]
            np.testing.assert_array_equal(labels, expected)


def test_blocks_hold_the_nine_values_of_their_points(raw, tmp_path):
    root, rooms = raw
    prepare(root, tmp_path / "out")
    dataset = S3DISRooms(tmp_path / "out", 1, in_channels=9)
    for block, labels, index, room in (dataset[i] for i in range(len(dataset))):
        values, names = rooms[dataset.rooms[room]]
        xyz = values[:, :3] - values[:, :3].min(axis=0)
        chosen, block = xyz[index], block.numpy()
        assert np.ptp(chosen[:, 0]) <= 1 + 1e-6 and np.ptp(chosen[:, 1]) <= 1 + 1e-6
        middle = chosen[:, :2].min(axis=0) + 0.5
        np.testing.assert_allclose(block[:, :2], chosen[:, :2] - middle, atol=1e-5)
        np.testing.assert_allclose(block[:, 2], chosen[:, 2], atol=1e-5)
        np.testing.assert_allclose(block[:, 3:6], values[index, 3:] / 255, atol=1e-6)
        np.testing.assert_allclose(block[:, 6:], chosen / xyz.max(axis=0), atol=1e-6)
        assert [CLASS_NAMES[n] for n in labels] == [
            n if n in CLASS_NAMES else "clutter" for n in np.array(names)[index]
        ]


def test_training_blocks_and_lists_have_the_published_form(raw, tmp_path):
    root, rooms = raw
    summary = prepare(root, tmp_path / "out")
    folder = tmp_path / "out" / "indoor3d_sem_seg_hdf5_data"
    files = (folder / "all_files.txt").read_text().splitlines()
    assert files == [f"{folder.name}/ply_data_all_{room}.h5" for room in sorted(rooms)]
    listed = (folder / "room_filelist.txt").read_text().splitlines()
    counts = []
    for line in files:
        with h5py.File(tmp_path / "out" / line) as file:
            count = len(file["data"])
            assert (file["data"].shape, file["data"].dtype) == ((count, N, 9), np.float32)
            assert (file["label"].shape, file["label"].dtype) == ((count, N), np.uint8)
            counts.append(count)
    assert listed == [room for room, count in zip(sorted(rooms), counts, strict=True) for _ in range(count)]
    assert summary["train_blocks"] == len(listed) == sum(counts)
    assert summary["areas"]["3"] == {
        "rooms": 1,
        "made": 1,
        "points": len(rooms["Area_3_office_1"][0]),
        "train_blocks": listed.count("Area_3_office_1"),
        "test_blocks": len(S3DISRooms(tmp_path / "out", 3)),
    }
    assert len(S3DIS(tmp_path / "out", [1, 3], in_channels=9)) == len(listed)


def test_a_second_run_makes_only_what_is_missing(raw, tmp_path):
    root, _ = raw
    out = tmp_path / "out"
    assert prepare(root, out)["made"] == 3
    lost, kept = room_file(out, "train", "Area_1_office_1"), room_file(out, "test", "Area_3_office_1")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    lost.parent.joinpath("all_files.txt").unlink()
    assert prepare(root, out)["made"] == 1
    assert kept.stat().st_mtime_ns == stamp
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}.keys() == before.keys()
    assert prepare(root, out)["made"] == 0


def test_damaged_changed_and_otherwise_cut_rooms_are_made_again(raw, tmp_path):
    root, _ = raw
    out = tmp_path / "out"
    prepare(root, out)
    damaged = room_file(out, "test", "Area_1_office_1")
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with (root / "Area_3/office_1/Annotations/chair_1.txt").open("a") as file:
        file.write("-7.0 11.0 1.0 1 2 3\n")
    assert prepare(root, out)["made"] == 2
    assert S3DISRooms(out, 3).room_size(0) == len(raw[1]["Area_3_office_1"][0]) + 1
    assert prepare(root, out, "--seed", "5")["made"] == 3
    # The stride of training blocks does not affect the test blocks.
    assert prepare(root, out, "--seed", "5", "--stride", "1.0", "--only", "test")["made"] == 0


def test_areas_are_added_to_those_that_are_there(raw, tmp_path):
    root, _ = raw
    out = tmp_path / "out"
    main(["--raw", str(root), "--out", str(out), "--areas", "1", *SMALL])
    with pytest.raises(DataError, match="no room of area 3; it has rooms of the areas 1"):
        S3DIS(out, [3])
    main(["--raw", str(root), "--out", str(out), "--areas", "3", *SMALL])
    assert S3DIS(out, [1, 3]).rooms == ("Area_1_hallway_2", "Area_1_office_1", "Area_3_office_1")


def test_processes_give_the_same_blocks(raw, tmp_path):
    root, _ = raw
    prepare(root, tmp_path / "one")
    prepare(root, tmp_path / "two", "--workers", "2")
    for room in raw[1]:
        for kind in ("train", "test"):
            with (
                h5py.File(room_file(tmp_path / "one", kind, room)) as a,
                h5py.File(room_file(tmp_path / "two", kind, room)) as b,
            ):
                for name in a:
                    np.testing.assert_array_equal(a[name][()], b[name][()])


def test_only_one_kind_leaves_published_blocks_alone(raw, tmp_path):
    root, _ = raw
    published = tmp_path / "out" / "indoor3d_sem_seg_hdf5_data" / "ply_data_all_0.h5"
    published.parent.mkdir(parents=True)
    with h5py.File(published, "w") as file:
        file["data"] = np.zeros((1, 4, 9), np.float32)
    content = published.read_bytes()
    with pytest.raises(UserError, match=r"ply_data_all_0\.h5 was not made by this command.*--only test"):
        prepare(root, tmp_path / "out")
    prepare(root, tmp_path / "out", "--only", "test")
    assert [path.name for path in published.parent.iterdir()] == [published.name]
    assert published.read_bytes() == content and len(S3DISRooms(tmp_path / "out", 3).rooms) == 1


def test_the_folder_above_the_areas_is_accepted(raw, tmp_path):
    root, _ = raw
    above = tmp_path / "above"
    above.mkdir()
    root.rename(above / "Stanford3dDataset_v1.2_Aligned_Version")
    assert prepare(above, tmp_path / "out")["rooms"] == 3


def test_what_is_not_there_is_named(raw, tmp_path):
    root, _ = raw
    with pytest.raises(DataError, match="no rooms in .*Area_2; .* holds Area_1, Area_3: cut these with --areas 1 3"):
        main(["--raw", str(root), "--out", str(tmp_path / "out"), "--areas", "2"])
    (root / "Area_1" / "empty_1").mkdir()
    with pytest.raises(DataError, match="empty_1/Annotations has no objects"):
        prepare(root, tmp_path / "out")
    with pytest.raises(UserError, match="--stride must be above 0"):
        prepare(root, tmp_path / "out", "--stride", "0")


def test_a_broken_room_does_not_lose_the_others(raw, tmp_path):
    root, _ = raw
    out = tmp_path / "out"
    broken = root / "Area_3" / "office_1" / "Annotations" / "chair_1.txt"
    sound = broken.read_bytes()
    broken.write_bytes(sound + b"1.0 2.0 3.0 4 5\n")
    for workers in ("1", "2"):
        with pytest.raises(DataError, match=rf"chair_1\.txt, line {len(sound.splitlines()) + 1} is '1.0 2.0 3.0 4 5'"):
            prepare(root, out, "--workers", workers)
    assert room_file(out, "test", "Area_1_office_1").is_file()
    assert not room_file(out, "test", "Area_3_office_1").exists() and not list(out.rglob("*.tmp"))
    with pytest.raises(DataError, match=r"room_filelist\.txt is missing"):
        S3DIS(out, [1])
    broken.write_bytes(sound)
    assert prepare(root, out)["made"] == 1


def test_a_full_disk_is_named_and_leaves_nothing(raw, tmp_path, monkeypatch):
    class Full(h5py.File):
        def __exit__(self, *error):
            writes = self.mode == "r+"
            super().__exit__(*error)
            if writes:
                raise RuntimeError("Can't decrement id ref count (no space left)")

    monkeypatch.setattr(h5py, "File", Full)
    with pytest.raises(UserError, match="cannot write .*ply_data_all_Area_.*no space left"):
        prepare(raw[0], tmp_path / "out")
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_a_stray_character_is_noted_on_every_run(raw, tmp_path, capsys):
    root, rooms = raw
    file = root / "Area_1" / "office_1" / "Annotations" / "chair_1.txt"
    file.write_bytes(b"-7.000 11.000 0.500 18\x105 187 182\n" + file.read_bytes())
    for _ in range(2):
        notes = prepare(root, tmp_path / "out")["notes"]
        assert len(notes) == 1 and "chair_1.txt, line 1: stray '\\x10' read as nothing" in notes[0]
        assert notes[0] in capsys.readouterr().err
    points, _ = S3DISRooms(tmp_path / "out", 1).room_cloud(1)
    assert len(points) == len(rooms["Area_1_office_1"][0]) + 1
    np.testing.assert_allclose(points[0, 3:], np.array([185, 187, 182]) / 255, atol=1e-6)


def test_counts_are_printed_and_written(raw, tmp_path, capsys):
    summary = prepare(raw[0], tmp_path / "out", "--json", str(tmp_path / "counts.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["area", "rooms", "made", "points", "train", "blocks", "test", "blocks"]
    assert lines[3].split() == [
        "all",
        "3",
        "3",
        f"{summary['points']:,}",
        *(str(summary[f"{k}_blocks"]) for k in ("train", "test")),
    ]
    assert (tmp_path / "counts.json").is_file()


def test_help_shows_a_command_to_paste(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version" in capsys.readouterr().out


# --- reading ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"1.5 2.5 3.5 185\x10187 182", [1.5, 2.5, 3.5, 185, 187, 182]),
        (b"1.5 2.5 3.\x105 185 187 182", [1.5, 2.5, 3.5, 185, 187, 182]),
        (b"1.5 2.5 3.5 185 \xff187 182", [1.5, 2.5, 3.5, 185, 187, 182]),
        (b"1.5\t2.5 3.5  185 187 182\r", [1.5, 2.5, 3.5, 185, 187, 182]),
        (b"-1e-3 +2.5 3 0 255 1.0", [-0.001, 2.5, 3, 0, 255, 1]),
    ],
)
def test_lines_that_are_understood(tmp_path, line, expected):
    file = tmp_path / "chair_1.txt"
    file.write_bytes(b"1 2 3 4 5 6\n\n" + line + b"\n")
    values, notes = read_annotation(file)
    np.testing.assert_array_equal(values, [[1, 2, 3, 4, 5, 6], expected])
    assert len(notes) == (1 if any(byte > 126 or byte == 0x10 for byte in line) else 0)
    assert all("line 3: stray" in note for note in notes)


MALFORMED = [
    *(b"1 2 3 4 5", b"1 2 3 4 5 6 7", b"1,2,3,4,5,6", b"# 1 2 3 4 5"),
    *(b"1 2 x 4 5 6", b"1 2 nan 4 5 6", b"1 2 1_0 4 5 6", b"1 2 3\x10 4 5"),
    *(b"1 2 3 4 5 256", b"1 2 3 -1 5 6"),
]


@pytest.mark.parametrize("line", MALFORMED)
def test_other_malformed_lines_are_errors(tmp_path, line):
    file = tmp_path / "chair_1.txt"
    file.write_bytes(b"1 2 3 4 5 6\n" + line + b"\n1 2 3 4 5 6\n")
    with pytest.raises(DataError, match=r"chair_1\.txt, line 2 is .*expected six numbers"):
        read_annotation(file)


def test_an_empty_object_has_no_points(tmp_path):
    (tmp_path / "chair_1.txt").write_text("\n")
    assert read_annotation(tmp_path / "chair_1.txt")[0].shape == (0, 6)


def test_class_comes_from_the_file_name(tmp_path):
    assert [CLASS_NAMES[class_of(tmp_path / name)] for name in ("chair_12.txt", "Sofa_1.txt", "stairs_1.txt")] == [
        "chair",
        "sofa",
        "clutter",
    ]


# --- cutting ---


def room_of(xyz, name="Area_1_a_1"):
    return Room(name, xyz, np.zeros((len(xyz), 3), np.float32), np.zeros(len(xyz), np.uint8))


def test_block_starts_are_those_of_the_published_blocks():
    assert block_starts(3.2, block=1.0, stride=0.5) == [0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert block_starts(3.0, block=1.0, stride=0.5) == [0, 0.5, 1.0, 1.5, 2.0]
    assert block_starts(0.3, block=1.0, stride=0.5) == [0]


def test_training_blocks_equal_a_literal_search():
    xyz = np.random.default_rng(0).uniform(0, (2.6, 3.1, 2), (900, 3))
    settings = BlockSettings(num_points=1, min_points=60)
    local, chosen = choose_points(room_of(xyz), "train", settings)
    members = []
    for x in block_starts(local[:, 0].max(), block=1, stride=0.5):
        for y in block_starts(local[:, 1].max(), block=1, stride=0.5):
            inside = (local[:, 0] >= x) & (local[:, 0] <= x + 1) & (local[:, 1] >= y) & (local[:, 1] <= y + 1)
            if inside.sum() >= 60:
                members.append(set(np.flatnonzero(inside)))
    assert len(chosen) == len(members) > 5
    assert all(set(points) <= block for points, block in zip(chosen, members, strict=True))


def test_training_blocks_repeat_points_only_for_want_of_them():
    xyz = np.random.default_rng(0).uniform(0, 0.9, (50, 3))
    _, (few,) = choose_points(room_of(xyz), "train", BlockSettings(num_points=64, min_points=10))
    assert len(few) == 64 and set(few) == set(range(50))
    _, (many,) = choose_points(room_of(xyz), "train", BlockSettings(num_points=32, min_points=10))
    assert len(set(many)) == 32
    assert choose_points(room_of(xyz), "train", BlockSettings(min_points=51))[1] == []


@pytest.mark.parametrize("extent", [(5.02, 3.0), (1.0, 0.2), (2.999999, 4.1)])
def test_test_blocks_cover_all_points_without_thin_strips(extent):
    generator = np.random.default_rng(1)
    xyz = generator.uniform(0, (*extent, 2), (3000, 3))
    xyz[:2, :2] = (0, 0), extent
    local, chosen = choose_points(room_of(xyz + 100), "test", BlockSettings(num_points=128))
    assert set(np.concatenate(chosen)) == set(range(3000))
    for points in chosen:
        reach = np.ptp(local[points, :2], axis=0)
        assert (reach <= 1 + 1e-6).all() and (reach >= 0.8 * np.minimum(extent, 1)).all()


def test_rounding_loses_no_point_at_the_wall():
    side, length = 1.3, 3.953
    assert (length - side) + side < length
    xyz = np.array([[0, 0, 0], [2.0, 2.0, 1], [length, length, 2]])
    _, chosen = choose_points(room_of(xyz), "test", BlockSettings(num_points=4, block=side))
    assert set(np.concatenate(chosen)) == {0, 1, 2}


def test_blocks_depend_on_seed_and_room_alone():
    xyz = np.random.default_rng(0).uniform(0, 2, (500, 3))
    settings = BlockSettings(num_points=16)

    def drawn(name="Area_1_a_1", **changes):
        return np.array(choose_points(room_of(xyz, name), "train", BlockSettings(**{**vars(settings), **changes}))[1])

    np.testing.assert_array_equal(drawn(), drawn())
    assert (drawn() != drawn(seed=2)).any() and (drawn() != drawn("Area_1_a_2")).any()


def test_flat_rooms_and_half_precision(tmp_path):
    xyz = np.random.default_rng(0).uniform(0, 2, (300, 3)) * (1, 1, 0)
    settings = BlockSettings(num_points=16, min_points=1, dtype="float16")
    with h5py.File(write_room(tmp_path, room_of(xyz), "test", settings)) as file:
        data = file["data"][()]
    assert data.dtype == np.float16 and np.isfinite(data).all() and (data[:, :, [2, 8]] == 0).all()


def test_a_room_too_sparse_for_a_block_gets_a_file_without_one(tmp_path):
    xyz = np.random.default_rng(0).uniform(0, 3, (40, 3))
    settings = BlockSettings(num_points=16, min_points=100)
    with h5py.File(write_room(tmp_path, room_of(xyz), "train", settings)) as file:
        assert file["data"].shape == (0, 16, 9) and file["label"].shape == (0, 16)


def test_one_area_alone_says_which_flag_cuts_it(raw, tmp_path):
    root, _ = raw
    for path in root.glob("Area_3"):
        shutil.rmtree(path)
    (root / "Area_1" / ".DS_Store").touch()
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no rooms in .*Area_2; .* holds Area_1: cut these with --areas 1$"):
        main(["--raw", str(root), "--out", str(out)])
    with pytest.raises(DataError, match=rf"is one area; .* --raw {root} --areas 1$"):
        main(["--raw", str(root / "Area_1"), "--out", str(out)])
    assert not out.exists()
    assert main(["--raw", str(root), "--out", str(out), "--areas", "1", *SMALL])["rooms"] == 2


def test_files_of_an_operating_system_are_not_objects(raw):
    root, _ = raw
    folder = root / "Area_3" / "office_1"
    before = read_room(folder, "a")
    (folder / "Annotations" / "._chair_1.txt").write_bytes(b"\0\5\x16\7")
    (folder / "Annotations" / "Thumbs.db").touch()
    np.testing.assert_array_equal(read_room(folder, "a").xyz, before.xyz)
