import io
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets.pack import pack
from datasets.pair_sources import FolderSource, PackedSource, choose_shapes, open_source, read_shape_list
from datasets.sampler import SampleKey
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from datasets.transforms import RenderPixels
from datasets.untrusted import decode_image, read_ply
from tests.support.comparing import equal
from tests.support.files import cut
from tests.support.pairs import cloud, cloud_path, files_opened, png, view_path, write_pairs, write_ply
from utils.errors import DataError


def packed_copy(root, out):
    source = FolderSource(root)
    pack(source, out, chosen=list(range(len(source.ids))), name="test")
    return out


def dataset(root, **kwargs):
    return ShapeNetRender(root, **({"transform": RenderPixels(16)} | kwargs))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Write 8 shapes and 2 more without rendering, as a folder and packed."""
    root = tmp_path_factory.mktemp("pairs")
    ids = write_pairs(root, 8, points=30, unpaired=2)
    return root, packed_copy(root, tmp_path_factory.mktemp("packed") / "pairs.h5"), ids


def test_bare_model_ids_match_under_any_synset():
    ids = ["1/a", "1/b", "2/a", "2/c"]
    assert choose_shapes(ids, ["a", "2/c"], where="data") == [0, 2, 3]
    assert choose_shapes(ids, ["1/a"], where="data") == [0]
    with pytest.raises(DataError, match="1 of the 2 listed shapes are not in data with a rendering, such as 3/a"):
        choose_shapes(ids, ["1/a", "3/a"], where="data")


def test_a_packed_file_that_is_replaced_while_it_is_used_is_an_error(pairs, tmp_path):
    file = Path(shutil.copy(pairs[1], tmp_path / "pairs.h5"))
    source = PackedSource(file)
    write_pairs(tmp_path / "others", 9, points=30)
    packed_copy(tmp_path / "others", tmp_path / "new.h5").replace(file)
    for read in (lambda: source.points(0), lambda: source.image_file(0, 0)):
        with pytest.raises(DataError, match="pairs.h5 was replaced or changed after it was opened"):
            read()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_folder_of_renderings_that_cannot_be_listed_is_named(tmp_path):
    name = write_pairs(tmp_path, 2)[0]
    folder = view_path(tmp_path, name).parent
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)
    with pytest.raises(DataError, match=f"cannot list {folder}: "):
        dataset(tmp_path)


def test_folder_and_packed_file_give_equal_samples(pairs):
    root, file, ids = pairs
    folder, packed = dataset(root), dataset(file)
    assert folder.ids == packed.ids == ids
    assert folder.skipped == packed.skipped and len(folder.skipped) == 2
    assert repr(folder) == repr(packed) == "ShapeNetRender(8 shapes of 30 points, 2 without rendering)"
    clone = pickle.loads(pickle.dumps(packed))
    for epoch in (0, 5):
        for index in range(8):
            key = SampleKey(epoch, index)
            assert equal(folder[key], packed[key]) and equal(folder[key], clone[key])


@pytest.mark.parametrize("which", [0, 1], ids=["folder", "packed"])
def test_workers_read_what_this_process_reads(pairs, which):
    here = dataset(pairs[which])
    expected = collate_pairs([here[SampleKey(2, i)] for i in (5, 0, 3, 6)])  # the packed file is open when workers fork
    keys = [SampleKey(2, i) for i in (5, 0, 3, 6)]
    loader = DataLoader(here, batch_sampler=[keys] * 3, collate_fn=collate_pairs, num_workers=2)
    assert all(equal(batch, expected) for batch in loader)
    assert equal(here[SampleKey(0, 1)], dataset(pairs[0])[1])


def test_samples_are_what_the_files_hold(pairs):
    root, _, ids = pairs
    data = dataset(root)
    for i, name in enumerate(ids):
        sample = data[i]
        np.testing.assert_array_equal(sample["points"], cloud(int(name[-2:]), 30))
        assert sample["points"].shape == (30, 3) and sample["points"].dtype == torch.float32
        assert sample["pixels"].shape[2:] == (3,) and sample["pixels"].dtype == torch.uint8
        assert sample["pixels"].shape[0] * sample["pixels"].shape[1] <= 16 * 16
        assert (sample["index"], sample["bad"]) == (i, [])
    with pytest.raises(IndexError):
        data[8]


def test_every_view_is_drawn_about_equally_often(pairs):
    counts = {}

    def note(image):
        counts[image.size, image.mode] = counts.get((image.size, image.mode), 0) + 1
        return torch.zeros(1, 1, 3, dtype=torch.uint8)

    data = ShapeNetRender(pairs[0], transform=note, only=["02691156/shape05"])  # four views, one size, four modes
    assert len(data.source.view_names(data._chosen[0])) == 4
    for epoch in range(200):
        data[SampleKey(epoch, 0)]
    assert len(counts) == 4 and min(counts.values()) > 25


def test_randomness_is_a_function_of_seed_epoch_and_index(pairs):
    a, same, other = dataset(pairs[0]), dataset(pairs[0]), dataset(pairs[0], seed=2)
    keys = [SampleKey(epoch, index) for epoch in range(6) for index in (2, 5)]
    torch.manual_seed(1)
    first = a.__getitems__(keys)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert equal(first, [same[key] for key in reversed(keys)][::-1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, other.__getitems__(keys))
    assert len({sample["pixels"].numpy().tobytes() for sample in first}) > 2  # another epoch, another view


def test_each_file_is_opened_once_a_sample(pairs):
    root, file, ids = pairs
    data = dataset(root)
    for i, name in enumerate(ids):
        with files_opened() as opened:
            data[SampleKey(3, i)]
        opened = [path for path in opened if path.startswith(str(root))]
        assert len(opened) == 2
        assert opened[0] == str(cloud_path(root, name))
        assert opened[1].startswith(str(view_path(root, name).parent))
    packed = dataset(file, transform=None)
    handle = packed.source._open()
    for i in range(8):
        packed[i]
    assert packed.source._open() is handle


def test_a_list_chooses_shapes_and_unknown_ones_are_an_error(pairs, tmp_path):
    root, file, ids = pairs
    text = f"# training shapes\n{ids[5]}\n\n  {ids[1]}  \n"
    (tmp_path / "list.txt").write_text(text)
    only = read_shape_list(tmp_path / "list.txt")
    assert only == [ids[5], ids[1]]
    for source in (root, file):
        data = dataset(source, only=only)
        assert data.ids == [ids[1], ids[5]]
        np.testing.assert_array_equal(data[1]["points"], cloud(int(ids[5][-2:]), 30))
        unpaired = data.skipped[0]
        with pytest.raises(DataError, match=f"2 of the 3 listed shapes are not in .* such as {unpaired}"):
            dataset(source, only=[ids[0], unpaired, "04256520/none"])
        with pytest.raises(DataError, match="no shapes"):
            dataset(source, only=[])
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="empty.txt names no shapes"):
        read_shape_list(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="absent.txt"):
        read_shape_list(tmp_path / "absent.txt")


def test_a_root_with_a_packed_file_is_read_as_that_file(pairs, tmp_path):
    shutil.copy(pairs[1], tmp_path / "shapenet_render.h5")
    assert isinstance(open_source(tmp_path), PackedSource)
    assert isinstance(open_source(pairs[0]), FolderSource)
    assert equal(dataset(tmp_path)[2], dataset(pairs[0])[2])


def damaged(root, tmp_path, name, how):
    """Copy the pairs and break the files of one shape."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    how(copy, name)
    return copy


