"""Clouds as other programs write them."""

import struct
import sys

import h5py
import numpy as np
import pytest

from utils.cloud_files import read_cloud_file
from utils.errors import DataError

POINTS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
COLORS = np.random.default_rng(1).integers(0, 256, (50, 3))


def packed_colors():
    return (COLORS[:, 0] << 16 | COLORS[:, 1] << 8 | COLORS[:, 2]).astype(np.uint32)


def pcd(kind, *, body=None):
    """Return a PCD with padding between the coordinates and the color."""
    header = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z _ rgb\nSIZE 4 4 4 1 4\nTYPE F F F U F\nCOUNT 1 1 1 4 1\n"
    header += f"WIDTH 50\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 50\nDATA {kind}\n"
    rgb = packed_colors().view(np.float32)
    if body is None and kind == "ascii":
        rows = [[*map(repr, map(float, p)), "0 0 0 0", repr(float(c))] for p, c in zip(POINTS, rgb, strict=True)]
        body = "".join(" ".join(row) + "\n" for row in rows).encode()
    elif body is None:
        fields = [POINTS[:, i].tobytes() for i in range(3)] + [bytes(200), rgb.tobytes()]
        if kind == "binary":
            table = np.zeros(50, [("p", "<f4", 3), ("pad", "u1", 4), ("rgb", "<f4")])
            table["p"], table["rgb"] = POINTS, rgb
            body = table.tobytes()
        else:
            plain = b"".join(fields)
            with h5py.File("x", "w", driver="core", backing_store=False) as file:
                stored = file.create_dataset(
                    "x", data=np.frombuffer(plain, np.uint8), chunks=(1000,), compression="lzf"
                )
                compressed = stored.id.read_direct_chunk((0,))[1]
            body = struct.pack("<II", len(compressed), len(plain)) + compressed
    return header.encode() + body


def text(separator=" ", columns=None, heading=""):
    rows = np.c_[POINTS, COLORS] if columns is None else columns
    return (heading + "".join(separator.join(f"{v:.9g}" for v in row) + "\n" for row in rows)).encode()


GOOD = {
    "ascii.pcd": pcd("ascii"),
    "binary.pcd": pcd("binary"),
    "compressed.pcd": pcd("binary_compressed"),
    "blanks.xyz": text(),
    "commas.xyz": text(", ", heading="x,y,z,r,g,b\n# comment\n"),
    "scan.pts": text(columns=np.c_[POINTS, np.full(50, -12.5), COLORS], heading="50\n"),
}


@pytest.mark.parametrize("name", GOOD)
def test_points_and_colors_of_every_format(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD[name])
    points, colors = read_cloud_file(path)
    np.testing.assert_allclose(points, POINTS, rtol=1e-6)
    np.testing.assert_allclose(colors * 255, COLORS, atol=1e-4)


def test_npy_and_columns_that_are_not_colors(tmp_path):
    np.save(tmp_path / "c.npy", np.c_[POINTS, COLORS, COLORS[:, :1]])
    points, colors = read_cloud_file(tmp_path / "c.npy")
    np.testing.assert_allclose(points, POINTS)
    np.testing.assert_allclose(colors * 255, COLORS, atol=1e-4)
    normals = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    np.save(tmp_path / "n.npy", np.c_[POINTS, normals])
    assert read_cloud_file(tmp_path / "n.npy")[1] is None
    np.save(tmp_path / "zero.npy", np.c_[POINTS, np.zeros((50, 3))])  # normals left empty, not black
    assert read_cloud_file(tmp_path / "zero.npy")[1] is None


def test_points_without_a_place_are_left_out(tmp_path):
    points = POINTS.copy()
    points[::2, 1] = np.nan
    np.save(tmp_path / "c.npy", points)
    np.testing.assert_array_equal(read_cloud_file(tmp_path / "c.npy")[0], POINTS[1::2])
    points[::2, 1] = 1e300  # its square is infinite
    np.save(tmp_path / "c.npy", points)
    np.testing.assert_array_equal(read_cloud_file(tmp_path / "c.npy")[0], POINTS[1::2])
    np.save(tmp_path / "c.npy", points[::2])
    with pytest.raises(DataError, match="no points with finite coordinates"):
        read_cloud_file(tmp_path / "c.npy")


