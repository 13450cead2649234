import json
import shutil

import h5py
import numpy as np
import pytest

from datasets import pack
from datasets.pair_sources import FolderSource, PackedSource
from datasets.shapenet_render import ShapeNetRender
from tests.support.files import contents
from tests.support.pairs import cloud, cloud_path, view_path, write_pairs, write_ply
from tests.support.paths import DEMO
from utils.errors import DataError, UserError


@pytest.fixture
def root(tmp_path):
    write_pairs(tmp_path / "data", 6, points=20, unpaired=1)
    return tmp_path / "data"


def main(*arguments):
    return pack.main([str(argument) for argument in arguments])


def same(a, b):
    assert a.ids == b.ids
    for i in range(len(a.ids)):
        np.testing.assert_array_equal(a.points(i), b.points(i))
        assert list(a.view_names(i)) == list(b.view_names(i))
        assert [a.image_file(i, v) for v in range(len(a.view_names(i)))] == [
            b.image_file(i, v) for v in range(len(b.view_names(i)))
        ]


def test_packs_everything_and_reports_it(root, tmp_path, capsys):
    before = contents(root)
    out = tmp_path / "new" / "pairs.h5"
    counts = main("--data_root", root, "--out", out, "--json", tmp_path / "counts.json")
    source = FolderSource(root)
    views = [len(source.view_names(i)) for i in range(6)]
    assert counts == json.loads((tmp_path / "counts.json").read_text())
    assert (counts["shapes"], counts["views"], counts["points"], counts["skipped"]) == (6, sum(views), 20, 1)
    same(source, PackedSource(out))
    assert PackedSource(out).skipped == source.skipped and len(source.skipped) == 1
    with h5py.File(out) as file:
        assert dict(file.attrs) == {"format": "crossnet-pack", "version": 1, "source": "data"}
        assert counts["image_bytes"] == len(file["image_bytes"])
    assert contents(root) == before and [p.name for p in out.parent.iterdir()] == ["pairs.h5"]
    assert "6 shapes of 20 points" in capsys.readouterr().out


def test_packs_the_listed_shapes(root, tmp_path):
    ids = FolderSource(root).ids
    (tmp_path / "list.txt").write_text(f"{ids[4]}\n{ids[2]}\n")
    main("--data_root", root, "--out", tmp_path / "a.h5", "--list", tmp_path / "list.txt")
    assert PackedSource(tmp_path / "a.h5").ids == [ids[2], ids[4]]
    np.testing.assert_array_equal(PackedSource(tmp_path / "a.h5").points(1), cloud(int(ids[4][-2:]), 20))
    (tmp_path / "list.txt").write_text("1/unknown\n")
    with pytest.raises(DataError, match="1 of the 1 listed shapes are not in .* 1/unknown"):
        main("--data_root", root, "--out", tmp_path / "b.h5", "--list", tmp_path / "list.txt")
    assert not (tmp_path / "b.h5").exists()


def test_an_existing_file_is_replaced_only_when_asked(root, tmp_path):
    out = tmp_path / "a.h5"
    out.write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        main("--data_root", root, "--out", out)
    assert out.read_text() == "precious"
    main("--data_root", root, "--out", out, "--overwrite")
    assert len(ShapeNetRender(out)) == 6


def test_a_packed_file_is_packed_again_also_from_inside_its_own_root(root, tmp_path):
    main("--data_root", root, "--out", root / "shapenet_render.h5")
    main("--data_root", root / "shapenet_render.h5", "--out", tmp_path / "b.h5")
    same(PackedSource(root / "shapenet_render.h5"), PackedSource(tmp_path / "b.h5"))
    write_ply(cloud_path(root, FolderSource(root).ids[0]), cloud(77, 20))
    main("--data_root", root, "--out", root / "shapenet_render.h5", "--overwrite")  # from the folders, not from itself
    np.testing.assert_array_equal(ShapeNetRender(root)[0]["points"], cloud(77, 20))


def test_some_shapes_of_the_demo_root_are_packed(tmp_path):
    ids = ShapeNetRender(DEMO).ids[:3]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    main("--data_root", DEMO, "--out", tmp_path / "demo.h5", "--list", tmp_path / "list.txt")
    small = ShapeNetRender(tmp_path / "demo.h5")
    assert small.ids == ids
    for i in range(3):
        assert np.array_equal(small[i]["points"], ShapeNetRender(DEMO, only=ids)[i]["points"])