def no_pictures(root, name):
    for path in view_path(root, name).parent.glob("*.png"):
        path.write_text("no picture")


BREAK = {
    "truncated PLY": (lambda root, name: cut(cloud_path(root, name)), "not a readable PLY"),
    "PLY without z": (
        lambda root, name: write_ply(cloud_path(root, name), cloud(1), axes="xy"),
        "not a readable PLY.*z",
    ),
    "NaN": (lambda root, name: write_ply(cloud_path(root, name), cloud(1) * np.nan), "48 of 48 points are not finite"),
    "no points": (lambda root, name: write_ply(cloud_path(root, name), cloud(1, 0)), "contains no points"),
    "no PLY": (lambda root, name: cloud_path(root, name).write_text("hello"), "not a readable PLY"),
    "no PNG": (no_pictures, "not a readable PNG"),
}


@pytest.mark.parametrize("what", BREAK)
def test_a_bad_sample_is_replaced_and_reported_or_raised_when_strict(pairs, tmp_path, what):
    root, _, ids = pairs
    how, message = BREAK[what]
    copy = damaged(root, tmp_path, ids[3], how)
    sample = dataset(copy)[SampleKey(1, 3)]
    assert sample["index"] == 3 and len(sample["bad"]) == 1
    np.testing.assert_array_equal(sample["points"], cloud(int(ids[4][-2:]), 30))
    assert ids[3] in sample["bad"][0]
    with pytest.raises(DataError, match=message) as caught:
        dataset(copy, strict=True)[SampleKey(1, 3)]
    assert str(caught.value) == sample["bad"][0] and "\n" not in str(caught.value)
    batch = collate_pairs([dataset(copy)[SampleKey(1, i)] for i in range(8)])
    assert batch["bad"] == sample["bad"] and batch["index"].tolist() == list(range(8))


