import pickle
import re

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import s3dis
from datasets.s3dis import CLASS_COLORS, CLASS_NAMES, S3DIS, S3DISRooms, area_of, split_rooms
from datasets.s3dis_prepare import BlockSettings, Room, room_file, write_lists, write_room
from utils.errors import DataError, UserError

FOLDER = "indoor3d_sem_seg_hdf5_data"
N = 16
ROOMS = ["Area_1_office_1"] * 3 + ["Area_2_hall_1"] * 2 + ["Area_1_office_2"] * 2 + ["Area_2_hall_1"]


def write_blocks(path, count, *, seed=0, chunks=None, **arrays):
    """Write one file in the published form; ``arrays`` replaces or (None) removes its arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    content = {
        "data": generator.uniform(-1, 1, (count, N, 9)).astype("f4"),
        "label": generator.integers(13, size=(count, N)).astype("u1"),
    } | arrays
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            if value is not None:
                file.create_dataset(key, data=value, chunks=chunks if key == "data" else None)
    return content


@pytest.fixture
def root(tmp_path):
    """Two files of five and three blocks, listed in order with the folder's name, rooms of two areas mixed."""
    folder = tmp_path / FOLDER
    content = [write_blocks(folder / f"ply_data_all_{i}.h5", count, seed=i) for i, count in enumerate((5, 3))]
    (folder / "all_files.txt").write_text("".join(f"{FOLDER}/ply_data_all_{i}.h5\n" for i in range(2)))
    (folder / "room_filelist.txt").write_text("".join(f"{room}\n" for room in ROOMS))
    data, label = (np.concatenate([c[key] for c in content]) for key in ("data", "label"))
    return tmp_path, data, label


def blocks_of(dataset):
    return tuple(np.stack([item[part].numpy() for item in dataset]) for part in (0, 1))


# --- training blocks ---


def test_blocks_of_chosen_areas_in_order(root):
    path, data, label = root
    for areas, rows in (([1], [0, 1, 2, 5, 6]), ([2], [3, 4, 7]), ([2, 1, 2], list(range(8)))):
        dataset = S3DIS(path, areas, in_channels=9)
        blocks, labels = blocks_of(dataset)
        np.testing.assert_array_equal(blocks, data[rows])
        np.testing.assert_array_equal(labels, label[rows])
        np.testing.assert_array_equal(dataset.labels, label[rows])
        assert dataset.block_rooms == tuple(ROOMS[row] for row in rows)
        assert (blocks.dtype, labels.dtype) == (np.float32, np.int64)
    assert S3DIS(path, [1]).rooms == ("Area_1_office_1", "Area_1_office_2")
    assert "areas 1: 5 blocks of 16 points in 2 rooms" in repr(S3DIS(path / FOLDER, [1]))


def test_three_channels_are_the_first_three(root):
    path, data, _ = root
    np.testing.assert_array_equal(blocks_of(S3DIS(path, [1, 2]))[0], data[:, :, :3])
    with pytest.raises(UserError, match="3 channels .* or 9, got 6"):
        S3DIS(path, [1], in_channels=6)


def test_num_points_takes_the_first_rows(root):
    path, data, label = root
    dataset = S3DIS(path, [1, 2], in_channels=9, num_points=5)
    blocks, labels = blocks_of(dataset)
    np.testing.assert_array_equal(blocks, data[:, :5])
    np.testing.assert_array_equal(labels, label[:, :5])
    np.testing.assert_array_equal(dataset.labels, label[:, :5])
    with pytest.raises(UserError, match=r"--num_points 17 is too large.* have 16"):
        S3DIS(path, [1], num_points=17)
    with pytest.raises(UserError, match="at least 1"):
        S3DIS(path, [1], num_points=0)


def test_chosen_rooms(root):
    path, data, _ = root
    dataset = S3DIS(path, [1], in_channels=9, rooms=["Area_1_office_2"])
    assert dataset.rooms == ("Area_1_office_2",)
    np.testing.assert_array_equal(blocks_of(dataset)[0], data[[5, 6]])
    with pytest.raises(UserError, match="no room Area_2_hall_1 in areas 1 of"):
        S3DIS(path, [1], rooms=["Area_2_hall_1"])
    with pytest.raises(UserError, match="no room was chosen"):
        S3DIS(path, [1], rooms=[])


def test_an_area_without_rooms(root):
    path, _, _ = root
    with pytest.raises(DataError, match=r"no room of area 5; it has rooms of the areas 1, 2.*s3dis_prepare"):
        S3DIS(path, [1, 5])
    with pytest.raises(UserError, match="no area was chosen"):
        S3DIS(path, [])


