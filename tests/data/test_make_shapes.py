"""The command that generates pretraining pairs: contents of the file, resuming, parts, pictures."""

import io
import json

import h5py
import numpy as np
import pytest
from PIL import Image

from data import make_shapes
from data.procedural import KINDS
from datasets.shapenet_part import ShapeNetPart
from datasets.shapenet_render import ShapeNetRender
from tests.support.opengl import needs_opengl
from tests.support.small_run import arguments
from train_crossnet_con import main as pretrain
from utils.errors import UserError

SMALL = ["--num_points", "64", "--image_size", "24", "--workers", "0", "--pictures", "splats"]


def make(out, *more, shapes=12):
    return make_shapes.main(["--shapes", str(shapes), "--out", str(out), *SMALL, *map(str, more)])


def arrays(path):
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shapes.h5"
    counts = make(out, "--views", "2", "--sheet", out.with_suffix(".png"), "--json", out.with_suffix(".json"))
    return out, counts


def test_a_file_of_shapes_is_read_as_pretraining_pairs(made):
    out, counts = made
    assert counts["shapes"] == 12 and counts["views"] == 24 and counts["settings"]["pictures"] == "splats"
    assert json.loads(out.with_suffix(".json").read_text())["shapes"] == 12
    pairs = ShapeNetRender(out, strict=True)
    assert len(pairs) == 12 and pairs.cloud_size == 64
    for i in range(12):
        points = pairs[i]["points"].numpy()
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-5)
    with h5py.File(out) as file:
        assert (file.attrs["pictures"], file.attrs["seed"], file.attrs["level"]) == ("splats", 1, 5)
        assert file["part_kinds"].asstr()[:].tolist() == list(KINDS)
        assert file["part_kind"].shape == file["part_number"].shape == (12, 64)
        assert file["part_kind"][:].max() < len(KINDS)
        assert file["cameras"].shape == (12, 2, 2)
    assert not out.with_name("shapes.h5.blocks").exists()


@pytest.mark.parametrize(
    ("more", "message"), [(["--sheet", "a.xyz"], "--sheet a.xyz: the name must end"), (["--overwrite"], "is a folder")]
)
def test_what_cannot_be_written_is_an_error_before_anything_is_made(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path if "--overwrite" in more else tmp_path / "a.h5", *more)
    assert not list(tmp_path.parent.glob("*.blocks"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*a.h5"):
        make(tmp_path / "file" / "a.h5")


def test_pictures_show_the_shape_on_a_transparent_background(made):
    pairs = ShapeNetRender(made[0]).source
    for i in range(12):
        for view in range(2):
            picture = np.asarray(Image.open(io.BytesIO(pairs.image_file(i, view))))
            covered = (picture[..., 3] > 0).mean()
            assert picture.shape == (24, 24, 4) and 0.01 < covered < 0.95
    assert Image.open(made[0].with_suffix(".png")).size == (1120, 4 * 112)


def test_it_pretrains(made, tmp_path, small_runs):
    metrics = pretrain(arguments(made[0], tmp_path, "--epochs", 1, "--exp_name", "run", "--eval_every", 0))
    assert np.isfinite(metrics["loss"])


def test_the_result_does_not_depend_on_processes_or_on_how_many_shapes_there_are(made, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shapes, "BLOCK", 5)
    make(tmp_path / "two.h5", "--views", "2", "--workers", "2")
    np.testing.assert_equal(arrays(tmp_path / "two.h5"), arrays(made[0]))
    make(tmp_path / "seven.h5", "--views", "2", shapes=7)
    np.testing.assert_array_equal(arrays(tmp_path / "seven.h5")["points"], arrays(made[0])["points"][:7])


def test_a_stopped_run_continues_and_gives_the_same_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shapes, "BLOCK", 5)
    out, real, numbers = tmp_path / "shapes.h5", make_shapes.make_shape, []

    def until_seven(number, *rest):
        numbers.append(number)
        if number == 7:
            raise KeyboardInterrupt
        return real(number, *rest)

    monkeypatch.setattr(make_shapes, "make_shape", until_seven)
    with pytest.raises(KeyboardInterrupt):
        make(out, "--views", "2")
    assert not out.exists()
    monkeypatch.setattr(make_shapes, "make_shape", lambda number, *rest: numbers.append(number) or real(number, *rest))
    numbers.clear()
    with pytest.raises(UserError, match="other settings"):
        make(out, "--views", "2", "--seed", "2")
    make(out, "--views", "2")
    assert numbers == list(range(5, 12))
    np.testing.assert_equal(arrays(out), arrays(made[0]))


def test_a_damaged_block_of_a_stopped_run_is_named(tmp_path, monkeypatch):
    out = tmp_path / "shapes.h5"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shapes, "write_packed", stop)
    with pytest.raises(KeyboardInterrupt):
        make(out, shapes=2)
    monkeypatch.undo()
    (block,) = (tmp_path / "shapes.h5.blocks").glob("*.npz")
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{block} is damaged.*Delete it"):
        make(out, shapes=2)


