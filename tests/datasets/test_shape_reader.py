import os
import time

import numpy as np
import pytest
import trimesh

from datasets import shape_reader as module
from datasets.shape_reader import choose_rows, read_shape, read_shapes, to_unit_sphere
from tests.support.pairs import cloud, write_ply
from tests.support.shape_files import FORMATS, write_shape
from utils.errors import DataError


def same_points(a, b):
    """Whether two clouds hold the same points, in any order."""
    return np.allclose(*(np.array(sorted(np.asarray(x).round(4).tolist())) for x in (a, b)), atol=2e-4)


@pytest.mark.parametrize("suffix", [f for f in FORMATS if f != "off"] + ["csv", "asc", "pts"])
def test_clouds_of_every_format_come_to_the_unit_sphere(tmp_path, suffix):
    points = cloud(1, 40)
    path = tmp_path / f"a.{suffix}"
    write_shape(path, points)
    read, size = read_shape(path, 40, "a")
    assert size == 40 and same_points(read, to_unit_sphere(points.astype("f8")))
    assert np.linalg.norm(read, axis=1).max() == pytest.approx(1, abs=1e-4)


TEXTS = {
    "commas": "1.5,2,3\n4,5,6\n",
    "commas and blanks": "1.5, 2, 3\r\n4, 5, 6\r\n",
    "semicolons": "1.5;2;3\n4;5;6\n",
    "a heading": "x,y,z\n1.5,2,3\n4,5,6\n",
    "a count": "2\n1.5 2 3\n4 5 6\n",
    "comments": "# Möbel\n// scan\n1.5 2 3\n4 5 6\n",
    "normals": "1.5 2 3 0 0 1\n4 5 6 0 1 0\n",
    "decimal commas": "1,5 2,0 3,0\n4,0 5,0 6,0\n",
    "decimal commas and semicolons": "1,5;2,0;3,0\n4,0;5,0;6,0\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("what", TEXTS)
def test_texts_as_programs_write_them(tmp_path, what, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[what].encode(encoding))
    assert same_points(read_shape(path, 2, "a")[0], to_unit_sphere(np.array([[1.5, 2, 3], [4, 5, 6]])))


def test_meshes_are_sampled_evenly_by_area(tmp_path):
    mesh = trimesh.creation.box((4, 2, 1))
    for suffix in ("off", "obj", "stl", "glb", "ply"):
        mesh.export(tmp_path / f"box.{suffix}")
        points, size = read_shape(tmp_path / f"box.{suffix}", 3000, "box")
        assert size == 3000 and points.shape == (3000, 3)
        # Areas of the sides: 2 x 8, 2 x 4, 2 x 2. The corners of the box are not its points.
        ends = np.stack([points.min(0), points.max(0)])[:, None]
        share = (np.abs(points - ends).min(0) < 1e-3).mean(0)
        np.testing.assert_allclose(share, [4 / 28, 8 / 28, 16 / 28], atol=0.04)


def test_smaller_clouds_repeat_and_fewer_points_are_the_first_of_more(tmp_path):
    for name in ("a", "b"):
        order = choose_rows(5, 12, name)
        assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
        np.testing.assert_array_equal(choose_rows(5, 3, name), order[:3])
    assert choose_rows(50, 50, "a").tolist() != choose_rows(50, 50, "b").tolist()
    write_shape(tmp_path / "a.xyz", cloud(1, 5))
    points, size = read_shape(tmp_path / "a.xyz", 12, "a")
    assert size == 5 and len({tuple(row) for row in points.tolist()}) == 5


BAD = {
    "cut.off": ("OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1", "not a readable mesh"),
    "lost.off": ("OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n", "promises 4 faces and holds 2"),
    "flat.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "no surface"),
    "beyond.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "not a readable mesh"),
    "words.txt": ("one two three\n", "words.txt"),
    "two.xyz": ("1 2\n3 4\n", "two.xyz"),
    "far.xyz": ("1 2 3\n1e17 0 0\n", "beyond 1e\\+15"),
    "empty.txt": ("", "empty.txt"),
    "a.npy": ("hello", "a.npy"),
    "a.pcd": ("hello", "a.pcd"),
    "a.stl": ("solid\n", "not a readable mesh"),
    "a.glb": ("hello", "not a readable mesh"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_shape(tmp_path / name, 10, "a")
    assert name in str(caught.value)


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="a.npy"):
        read_shape(tmp_path / "a.npy", 10, "a")


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Make three files, and a reader that records what it reads; the cache keeps all."""
    monkeypatch.setattr(module, "_SECONDS", 0)
    files = [tmp_path / "set" / f"{i}.ply" for i in range(3)]
    for i, path in enumerate(files):
        write_ply(path, cloud(i, 10 + i))
    reads = []

    def read(path, rows, name):
        reads.append(name)
        return read_shape(path, rows, name)

    def load(**changes):
        reads.clear()
        arrays = read_shapes(
            files, **{"folder": tmp_path / "set", "rows": 11, "split": "train", "how": "test", "read": read, **changes}
        )
        return arrays, list(reads)

    return tmp_path / "set", files, load


def test_what_was_read_is_kept_until_a_file_changes(counted):
    folder, files, load = counted
    first, reads = load()
    assert reads == ["0.ply", "1.ply", "2.ply"] and first.sizes.tolist() == [10, 11, 12]
    assert first.points.shape == (3, 11, 3) and first.points.dtype == np.float32
    second, reads = load()
    assert reads == []
    np.testing.assert_array_equal(second.points, first.points)
    np.testing.assert_array_equal(second.sizes, first.sizes)
    assert len(load(how="other")[1]) == len(load(rows=5)[1]) == 3
    write_ply(files[1], cloud(9, 20))
    os.utime(files[1], ns=(time.time_ns(), time.time_ns() + 10**9))
    third, reads = load()
    assert len(reads) == 3 and third.sizes.tolist() == [10, 20, 12]
    kept = list((folder / ".parsed").iterdir())
    assert len(kept) == 2  # 11 and 5 points: what is kept of changed files goes
    for path in kept:
        path.write_bytes(path.read_bytes()[:200])  # damaged: read again
    assert len(load()[1]) == 3


def test_a_folder_that_cannot_be_written_is_read_all_the_same(counted, tmp_path, monkeypatch):
    folder, _, load = counted
    (folder / ".parsed").write_text("in the way")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    assert load()[0].sizes.tolist() == [10, 11, 12] and len(load()[1]) == 3
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert load()[1] and not load()[1]


def test_small_sets_leave_nothing_behind(counted, monkeypatch):
    folder, files, load = counted
    monkeypatch.setattr(module, "_SECONDS", 60)
    load()
    assert sorted(folder.iterdir()) == files