@pytest.mark.parametrize("chunks", [None, (5, 4, 3)])
def test_workers_read_the_same_blocks(root, chunks):
    path, data, label = root
    write_blocks(path / FOLDER / "ply_data_all_0.h5", 5, chunks=chunks, data=data[:5], label=label[:5])
    dataset = S3DIS(path, [1, 2], in_channels=9)
    blocks_of(dataset)  # handles and maps are open when the processes start, and a fork must not use them
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([batch[0] for batch in batches]), data)
    np.testing.assert_array_equal(torch.cat([batch[1] for batch in batches]), label)
    # What a spawned worker is sent: no handle and no data.
    sent = pickle.dumps(dataset)
    assert len(sent) < data.nbytes
    np.testing.assert_array_equal(blocks_of(pickle.loads(sent))[0], data)


def test_a_handle_does_not_cross_a_fork(root, monkeypatch):
    path, data, _ = root
    dataset = S3DIS(path, [1, 2], in_channels=9)
    opened = []
    real = h5py.File
    monkeypatch.setattr(s3dis.h5py, "File", lambda *args: opened.append(args) or real(*args))
    dataset[0], dataset[1]
    assert len(opened) == 1
    child = s3dis.os.getpid() + 1
    monkeypatch.setattr(s3dis.os, "getpid", lambda: child)
    np.testing.assert_array_equal(dataset[1][0], data[1])
    assert len(opened) == 2


def test_nothing_is_read_before_it_is_asked_for(root):
    path, data, _ = root
    broken = data.copy()
    broken[6, 2, 8] = np.nan
    write_blocks(path / FOLDER / "ply_data_all_1.h5", 3, data=broken[5:])
    dataset = S3DIS(path, [1], in_channels=9)
    np.testing.assert_array_equal(dataset[3][0], data[5])
    with pytest.raises(DataError, match=r"ply_data_all_1\.h5, block 1 \(Area_1_office_2\): 'data' .* non-finite"):
        dataset[4]


# --- files with many blocks to a chunk, as the published ones ---


def write_published(path, data, label):
    """Write the second file with chunks that hold several blocks."""
    write_blocks(path / FOLDER / "ply_data_all_0.h5", 5, data=data[:5], label=label[:5], chunks=(5, 8, 3))


def test_published_files_are_unpacked_once_and_when_needed(root, monkeypatch):
    path, data, label = root
    write_published(path, data, label)
    files = {file: file.read_bytes() for file in (path / FOLDER).iterdir()}
    S3DIS(path, [1], in_channels=9, rooms=["Area_1_office_2"])
    assert not (path / FOLDER / ".unpacked").exists()
    dataset = S3DIS(path, [2], in_channels=9)
    np.testing.assert_array_equal(blocks_of(dataset)[0], data[[3, 4, 7]])
    unpacked = {file: file.stat().st_mtime_ns for file in (path / FOLDER / ".unpacked").iterdir()}
    assert sorted(file.name.rsplit("-", 2)[0] for file in unpacked) == ["ply_data_all_0-data9", "ply_data_all_0-label"]
    np.testing.assert_array_equal(blocks_of(S3DIS(path, [1], in_channels=9))[0], data[[0, 1, 2, 5, 6]])
    assert {file: file.stat().st_mtime_ns for file in (path / FOLDER / ".unpacked").iterdir()} == unpacked
    np.testing.assert_array_equal(blocks_of(S3DIS(path, [1]))[0], data[[0, 1, 2, 5, 6], :, :3])
    assert {file: file.read_bytes() for file in (path / FOLDER).iterdir() if file.is_file()} == files


def test_a_changed_file_is_unpacked_again(root):
    path, data, label = root
    write_published(path, data, label)
    np.testing.assert_array_equal(S3DIS(path, [1], in_channels=9)[0][0], data[0])
    write_published(path, -data, label)
    np.testing.assert_array_equal(S3DIS(path, [1], in_channels=9)[0][0], -data[0])


def test_where_the_data_cannot_be_written_the_temporary_folder_is_used(root, tmp_path, monkeypatch):
    path, data, label = root
    write_published(path, data, label)
    (path / FOLDER / ".unpacked").write_text("a file where the folder would be")
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(elsewhere))
    np.testing.assert_array_equal(S3DIS(path, [1], in_channels=9)[0][0], data[0])
    (folder,) = elsewhere.iterdir()
    assert len(list(folder.iterdir())) == 2 and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"ply_data_all_0\.h5 must be unpacked .*no folder is writable"):
        S3DIS(path, [1], in_channels=9)


# --- damage ---