def test_a_file_that_is_there_is_kept(made):
    before = made[0].read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        make(made[0])
    assert made[0].read_bytes() == before


def test_another_seed_or_level_gives_other_shapes(made, tmp_path):
    first = arrays(made[0])["points"]
    make(tmp_path / "seed.h5", "--seed", "2")
    make(tmp_path / "level.h5", "--level", "2")
    assert not any((arrays(tmp_path / f"{n}.h5")["points"] == first).all((1, 2)).any() for n in ("seed", "level"))


def test_a_part_set_has_the_official_layout(made, tmp_path):
    counts = make(tmp_path / "shapes.h5", "--views", "2", "--part_set", tmp_path / "parts")
    assert counts["part_set"] == {"train": 10, "val": 1, "test": 1}
    packed = arrays(made[0])
    test = ShapeNetPart(tmp_path / "parts", "test")
    assert test.taxonomy.part_names == KINDS and test.taxonomy.category_names == ("generated",)
    np.testing.assert_array_equal(test.points[0], packed["points"][9])
    np.testing.assert_array_equal(test.parts[0], packed["part_kind"][9])
    assert len(ShapeNetPart(tmp_path / "parts", "train")) == 10
    with pytest.raises(UserError, match="exists"):
        make(tmp_path / "more.h5", "--part_set", tmp_path / "parts")
    assert not (tmp_path / "more.h5").exists()  # refused before the work


@needs_opengl
def test_rendered_pictures_show_what_splats_show(made, tmp_path):
    make(tmp_path / "rendered.h5", "--views", "2", "--pictures", "auto", shapes=8)
    with h5py.File(tmp_path / "rendered.h5") as file:
        assert file.attrs["pictures"] == "OpenGL"
    rendered, splatted = (ShapeNetRender(path).source for path in (tmp_path / "rendered.h5", made[0]))
    np.testing.assert_array_equal(rendered.points(3), splatted.points(3))
    agree = []
    for i in range(8):
        a, b = (np.asarray(Image.open(io.BytesIO(s.image_file(i, 0))))[..., 3] > 127 for s in (rendered, splatted))
        agree.append((a & b).sum() / (a | b).sum())
    assert np.median(agree) > 0.8


def test_without_opengl_pictures_are_splatted_and_the_user_is_told(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise UserError("cannot render without a display: install libegl1")

    monkeypatch.setattr(make_shapes, "Renderer", fail)
    counts = make(tmp_path / "a.h5", "--pictures", "auto", shapes=1)
    assert counts["settings"]["pictures"] == "splats" and "libegl1" in capsys.readouterr().err
    with pytest.raises(UserError, match="libegl1"):
        make(tmp_path / "b.h5", "--pictures", "opengl", shapes=1)
