"""Archives: which are refused, where the members of each data set go, and what happens to existing files."""

import gzip
import io
import os
import shutil
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import unpack as module
from data.unpack import KNOWN_MD5, STAGING, extract, file_md5, main, peek, unpack
from utils.errors import DataError

LAYOUTS = {
    "shapenet": {
        "ShapeNet/02691156/a.ply": "ShapeNet/02691156/a.ply",
        "./ShapeNet/03001627/b.ply": "ShapeNet/03001627/b.ply",
    },
    "shapenet_render": {
        "ShapeNetRendering/02691156/a/rendering/00.png": "ShapeNetRendering/02691156/a/rendering/00.png",
        "x/02691156/a/rendering/renderings.txt": "ShapeNetRendering/02691156/a/rendering/renderings.txt",
    },
    "modelnet40": {
        "data/modelnet40_ply_hdf5_2048/ply_data_train9.h5": "modelnet40_ply_hdf5_2048/ply_data_train9.h5",
        "data/modelnet40_ply_hdf5_2048/shape_names.txt": "modelnet40_ply_hdf5_2048/shape_names.txt",
    },
    "modelnet40 of PointCloudDatasets": {
        "modelnet40_hdf5_2048/train0.h5": "modelnet40_hdf5_2048/train0.h5",
        "modelnet40_hdf5_2048/train0_id2name.json": "modelnet40_hdf5_2048/train0_id2name.json",
    },
    "modelnet40 as text": {
        "x/modelnet40_normal_resampled/modelnet40_train.txt": "modelnet40_normal_resampled/modelnet40_train.txt",
        "x/modelnet40_normal_resampled/xbox/xbox_0001.txt": "modelnet40_normal_resampled/xbox/xbox_0001.txt",
    },
    "modelnet40 as meshes": {
        "ModelNet40/xbox/train/xbox_0001.off": "ModelNet40/xbox/train/xbox_0001.off",
        "ModelNet40/xbox/test/xbox_0104.off": "ModelNet40/xbox/test/xbox_0104.off",
    },
    "modelnet10 as meshes": {"ModelNet10/bed/train/bed_0001.off": "ModelNet10/bed/train/bed_0001.off"},
    "modelnet10 of PointCloudDatasets": {"modelnet10_hdf5_2048/test0.h5": "modelnet10_hdf5_2048/test0.h5"},
    "shapenetpart of PointCloudDatasets": {"shapenetpart_hdf5_2048/val0.h5": "shapenetpart_hdf5_2048/val0.h5"},
    "shapenetpart": {
        "hdf5_data/ply_data_train9.h5": "shapenet_part_seg_hdf5_data/ply_data_train9.h5",
        "hdf5_data/train_hdf5_file_list.txt": "shapenet_part_seg_hdf5_data/train_hdf5_file_list.txt",
    },
    "scanobjectnn": {
        "h5_files/main_split_nobg/test_objectdataset.h5": "ScanObjectNN/main_split_nobg/test_objectdataset.h5",
        "ScanObjectNN/main_split/train.h5": "ScanObjectNN/main_split/train.h5",
    },
    "s3dis": {
        "indoor3d_sem_seg_hdf5_data/ply_data_all_0.h5": "indoor3d_sem_seg_hdf5_data/ply_data_all_0.h5",
        "indoor3d_sem_seg_hdf5_data/room_filelist.txt": "indoor3d_sem_seg_hdf5_data/room_filelist.txt",
    },
}


def make_tar(path, members):
    """Write a tar.gz; a value is bytes, or a TarInfo to be stored as it is."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def make_zip(path, members):
    """Write a zip file; a key is a name or a ZipInfo."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_plain_tar(path, members):
    """Write an uncompressed tar file, in which no checksum guards names and contents."""
    path.write_bytes(gzip.decompress(make_tar(path, members).read_bytes()))
    return path