def test_a_stand_in_does_not_share_its_neighbors_randomness(tmp_path):
    ids = write_pairs(tmp_path, 5, points=30, views=6)
    cloud_path(tmp_path, ids[3]).write_text("hello")
    data = dataset(tmp_path)
    batches = [data.__getitems__([SampleKey(epoch, 3), SampleKey(epoch, 4)]) for epoch in range(20)]
    assert all(torch.equal(a["points"], b["points"]) and len(a["bad"]) == 1 for a, b in batches)
    assert any(not torch.equal(a["pixels"], b["pixels"]) for a, b in batches)  # views are chosen apart


def test_many_bad_samples_in_a_row_are_an_error(pairs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pairs[0], copy)
    data = dataset(copy)
    for name in pairs[2]:
        cloud_path(copy, name).write_bytes(b"")
    with pytest.raises(DataError, match="not a readable PLY"):
        data[0]
    with pytest.raises(DataError, match="not a readable PLY"):
        dataset(copy)


def test_larger_clouds_are_cut_to_random_subsets_of_the_first_ones_size(tmp_path):
    ids = write_pairs(tmp_path, 4, points=30)
    write_ply(cloud_path(tmp_path, ids[2]), cloud(7, 90))
    data = dataset(tmp_path)
    assert data.cloud_size == 30
    first, second = (data[SampleKey(epoch, 2)]["points"] for epoch in (0, 1))
    whole = {tuple(row) for row in cloud(7, 90).tolist()}
    for points in (first, second):
        rows = {tuple(row) for row in points.tolist()}
        assert len(rows) == 30 and rows < whole
    assert not torch.equal(first, second)
    batch = collate_pairs([data[i] for i in range(4)])
    assert batch["points"].shape == (4, 30, 3) and batch["bad"] == []


def rows(points):
    return {tuple(row) for row in np.asarray(points).tolist()}


def test_points_of_smaller_clouds_repeat_after_each_was_there_once(tmp_path):
    ids = write_pairs(tmp_path, 4, points=30)
    write_ply(cloud_path(tmp_path, ids[2]), cloud(7, 12), text=True)
    data = dataset(tmp_path, strict=True)
    sample = data[SampleKey(0, 2)]
    assert sample["points"].shape == (30, 3) and sample["count"] == 12 and sample["bad"] == []
    assert rows(sample["points"][:12]) == rows(sample["points"]) == rows(cloud(7, 12))
    assert collate_pairs([data[i] for i in range(4)])["counts"].tolist() == [30, 30, 12, 30]
    assert data.sizes == [30, 30, 30, 12, 30] and data.smaller_than(30) == 1 and data.smaller_than(12) == 0