def damaged_files():
    data, label = np.zeros((5, N, 9), "f4"), np.zeros((5, N), "u1")
    return {
        "no label": ({"label": None}, r"no array 'label' \(it holds 'data'\)"),
        "no data": ({"data": None}, "no array 'data'"),
        "six values": ({"data": data[:, :, :6]}, r"'data' \(5, 16, 6\) float32, .* expected .* \(n, N, 9\)"),
        "fewer labels": ({"label": label[:4]}, r"'label' \(4, 16\) uint8; expected"),
        "whole values": ({"data": data.astype("i4")}, r"'data' \(5, 16, 9\) int32, .*expected an HDF5 file"),
        "broken labels": ({"label": label.astype("f4")}, r"'label' \(5, 16\) float32; expected .* of integers"),
        "more blocks": ({"data": np.tile(data, (2, 1, 1)), "label": np.tile(label, (2, 1))}, "of 8 blocks, .* hold 13"),
        "other size": ({"data": data[:, :8], "label": label[:, :8]}, r"mixes blocks of \[8, 16\] points"),
        "empty": ({"data": data[:0], "label": label[:0]}, "expected an HDF5 file"),
    }


@pytest.mark.parametrize("case", damaged_files())
def test_damaged_files_are_named(root, case):
    path, _, _ = root
    arrays, message = damaged_files()[case]
    write_blocks(path / FOLDER / "ply_data_all_0.h5", 5, **arrays)
    with pytest.raises(DataError, match=message) as error:
        S3DIS(path, [1])
    assert FOLDER in str(error.value) and re.search("s3dis_prepare|check_data", str(error.value))


@pytest.mark.parametrize("wrong", [13, 200])
def test_an_unknown_class_is_named(root, wrong):
    path, _, label = root
    label[1, 3] = wrong
    write_blocks(path / FOLDER / "ply_data_all_0.h5", 5, label=label[:5])
    dataset = S3DIS(path, [1])
    assert dataset[0][1].max() < 13
    for read in (lambda: dataset[1], lambda: dataset.labels):
        with pytest.raises(
            DataError, match=rf"block 1 \(Area_1_office_1\): 'label' .* in 0..12, but is in \d+..{wrong}"
        ):
            read()


def test_missing_files_and_lists_are_named(root):
    path, _, _ = root
    with pytest.raises(DataError, match=f"no S3DIS blocks in .*{FOLDER}.*download_data.sh s3dis.*s3dis_prepare"):
        S3DIS(path / "absent", [1])
    rooms = path / FOLDER / "room_filelist.txt"
    rooms.write_text("Area_1_office_1\n" * 7 + "office\n")
    with pytest.raises(DataError, match=r"room_filelist\.txt, entry 8 is 'office'; expected a room such as"):
        S3DIS(path, [1])
    rooms.unlink()
    with pytest.raises(DataError, match=r"room_filelist\.txt is missing; it names the room of every block"):
        S3DIS(path, [1])
    first = path / FOLDER / "ply_data_all_0.h5"
    first.write_bytes(first.read_bytes()[:600])
    with pytest.raises(DataError, match=r"ply_data_all_0\.h5 cannot be read; it may be truncated"):
        S3DIS(path, [1])
    first.unlink()
    with pytest.raises(DataError, match=r"ply_data_all_0\.h5 is missing; all_files\.txt lists it"):
        S3DIS(path, [1])


# --- whole rooms ---


@pytest.fixture
def whole(tmp_path):
    """Two rooms of area 1 and one of area 4 as test blocks; the rooms by name."""
    rooms = {}
    for seed, name in enumerate(("Area_1_b_1", "Area_1_a_1", "Area_4_c_1")):
        generator = np.random.default_rng(seed)
        xyz = generator.uniform(0, (1.7, 1.2, 2), (150 + seed, 3)) + 40
        rgb, labels = generator.integers(256, size=xyz.shape), generator.integers(13, size=len(xyz))
        rooms[name] = Room(name, xyz, rgb.astype(np.float32), labels.astype(np.uint8))
        write_room(tmp_path, rooms[name], "test", BlockSettings(num_points=N))
    write_lists(room_file(tmp_path, "test", "x").parent)
    return tmp_path, rooms


def test_predictions_of_blocks_come_together_as_rooms(whole):
    path, rooms = whole
    dataset = S3DISRooms(path, 1)
    assert dataset.rooms == ("Area_1_a_1", "Area_1_b_1")
    labels = [np.full(dataset.room_size(room), -1) for room in range(2)]
    for block, truth, index, room in dataset:
        assert block.shape == (N, 3) and (truth.dtype, index.dtype) == (torch.int64, torch.int64)
        labels[room][index] = truth
    for room, name in enumerate(dataset.rooms):
        np.testing.assert_array_equal(labels[room], rooms[name].labels)
        own = [dataset[i][3] for i in dataset.blocks_of(room)]
        assert set(own) == {room}
    assert sum(len(dataset.blocks_of(room)) for room in range(2)) == len(dataset)