def tree(folder):
    """Return every file and folder below ``folder``, by relative name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("name", LAYOUTS)
def test_members_of_every_set_go_where_its_reader_looks(tmp_path, name, make):
    contents = {member: member.encode() for member in LAYOUTS[name]}
    targets, name = LAYOUTS[name], name.split()[0]
    # The file name says nothing about the set, or even about the kind of archive.
    archive = make(tmp_path / "download", contents)
    report = unpack(archive, tmp_path / "root", expect=name)
    assert report == {"sets": {name: len(contents)}, "kept": 0, "left_out": 0}
    expected = {target: member.encode() for member, target in targets.items()}
    found = files_in(tmp_path / "root")
    assert found == expected
    assert peek(archive) == name


def test_several_sets_in_one_archive_and_files_of_none(tmp_path):
    members = {member: b"x" for name in ("modelnet40", "scanobjectnn") for member in LAYOUTS[name]}
    archive = make_tar(tmp_path / "a", {**members, "README.txt": b"hello", "__MACOSX/._x": b"", "ShapeNet/": b""})
    report = unpack(archive, tmp_path / "root")
    assert report == {"sets": {"modelnet40": 2, "scanobjectnn": 2}, "kept": 0, "left_out": 2}
    assert not (tmp_path / "root" / "README.txt").exists()
    assert peek(archive) is None
    with pytest.raises(DataError, match="gone.zip is missing"):
        peek(tmp_path / "gone.zip")


def link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


UNSAFE = {
    "absolute": (make_tar, {"/tmp/evil.ply": b"x"}, "absolute"),
    "parent": (make_tar, {"ShapeNet/../../evil.ply": b"x"}, "'..'"),
    "symlink": (make_tar, {"l": link("ShapeNet/02691156", tarfile.SYMTYPE)}, "is a link"),
    "hardlink": (make_tar, {"l": link("ShapeNet/02691156/a.ply", tarfile.LNKTYPE)}, "is a link"),
    "device": (make_tar, {"d": link("ShapeNet/null", tarfile.CHRTYPE)}, "not a regular file"),
    "fifo": (make_tar, {"d": link("ShapeNet/pipe", tarfile.FIFOTYPE)}, "not a regular file"),
    "backslash": (make_tar, {"..\\evil.ply": b"x"}, "not a plain path"),
    "zip absolute": (make_zip, {"/evil.ply": b"x"}, "absolute"),
    "zip drive": (make_zip, {"C:/evil.ply": b"x"}, "absolute"),
    "zip parent": (make_zip, {"a/../../evil.ply": b"x"}, "'..'"),
    "zip link": (make_zip, {zip_link("ShapeNet"): b"/etc"}, "is a link"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_members_are_refused_and_nothing_is_left(tmp_path, case):
    make, members, reason = UNSAFE[case]
    good = {"modelnet40_ply_hdf5_2048/ply_data_train9.h5": b"x", "modelnet40_ply_hdf5_2048/shape_names.txt": b"x"}
    archive = make(tmp_path / "archive", {**good, **members})
    root = tmp_path / "root"
    root.mkdir()
    before = tree(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        unpack(archive, root)
    assert str(archive) in str(error.value)
    assert tree(tmp_path) - before <= {f"root/{STAGING}"}


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FREE_ALLOWANCE", 1 << 20)
    archive = make_tar(tmp_path / "bomb", {"ShapeNet/02691156/a.ply": bytes(8 << 20)})
    assert archive.stat().st_size * module.MAX_RATIO < 8 << 20
    with pytest.raises(DataError, match="unpack to more than"):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_size_and_member_limits_hold_for_honest_archives_too(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {f"{i}": os.urandom(1000) for i in range(5)})
    with pytest.raises(DataError, match="more than 4 kB"):
        extract(archive, tmp_path / "out", max_bytes=4000)
    assert extract(archive, tmp_path / "out", max_bytes=5000) == 5000
    monkeypatch.setattr(module, "MAX_MEMBERS", 4)
    with pytest.raises(DataError, match="more than 4 files"):
        extract(archive, tmp_path / "again")


def test_a_huge_header_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEADER_BYTES", 100_000)
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * 400_000}
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match="header"):
        extract(archive, tmp_path / "out")


def test_a_member_stored_twice_is_an_error(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        for content in (b"one", b"two"):
            info = tarfile.TarInfo("x")
            info.size = 3
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="exists"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_truncated_archive_is_named_as_such(tmp_path, make, keep):
    whole = make(tmp_path / "whole", {f"ShapeNet/02691156/{i}.ply": os.urandom(4000) for i in range(20)})
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * keep)])
    with pytest.raises(DataError, match="truncated or damaged"):
        unpack(cut, tmp_path / "root")
    assert files_in(tmp_path / "root") == {}


def test_a_flipped_bit_is_found_even_in_the_last_member(tmp_path):
    whole = make_tar(tmp_path / "a", {"ShapeNet/02691156/a.ply": os.urandom(5000)}).read_bytes()
    for position in (len(whole) // 2, len(whole) - 6):  # content; the checksum itself
        damaged = bytearray(whole)
        damaged[position] ^= 4
        (tmp_path / "b").write_bytes(bytes(damaged))
        with pytest.raises(DataError, match="truncated or damaged"):
            extract(tmp_path / "b", tmp_path / "out")


def test_peek_needs_only_the_beginning(tmp_path):
    whole = make_tar(tmp_path / "a", {f"ShapeNet/02691156/{i}.ply": os.urandom(4000) for i in range(50)})
    start = tmp_path / "start"
    start.write_bytes(whole.read_bytes()[:20_000])
    assert peek(start) == "shapenet"
    start.write_bytes(b"")
    assert peek(start) is None


def test_what_is_no_archive_is_said(tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"\n<!DOCTYPE html><html>quota exceeded</html>")
    with pytest.raises(DataError, match="web page"):
        unpack(page, tmp_path / "root")
    (tmp_path / "gz").write_bytes(gzip.compress(b"no tar inside" * 100))
    with pytest.raises(DataError, match="truncated or damaged"):
        unpack(tmp_path / "gz", tmp_path / "root")
    with pytest.raises(DataError, match="is missing"):
        unpack(tmp_path / "nothing", tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_the_expected_set_must_be_there(tmp_path):
    archive = make_tar(tmp_path / "a", dict.fromkeys(LAYOUTS["shapenet"], b"x"))
    with pytest.raises(DataError, match="does not hold the data set modelnet40; at its top there is: ShapeNet"):
        unpack(archive, tmp_path / "root", expect="modelnet40")
    assert files_in(tmp_path / "root") == {}


def test_files_that_are_there_are_kept_and_other_content_stops_everything(tmp_path):
    names = list(LAYOUTS["shapenet"].values())
    archive = make_tar(tmp_path / "a", {name: name.encode() for name in names})
    root = tmp_path / "root"
    unpack(archive, root)
    (root / names[1]).unlink()
    assert unpack(archive, root) == {"sets": {"shapenet": 1}, "kept": 1, "left_out": 0}
    (root / names[0]).write_bytes(b"the user's own")
    (root / names[1]).unlink()
    with pytest.raises(DataError, match="different content") as error:
        unpack(archive, root)
    assert names[0] in str(error.value)
    assert files_in(root) == {names[0]: b"the user's own"}


def test_a_target_folder_on_another_disk_works(tmp_path, monkeypatch):
    def other_disk(source, target):
        raise OSError(module.errno.EXDEV, "other disk")

    archive = make_tar(tmp_path / "a", dict.fromkeys(LAYOUTS["shapenet"], b"x"))
    monkeypatch.setattr(module.os, "rename", other_disk)
    unpack(archive, tmp_path / "root")
    assert files_in(tmp_path / "root") == dict.fromkeys(LAYOUTS["shapenet"].values(), b"x")


@pytest.mark.parametrize("name", ["modelnet40", "shapenetpart"])
def test_checksums_are_compared_unless_told_not_to(tmp_path, name, capsys):
    folder = "modelnet40" if name == "modelnet40" else "part"
    archive = make_tar(tmp_path / "a", {f"{folder}/ply_data_train0.h5": b"not the published bytes"})
    with pytest.raises(DataError, match="MD5") as error:
        main([str(archive), "--data_root", str(tmp_path / "root")])
    assert KNOWN_MD5[name]["ply_data_train0.h5"] in str(error.value)
    assert files_in(tmp_path / "root") == {}
    main([str(archive), "--data_root", str(tmp_path / "root"), "--no_md5"])
    assert f"{name}: 1 files installed" in capsys.readouterr().out


def test_a_file_with_the_published_checksum_passes(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_md5(tmp_path / "f") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321's test value
    monkeypatch.setitem(KNOWN_MD5["modelnet40"], "ply_data_train0.h5", "900150983cd24fb0d6963f7d28e17f72")
    archive = make_zip(tmp_path / "a", {"modelnet40/ply_data_train0.h5": b"abc"})
    assert unpack(archive, tmp_path / "root")["sets"] == {"modelnet40": 1}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    make=st.sampled_from([make_tar, make_zip, make_plain_tar]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_mutated_archives_end_in_their_files_or_in_a_data_error(tmp_path, make, changes):
    members = {"ShapeNet/02691156/a.ply": bytes(range(256)) * 4, "b": b"b"}
    content = bytearray(make(tmp_path / "a", members).read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    (tmp_path / "b").write_bytes(bytes(content))
    outside = files_in(tmp_path)
    try:
        extract(tmp_path / "b", tmp_path / "out")
    except DataError as error:
        assert str(tmp_path / "b") in str(error)
    else:
        assert make is make_plain_tar or files_in(tmp_path / "out").items() <= members.items()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert files_in(tmp_path) == outside


def test_a_zip_member_without_a_name_is_refused(tmp_path):
    archive = make_zip(tmp_path / "a", {"Q": b"content"})
    archive.write_bytes(archive.read_bytes().replace(b"Q", b"\0"))
    with pytest.raises(DataError, match="has no name"):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