def test_several_roots_become_one_set_with_a_name_for_every_shape(root, tmp_path, capsys):
    write_pairs(tmp_path / "second", 4, points=20)  # names that the first root has too
    first, second = FolderSource(root), FolderSource(tmp_path / "second")
    main("--data_root", root, tmp_path / "second", "--out", tmp_path / "both.h5")
    both = PackedSource(tmp_path / "both.h5")
    assert both.ids == sorted([*first.ids, *(f"{name}-2" for name in second.ids)])
    i = both.ids.index(f"{second.ids[1]}-2")
    np.testing.assert_array_equal(both.points(i), second.points(1))
    assert both.image_file(i, 0) == second.image_file(1, 0)
    assert "4 shapes have the name of a shape in an earlier root" in capsys.readouterr().out
    main("--data_root", root, tmp_path / "second", "--shapes", 7, "--out", tmp_path / "seven.h5")
    assert PackedSource(tmp_path / "seven.h5").ids == sorted([*first.ids, f"{second.ids[0]}-2"])
    with pytest.raises(DataError, match="there are 10 shapes with renderings, fewer than the 11 of --shapes"):
        main("--data_root", root, tmp_path / "second", "--shapes", 11, "--out", tmp_path / "eleven.h5")
    with pytest.raises(DataError, match="--shapes 6 leaves no place for the last set: the earlier ones have 6"):
        main("--data_root", root, tmp_path / "second", "--shapes", 6, "--out", tmp_path / "six.h5")
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(UserError, match="--data_root names .* twice"):
        main("--data_root", root, tmp_path / "link", "--out", tmp_path / "twice.h5")


def break_cloud(root, ids):
    cloud_path(root, ids[3]).write_text("ply\n")


def break_picture(root, ids):
    view_path(root, ids[3]).write_text("hello")


def shrink_cloud(root, ids):
    write_ply(cloud_path(root, ids[3]), cloud(3, 19))


@pytest.mark.parametrize(
    "harm, message",
    [
        (break_cloud, "not a readable PLY"),
        (break_picture, "not a readable PNG"),
        (shrink_cloud, "19 points.*clouds of one size"),
    ],
)
def test_unreadable_sources_stop_with_their_name_and_leave_nothing(root, tmp_path, harm, message):
    ids = FolderSource(root).ids
    harm(root, ids)
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(DataError, match=message) as caught:
        main("--data_root", root, "--out", tmp_path / "out.h5", "--overwrite")
    assert ids[3] in str(caught.value)
    assert (tmp_path / "out.h5").read_text() == "precious" and not (tmp_path / "out.h5.tmp").exists()


class Changing(FolderSource):
    """A source whose file changes after it was packed."""

    def __init__(self, root, after, change):
        super().__init__(root)
        self.reads, self.after, self.change = 0, after, change

    def points(self, i):
        self.reads += 1
        if self.reads == self.after:
            self.change()
        return super().points(i)


def test_a_source_that_changes_while_it_is_packed_is_noticed(root, tmp_path):
    ids = FolderSource(root).ids
    target = cloud_path(root, ids[2])
    later = Changing(root, 8, lambda: write_ply(target, cloud(9, 20)))  # 1 for the size, 6 packed, then checked
    with pytest.raises(DataError, match=f"{ids[2]}.* differs from its source"):
        pack.pack(later, tmp_path / "a.h5", chosen=list(range(6)), name="x")
    picture = view_path(root, ids[0])
    other = view_path(root, ids[1]).read_bytes()
    between = Changing(root, 2, lambda: picture.write_bytes(other))
    with pytest.raises(DataError, match="changed while it was read"):
        pack.pack(between, tmp_path / "a.h5", chosen=list(range(6)), name="x")
    assert list(tmp_path.glob("a.h5*")) == []


@pytest.mark.parametrize("out", ["file/x.h5", "file/deeper/x.h5", "full.h5"])
def test_an_unwritable_output_is_one_clear_error(root, tmp_path, out):
    (tmp_path / "file").write_text("a file, no folder")
    (tmp_path / "full.h5.tmp").symlink_to("/dev/full")  # a disk without space
    with pytest.raises(UserError, match=f"cannot write .*{out}"):
        main("--data_root", root, "--out", tmp_path / out)
    assert not (tmp_path / "full.h5").exists()


def test_missing_source_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        main("--data_root", tmp_path / "absent", "--out", tmp_path / "a.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no clouds in"):
        main("--data_root", tmp_path / "empty", "--out", tmp_path / "a.h5")
    shutil.rmtree(tmp_path / "empty")