def test_room_cloud_is_the_room(whole):
    path, rooms = whole
    dataset = S3DISRooms(path, 4)
    points, labels = dataset.room_cloud(0)
    room = rooms["Area_4_c_1"]
    np.testing.assert_allclose(points[:, :3], room.xyz - room.xyz.min(axis=0), atol=1e-5)
    np.testing.assert_allclose(points[:, 3:], room.rgb / 255, atol=1e-6)
    np.testing.assert_array_equal(labels, room.labels)
    assert "area 4: 1 rooms, 152 points" in repr(dataset)


def test_nine_channels_of_rooms(whole):
    path, rooms = whole
    block, _, index, room = S3DISRooms(path, 1, in_channels=9)[0]
    xyz = rooms["Area_1_a_1"].xyz
    np.testing.assert_allclose(block[:, 6:], ((xyz - xyz.min(0)) / np.ptp(xyz, axis=0))[index], atol=1e-6)
    with pytest.raises(UserError, match="or 9, got 4"):
        S3DISRooms(path, 1, in_channels=4)


def test_rooms_that_are_not_there_name_the_command(whole, tmp_path):
    path, _ = whole
    with pytest.raises(DataError, match=r"no room of area 2; .* areas 1, 4.*s3dis_prepare .* --only test --areas 2"):
        S3DISRooms(path, 2)
    with pytest.raises(DataError, match=r"no test blocks of whole .*python -m datasets\.s3dis_prepare --raw .* --out"):
        S3DISRooms(tmp_path / "absent", 1)


def test_damaged_rooms_are_named(whole):
    path, _ = whole
    file = room_file(path, "test", "Area_4_c_1")
    with h5py.File(file, "r+") as h5:
        index = h5["index"][()]
        h5["index"][0] = 152
    with pytest.raises(DataError, match=r"Area_4_c_1\.h5, block 0 .*'index' must be in 0\.\.151, but is in 152\.\.152"):
        S3DISRooms(path, 4)[0]
    with h5py.File(file, "r+") as h5:
        h5["index"][()] = np.where(index == 7, 8, index)
    with pytest.raises(DataError, match="1 of the 152 points of Area_4_c_1 are in no block"):
        S3DISRooms(path, 4).room_cloud(0)
    with h5py.File(file, "r+") as h5:
        h5.attrs["room"] = "Area_4_d_1"
    with pytest.raises(DataError, match=r"holds Area_4_d_1, but room_filelist\.txt says Area_4_c_1"):
        S3DISRooms(path, 4)
    with h5py.File(file, "r+") as h5:
        del h5.attrs["room_points"]
    with pytest.raises(DataError, match="lacks the attributes"):
        S3DISRooms(path, 4)


# --- rooms and classes ---


def test_split_rooms_takes_the_same_part_of_every_area():
    rooms = [f"Area_{area}_office_{i}" for area, count in ((1, 40), (2, 10), (3, 2), (5, 1)) for i in range(count)]
    train, held_out = split_rooms(rooms, fraction=0.2, seed=3)
    assert sorted(train + held_out) == sorted(rooms)
    assert {area: sum(area_of(r) == area for r in held_out) for area in (1, 2, 3, 5)} == {1: 8, 2: 2, 3: 1, 5: 0}
    assert split_rooms(reversed(rooms), fraction=0.2, seed=3) == (train, held_out)
    assert split_rooms(rooms, fraction=0.2, seed=4)[1] != held_out
    few = [room for room in rooms if area_of(room) in (1, 2)]
    # What an area gives does not depend on the other areas of the fold.
    assert set(split_rooms(few, fraction=0.2, seed=3)[1]) < set(held_out)


def test_areas_of_the_same_rooms_hold_out_different_ones():
    _, held_out = split_rooms([f"Area_{area}_office_{i}" for area in (1, 2) for i in range(40)], fraction=0.25, seed=1)
    chosen = {area: {room.split("_", 2)[2] for room in held_out if area_of(room) == area} for area in (1, 2)}
    assert chosen[1] != chosen[2]


def test_split_rooms_that_cannot_be_done():
    with pytest.raises(UserError, match="no area has two rooms"):
        split_rooms(["Area_1_a_1", "Area_2_a_1"])
    with pytest.raises(UserError, match="between 0 and 1"):
        split_rooms(["Area_1_a_1", "Area_1_b_1"], fraction=1.0)
    with pytest.raises(ValueError, match="Area_N_name"):
        split_rooms(["office"])


def test_classes_have_distinct_colors():
    assert len(CLASS_NAMES) == 13 and CLASS_COLORS.shape == (13, 3)
    assert CLASS_COLORS.min() >= 0 and CLASS_COLORS.max() <= 1
    distance = np.abs(CLASS_COLORS[:, None] - CLASS_COLORS[None]).sum(axis=2) + 10 * np.eye(13)
    assert distance.min() > 0.1
