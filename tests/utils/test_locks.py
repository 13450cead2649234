"""Two commands that write the same place at once: the second one is refused and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest

from data import make_shapes, prepare_meshes, unpack
from datasets import pack
from tests.support.files import contents
from tests.support.paths import ROOT
from utils import locks
from utils.errors import UserError
from utils.locks import locked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks")
HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from utils.locks import locked
with locked(sys.argv[2]):
    print("locked", flush=True)
    sys.stdin.readline()
"""
SQUARE = "OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"
SHAPES = ["--shapes", "2", "--workers", "0", "--pictures", "splats", "--num_points", "16", "--image_size", "8"]


@pytest.fixture
def hold():
    """Lock a path in another process until the test ends."""
    others = []

    def start(path):
        command = [sys.executable, "-c", HOLD, str(ROOT), str(path)]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[-1].stdout.readline() == "locked\n"
        return others[-1]

    yield start
    for other in others:
        other.communicate("\n")


def test_a_lock_ends_with_its_block_or_its_process(tmp_path, hold):
    file = tmp_path / "new folder" / "a.h5"
    other = hold(file)
    with pytest.raises(UserError, match=f"another process .process {other.pid} on .* writes {file}: wait"):
        with locked(file):
            pass
    other.kill()
    other.wait()
    with locked(file), locked(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert contents(tmp_path) == {"new folder": None}


@pytest.mark.parametrize("another", [False, True])
def test_a_file_that_its_last_owner_removes_meanwhile_is_made_again(tmp_path, monkeypatch, another):
    file, lockf, taken = tmp_path / "a.lock", locks.fcntl.lockf, []

    def late(opened, flags):
        taken.append(os.fstat(opened.fileno()).st_ino)
        lockf(opened, flags)
        if len(taken) == 1:
            file.rename(tmp_path / "removed")  # which keeps its number from being used again
            if another:
                file.touch()

    monkeypatch.setattr(locks.fcntl, "lockf", late)
    unlock = locks.lock(file, "writes here")
    assert len(taken) == 2 and file.stat().st_ino == taken[1]
    unlock()
    assert not file.exists()


def test_a_path_that_cannot_be_locked_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot write .*aaa"), locked(tmp_path / ("a" * 300)):
        pytest.fail("the block ran")


def test_shapes_are_not_made_twice_at_once(tmp_path, hold):
    out = tmp_path / "shapes.h5"
    hold(out)
    with pytest.raises(UserError, match="another process"):
        make_shapes.main([*SHAPES, "--out", str(out)])
    assert not (tmp_path / "shapes.h5.blocks").exists()


def test_pairs_are_not_packed_twice_at_once(tmp_path, hold):
    make_shapes.main([*SHAPES, "--out", str(tmp_path / "shapes.h5")])
    hold(tmp_path / "packed.h5")
    with pytest.raises(UserError, match="another process"):
        pack.main(["--data_root", str(tmp_path / "shapes.h5"), "--out", str(tmp_path / "packed.h5")])


def test_meshes_are_not_prepared_twice_at_once(tmp_path, hold):
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "a.off").write_text(SQUARE)
    out = tmp_path / "out"
    out.mkdir()
    hold(out)
    with pytest.raises(UserError, match="another process"):
        prepare_meshes.main(["--meshes", str(tmp_path / "meshes"), "--out", str(out), "--views", "0"])
    assert contents(out) == {}


def test_archives_are_not_unpacked_twice_at_once(tmp_path, hold):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("modelnet40_ply_hdf5_2048/shape_names.txt", "chair")
    hold(tmp_path / "data" / unpack.STAGING / "a.zip")
    with pytest.raises(UserError, match="another process"):
        unpack.main([str(archive), "--data_root", str(tmp_path / "data")])
    assert not (tmp_path / "data" / "modelnet40_ply_hdf5_2048").exists()
