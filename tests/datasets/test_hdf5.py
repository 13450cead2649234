"""Files that claim more than they hold, point elsewhere, or would make the HDF5 library loop."""

import contextlib
import subprocess
import sys

import h5py
import numpy as np
import pytest

from data.check_data import check
from datasets.hdf5 import FREE_BYTES, hdf5_file, open_hdf5, read_hdf5, read_labeled_clouds, stored_array
from datasets.modelnet import DemoShapes
from datasets.pair_sources import PackedSource
from datasets.s3dis import S3DIS
from tests.support.pairs import write_demo_set
from tests.support.segmentation_sets import write_rooms
from utils.errors import DataError


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = np.ones((2, 3, 3), "f4")
        file["label"] = np.arange(2)
        file.create_dataset("names", data=["one", "two"], dtype=h5py.string_dtype())
    return tmp_path / "a.h5"


def edit(path, change):
    with h5py.File(path, "r+") as file:
        del file["data"]
        change(file)


def external(file):
    # The values are read from another file, here one that everybody has.
    file.create_dataset("data", (2, 3, 3), "f4", external=[("/etc/passwd", 0, 72)])


def outside(file):
    layout = h5py.VirtualLayout((2, 3, 3), "f4")
    layout[:] = h5py.VirtualSource("../b.h5", "data", (2, 3, 3))
    file.create_virtual_dataset("data", layout)


def linked(file):
    with h5py.File(file.filename.replace("a.h5", "b.h5"), "w") as other:
        other["data"] = np.ones((2, 3, 3), "f4")
    file["data"] = h5py.ExternalLink("b.h5", "/data")


CASES = {
    "terabytes": (lambda file: file.create_dataset("data", (2, 10**12, 3), "f4"), "claims 24,000,000,000,000 bytes"),
    "chunks": (
        lambda file: file.create_dataset("data", (2, 9, 3), "f4", chunks=(2, 10**7, 3), maxshape=(2, None, 3)),
        "claims 240,000,000 bytes, but the file holds 0",
    ),
    "external": (external, "stored in another file"),
    "linked": (linked, "stored in another file"),
    "outside": (outside, r"takes values from '\.\./b\.h5', outside"),
    "empty": (lambda file: file.create_dataset("data", data=h5py.Empty("f4")), "not an array"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_does_not_hold_is_refused_before_it_is_read(case, path):
    change, message = CASES[case]
    edit(path, change)
    with pytest.raises(DataError, match=message) as caught:
        read_hdf5(path, ["data"])
    assert str(path) in str(caught.value)


def test_arrays_that_compress_well_are_read(path):
    many = np.zeros(4 * FREE_BYTES, "u1")
    edit(path, lambda file: file.create_dataset("data", data=many, chunks=(1 << 20,), compression="gzip"))
    assert read_hdf5(path, ["data"])["data"].nbytes == many.nbytes
    edit(path, lambda file: file.create_dataset("data", data=np.zeros((9, 0, 3), "f4")))
    with open_hdf5(path) as file:
        assert stored_array(file, "data").shape == (9, 0, 3)


@pytest.mark.parametrize("size", [0, 5, 1 << 40], ids=["no progress", "into its head", "beyond its end"])
def test_a_damaged_heap_of_texts_is_an_error_and_no_endless_loop(path, size):
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    first = heap + 16 + 16 + 8  # after the heap's head, an object's head and its three letters
    assert content[heap + 32 : heap + 35] in (b"one", b"two")
    content[first : first + 2] = bytes(2)  # object 0: the rest of the heap
    content[first + 8 : first + 16] = size.to_bytes(8, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="a.h5 cannot be read.*heap of strings is damaged"):
        read_hdf5(path, ["data"])


def test_the_letters_of_a_heap_in_large_data_are_no_heap(path):
    data = np.frombuffer(b"GCOL\1\0\0\0" + bytes([40] * 8), "u1")
    edit(path, lambda file: file.create_dataset("data", data=np.resize(data, FREE_BYTES)))
    assert len(read_hdf5(path, ["data"])["data"]) == FREE_BYTES


def test_labels_of_an_unnamed_set_stay_in_sensible_numbers(path):
    with h5py.File(path, "r+") as file:
        file["label"][1] = 2**40
    with pytest.raises(DataError, match="'label' goes up to 1099511627776"):
        read_labeled_clouds(path, num_classes=None)


@contextlib.contextmanager
def held_open(*paths, mode="r+", **options):
    """Another program that has opened files for writing."""
    code = (
        f"import h5py, sys; kept = [h5py.File(p, {mode!r}, **{options!r}) for p in sys.argv[1:]]; "
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        yield
        process.stdin.close()


def test_a_file_that_another_program_writes_is_said_to_be_in_use(tmp_path):
    write_demo_set(tmp_path, points=12, train=2, test=1)
    write_rooms(tmp_path, ["Area_1_office_1"], points=8, whole=False)
    demo = tmp_path / "demo_hdf5" / "ply_data_train0.h5"
    block = next((tmp_path / "indoor3d_sem_seg_hdf5_data").glob("*.h5"))
    blocks = S3DIS(tmp_path, [1], in_channels=9)  # opened before the other program comes
    with held_open(demo, block):
        for read, path in (
            (lambda: DemoShapes(tmp_path, "train"), demo),
            (lambda: PackedSource(demo), demo),
            (lambda: S3DIS(tmp_path, [1], in_channels=9), block),
            (lambda: blocks[0], block),
        ):
            with pytest.raises(DataError, match=f"^{path} is in use: another program has it open for writing"):
                read()
        problems = [problem for row in check(tmp_path).values() for problem in row.problems]
        assert len(problems) == 2 and all("is in use" in problem for problem in problems)
    assert len(DemoShapes(tmp_path, "train")) == 6


def test_the_mark_of_a_writer_that_was_killed_is_named(path):
    with held_open(path, mode="w", libver="latest"):
        with pytest.raises(DataError, match="is in use.*h5clear"), hdf5_file(path):
            pass


def test_a_file_system_without_locks_is_named(path, monkeypatch):
    def refuse(*_):
        raise OSError("Unable to synchronously open file (unable to lock file, errno = 37, error message = 'No locks')")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(DataError, match=f"{path} is on a file system without file locks.*HDF5_USE_FILE_LOCKING"):
        hdf5_file(path)