def test_clouds_of_uneven_size_have_as_many_points_as_are_asked(tmp_path):
    ids = write_pairs(tmp_path, 4)
    for i, (name, size) in enumerate(zip(ids, (40, 70, 256, 90), strict=True)):
        write_ply(cloud_path(tmp_path, name), cloud(i, size), text=i % 2 == 0)
    data = dataset(tmp_path, num_points=64, strict=True)
    assert data.cloud_size == 64 and data.smaller_than(64) == 1
    samples = [data[i] for i in range(4)]
    assert [len(rows(sample["points"])) for sample in samples] == [40, 64, 64, 64]
    assert dataset(tmp_path).cloud_size == 40 and dataset(tmp_path, num_points=300).cloud_size == 40
    # Nothing is looked up where the clouds are of one size.
    write_pairs(tmp_path / "even", 4, points=30)
    assert dataset(tmp_path / "even", num_points=20).sizes == [30]


def test_a_sample_with_several_unreadable_stand_ins_counts_once(tmp_path):
    ids = write_pairs(tmp_path, 6, points=30)
    data = dataset(tmp_path)
    for name in ids[1:4]:
        cloud_path(tmp_path, name).write_bytes(b"")
    batch = collate_pairs([data[i] for i in range(6)])
    assert len(batch["bad"]) == 3 and all(name in batch["bad"][0] for name in ids[1:4])