def test_las_with_and_without_colors(tmp_path):
    laspy = pytest.importorskip("laspy")
    for kind, scale in ((2, 257), (2, 1), (0, 0)):  # 16 bits, 8 bits in 16, no colors
        las = laspy.create(point_format=kind)
        las.header.scales = [1e-4] * 3
        las.x, las.y, las.z = POINTS.T
        if kind:
            las.red, las.green, las.blue = (COLORS * scale).T
        las.write(tmp_path / "c.las")
        points, colors = read_cloud_file(tmp_path / "c.las")
        np.testing.assert_allclose(points, POINTS, atol=1e-4)
        if kind:
            np.testing.assert_allclose(colors * 255, COLORS, atol=1e-3)
        else:
            assert colors is None
    data = (tmp_path / "c.las").read_bytes()
    for share in (0.1, 0.6, 0.95):
        (tmp_path / "c.las").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match="c.las"):
            read_cloud_file(tmp_path / "c.las")


def test_las_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "laspy", None)
    with pytest.raises(DataError, match=r"c.laz: .*pip install 'laspy\[lazrs\]'"):
        read_cloud_file(tmp_path / "c.laz")


BAD = {
    "cut.xyz": (text()[:-4] + b"1 2", "its last line has|do not all hold"),
    "short.xyz": (b"0 0 0\n1 1 1\n2 2", "its last line has 2 numbers, not 3"),
    "uneven.xyz": (b"0 0 0\n1 1\n2 2 2\n", "do not all hold 3 numbers"),
    "words.xyz": (b"no numbers here\n", "no rows of numbers"),
    "flat.xyz": (b"0 0\n1 1\n", "expected one row per point"),
    "columns.csv": (b"\n".join([b",".join([b"%d" % i for i in range(17)])] * 3), "one row per point: transpose it"),
    "empty.pcd": (b"", "no DATA line"),
    "fields.pcd": (pcd("ascii").replace(b"FIELDS x y z", b"FIELDS a b c"), "unreadable PCD header"),
    "header.pcd": (pcd("ascii").replace(b"SIZE 4 4 4 1 4\n", b""), "unreadable PCD header"),
    "kind.pcd": (pcd("runes", body=b""), "unknown PCD data runes"),
    "cut-ascii.pcd": (pcd("ascii")[:-200], "promises 50 points and holds"),
    "cut-binary.pcd": (pcd("binary")[:-30], "promises 50 points and holds 48"),
    "cut-compressed.pcd": (pcd("binary_compressed")[:-30], "promises 50 points and holds"),
    "word.pcd": (pcd("ascii").replace(b"0 0 0 0", b"0 0 x 0"), "not a row of numbers"),
    "cut.npy": (b"\x93NUMPY\x01\0", "not a readable NPY"),
    "magic.npy": (b"hello", "not a readable NPY"),
    "header.npy": (b"\x93NUMPY\x01\0\x18\0{'descr': '<f4', 'shape'(\n\n" + bytes(9), "not a readable NPY file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_cloud_is_refused_by_name_and_reason(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*({reason})"):
        read_cloud_file(tmp_path / name)


def test_damaged_compression_objects_and_foreign_files_are_refused(tmp_path):
    data = bytearray(pcd("binary_compressed"))
    data[-400:] = b"\xff" * 400
    (tmp_path / "c.pcd").write_bytes(bytes(data))
    with pytest.raises(DataError, match="compressed points are damaged"):
        read_cloud_file(tmp_path / "c.pcd")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable NPY"):
        read_cloud_file(tmp_path / "o.npy")
    with pytest.raises(DataError, match=r"expected a cloud ending in \.pcd"):
        read_cloud_file(tmp_path / "c.e57")
    with pytest.raises(DataError, match="cannot read"):
        read_cloud_file(tmp_path / "none.pcd")