HEADERS = {
    "UTF-8 comment": (b"element", "comment Möbel\nelement".encode()),
    "Latin-1 comment": (b"element", "comment Möbel\nelement".encode("latin-1")),
    "blank after ply": (b"ply", b"ply "),
    "blanks at line ends": (b"\n", b" \t\n"),
    "Windows line ends": (b"\n", b"\r\n"),
    "empty line": (b"element", b"\nelement"),
    "byte-order mark": (b"ply", b"\xef\xbb\xbfply"),
    "capitals": (b"ply", b"PLY"),
}


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("what", HEADERS)
def test_ply_headers_as_programs_write_them(tmp_path, what, text):
    path = tmp_path / "a.ply"
    write_ply(path, cloud(3, 20), text=text)
    plain = read_ply(path)
    old, new = HEADERS[what]
    mark = b"end_header\n"
    head, body = path.read_bytes().split(mark)
    path.write_bytes((head + mark).replace(old, new, -1 if b"\n" in old else 1) + body)
    np.testing.assert_array_equal(read_ply(path), plain)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_lists_of_shapes_in_any_encoding(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("# Möbel\r\n02691156/a\r\n\r\nb\r\n".encode(encoding))
    assert read_shape_list(tmp_path / "list.txt") == ["02691156/a", "b"]


def test_files_of_an_operating_system_are_neither_clouds_nor_views(tmp_path):
    ids = write_pairs(tmp_path, 3, views=1)
    expected = [FolderSource(tmp_path).view_names(i) for i in range(3)]
    for name in ids:
        for path in (cloud_path(tmp_path, name), view_path(tmp_path, name)):
            for junk in (f"._{path.name}", ".DS_Store", "Thumbs.db", "desktop.ini"):
                path.with_name(junk).write_bytes(b"\0\5\x16\7")
    (tmp_path / "ShapeNet" / "._02691156").mkdir()
    write_ply(tmp_path / "ShapeNet" / "__MACOSX" / "a.ply", cloud(1))
    source = FolderSource(tmp_path)
    assert (source.ids, source.skipped) == (ids, [])
    assert [source.view_names(i) for i in range(3)] == expected
    for path in view_path(tmp_path, ids[0]).parent.glob("[0-9]*.png"):
        path.unlink()
    assert FolderSource(tmp_path).skipped == [ids[0]]  # ._00.png is not a rendering


def test_collating_pads_renders_to_the_largest_height_and_width(pairs):
    data = dataset(pairs[0], transform=RenderPixels(64))
    samples = [data[SampleKey(0, i)] for i in (4, 0, 3, 6, 1)]
    batch = collate_pairs(samples)
    assert batch["index"].tolist() == [4, 0, 3, 6, 1] and len(batch["sizes"].unique(dim=0)) > 1
    assert batch["pixels"].shape == (5, *batch["sizes"].amax(0).tolist(), 3)
    for sample, pixels, (height, width) in zip(samples, batch["pixels"], batch["sizes"].tolist(), strict=True):
        assert torch.equal(pixels[:height, :width], sample["pixels"])
    without = ShapeNetRender(pairs[0])
    assert collate_pairs([without[0], without[1]]).keys() == {"index", "points", "counts", "bad"}


def test_views_vanishing_after_the_start_are_reported(pairs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pairs[0], copy)
    data = dataset(copy, strict=True)
    shutil.rmtree(view_path(copy, pairs[2][0]).parent)
    with pytest.raises(DataError, match=pairs[2][0]):
        data[0]
    cloud_path(copy, pairs[2][1]).unlink()
    with pytest.raises(DataError, match="is gone"):
        data[1]


@pytest.mark.parametrize("text", [True, False])
def test_ply_of_other_number_types_extra_properties_and_byte_order(tmp_path, text):
    from plyfile import PlyData, PlyElement

    rows = np.zeros(3, [("nx", "f4"), ("z", "f8"), ("red", "u1"), ("y", "i2"), ("x", "f4")])
    rows["x"], rows["y"], rows["z"] = (0.5, 1, 2), (3, 4, 5), (6.25, 7, 8)
    face = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [PlyElement.describe(face, "face"), PlyElement.describe(rows, "vertex")]
    PlyData(elements, text=text, byte_order="=" if text else ">").write(tmp_path / "a.ply")
    points = read_ply(tmp_path / "a.ply")
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, [[0.5, 3, 6.25], [1, 4, 7], [2, 5, 8]])


def test_decode_image_names_what_is_no_picture():
    assert decode_image(png(1), "x").size == (20, 20)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(whole, "PNG")
    for data in (b"", b"text", whole.getvalue()[:-3000]):
        with pytest.raises(DataError, match="a/b.png is not a readable PNG"):
            decode_image(data, "a/b.png")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "no clouds in .*ShapeNet.*download_data.sh"),
        (lambda root: write_ply(cloud_path(root, "1/a"), cloud(0)), "none of the 1 clouds .*1/a/rendering"),
        (lambda root: root.write_text("hello"), "not a readable packed"),
        (lambda root: root.write_bytes(b""), "not a readable packed"),
    ],
    ids=["absent", "empty", "no renderings", "text file", "empty file"],
)
def test_a_root_without_pairs_is_an_error_that_says_what_helps(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value)


def edit(file, change):
    with h5py.File(file, "r+") as handle:
        change(handle)


def replace(name, value):
    def change(handle):
        if name in handle:
            del handle[name]
        if value is not None:
            handle[name] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.attrs.update(version=2), "of version 1"),
        (lambda f: f.attrs.pop("format"), "of version 1"),
        (replace("points", None), "not a readable packed"),
        (replace("points", np.zeros((7, 30, 3), "f4")), "disagree"),
        (replace("points", np.zeros((8, 30, 2), "f4")), "disagree"),
        (replace("points", np.full((8, 30, 3), b"x")), "disagree"),
        (replace("view_offset", np.arange(9)), "disagree"),
        (replace("image_bytes", np.zeros(5, "u1")), "disagree"),
    ],
)
def test_a_wrong_packed_file_is_an_error_that_names_it(pairs, tmp_path, change, message):
    file = shutil.copy(pairs[1], tmp_path / "bad.h5")
    edit(file, change)
    with pytest.raises(DataError, match=message) as caught:
        PackedSource(file)
    assert "bad.h5" in str(caught.value)


@pytest.mark.parametrize("how", ["chunks", "userblock", "late"])
def test_arrays_in_pieces_are_read_the_slower_way(pairs, tmp_path, how):
    """Chunked arrays, a file with a foreign first block, and a file that is cut after it was opened."""
    expected = PackedSource(pairs[1])
    assert set(expected._blocks) == {"points", "image_bytes"} and expected._file is None
    file = tmp_path / "pairs.h5"
    with h5py.File(pairs[1]) as old, h5py.File(file, "w", userblock_size=512 if how == "userblock" else 0) as new:
        new.attrs.update(old.attrs)
        for name, stored in old.items():
            chunks = (2, *stored.shape[1:]) if how == "chunks" and name in ("points", "image_bytes") else None
            new.create_dataset(name, data=stored[:], dtype=stored.dtype, chunks=chunks)
    packed = PackedSource(file)
    if how == "late":
        packed.points(0)
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(DataError, match="truncated"):
            packed.points(7)
        return
    assert not packed._blocks
    for i in range(8):
        np.testing.assert_array_equal(packed.points(i), expected.points(i))
        assert packed.image_file(i, 1) == expected.image_file(i, 1)


def test_a_truncated_packed_file_is_an_error(pairs, tmp_path):
    (tmp_path / "cut.h5").write_bytes(pairs[1].read_bytes()[:-3000])
    with pytest.raises(DataError, match="cut.h5"):
        PackedSource(tmp_path / "cut.h5")


def test_quantized_points_and_shards_are_read_and_a_missing_shard_is_an_error(pairs, tmp_path):
    file = shutil.copy(pairs[1], tmp_path / "pairs.h5")
    scale, offset = np.float32(0.001), np.float32(-20)
    with h5py.File(file, "r+") as handle, h5py.File(tmp_path / "shard.h5", "w") as shard:
        exact = handle["points"][:]
        shard["points"] = np.round((exact - offset) / scale).astype("u2")
        del handle["points"]
        layout = h5py.VirtualLayout(exact.shape, "u2")
        layout[:] = h5py.VirtualSource("shard.h5", "points", exact.shape)
        handle.create_virtual_dataset("points", layout).attrs.update(scale=scale, offset=offset)
    np.testing.assert_allclose(PackedSource(file).points(3), exact[3], atol=6e-4)
    (tmp_path / "shard.h5").unlink()
    with pytest.raises(DataError, match="shard.h5 is missing"):
        PackedSource(file)


def test_a_ply_header_that_promises_more_rows_than_the_file_can_hold_is_refused(tmp_path):
    write_ply(tmp_path / "a.ply", cloud(1))
    whole = (tmp_path / "a.ply").read_bytes()
    for rows in (b"1000000000000", b"1000", b"-1", b"x"):
        (tmp_path / "a.ply").write_bytes(whole.replace(b"element vertex 48", b"element vertex " + rows))
        with pytest.raises(DataError, match="a.ply is not a readable PLY"):
            read_ply(tmp_path / "a.ply")


def test_pictures_that_claim_too_many_pixels_or_are_of_another_kind_are_refused():
    for size, kind in (((5000, 4000), "PNG"), ((20, 20), "EPS"), ((20, 20), "TIFF")):
        file = io.BytesIO()
        Image.new("L", size).save(file, kind)
        with pytest.raises(DataError, match="a/b.png is not a readable PNG"):
            decode_image(file.getvalue(), "a/b.png")
    file = io.BytesIO()
    Image.new("L", (4096, 4096)).save(file, "PNG")
    assert decode_image(file.getvalue(), "x").size == (4096, 4096)
