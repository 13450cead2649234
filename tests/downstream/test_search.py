"""Search by picture and by shape, and its score on pairs."""

import json
import os
import runpy
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.reference.tiny_image_net import TinyImageNet
from datasets.pair_sources import open_source
from datasets.shapenet_part import draw_rows
from datasets.transforms import RenderPixels, plain_images
from datasets.untrusted import decode_image
from downstream import search as script
from engine.checkpoint import save_checkpoint
from engine.load_model import describe_encoder
from models import CrossNet, build_encoder
from models.image import IMAGE_ENCODERS
from tests.support.pairs import cloud_path, view_path, write_pairs, write_ply
from utils.errors import CheckpointError, DataError, UserError


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Save an untrained pretraining model as a run does."""
    monkeypatch.setitem(IMAGE_ENCODERS, "resnet18", TinyImageNet)
    return save_model(tmp_path / "last.pth")[1]


def save_model(path, modality="both", **more):
    torch.manual_seed(0)
    net = CrossNet(build_encoder("dgcnn_cls", k=4, emb_dims=16), image_model="resnet18", image_modality=modality)
    flags = {"image_model": "resnet18", "image_modality": modality, "objective": "con", "alpha": 1.0}
    flags |= {"temperature": 0.2, "image_size": 16, "background": "white", "num_points": 24}
    kept = {key: value for key, value in net.state_dict().items() if not key.startswith("point_encoder.")}
    save_checkpoint(
        path,
        {
            "kind": "crossnet-pretraining",
            "encoder": describe_encoder(net.point_encoder),
            "point_encoder": net.point_encoder.state_dict(),
            "heads_and_image_encoders": kept,
            "arguments": flags,
            **more,
        },
    )
    return path, net.eval()


def run(tmp_path, *arguments):
    settings = ("--model_path", tmp_path / "last.pth", "--device", "cpu")
    return script.main([str(a) for a in (*settings, *arguments)])


@torch.no_grad()
def embed(net, root, name):
    """Project one pair by the steps that the page describes: the cloud, the picture's color and gray branch."""
    source = open_source(root)
    i = source.ids.index(name)
    of_cloud, of_view = (np.random.default_rng([1, zlib.crc32(name.encode()), purpose]) for purpose in (0, 1))
    picture = decode_image(source.image_file(i, int(of_view.integers(len(source.view_names(i))))), name)
    points = source.points(i)
    points = torch.from_numpy(points[draw_rows(len(points), 24, of_cloud)])
    points = points - points.mean(0)
    points = points / points.norm(dim=1).max()
    images = plain_images(RenderPixels(16, background="white")(picture)[None], 16)
    rgb, gray = (net.image_heads[m](net.image_encoders[m](images[m]))[0] for m in ("rgb", "gray"))
    return net.point_head(net.point_encoder(points.T[None]).pooled)[0], {"both": rgb + gray, "rgb": rgb, "gray": gray}


def test_recall_is_that_of_a_literal_loop_and_the_sheet_is_drawn(model, tmp_path, capsys):
    names = write_pairs(tmp_path / "data", 14)
    listed = names[:3] + names[4:]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    metrics = run(
        tmp_path,
        *("--data_root", tmp_path / "data", "--list", tmp_path / "list.txt", "--batch_size", 6),
        *("--sheet", tmp_path / "sheet.png", "--rows", 1, "--top", 2, "--json", tmp_path / "m.json"),
    )
    assert json.loads((tmp_path / "m.json").read_text()) == metrics and metrics["pairs"] == 13
    assert metrics["chance"] == pytest.approx(
        {"recall_at_1": 100 / 13, "recall_at_5": 500 / 13, "recall_at_10": 1000 / 13, "median_rank": 7}
    )
    pairs = [embed(model, tmp_path / "data", name) for name in listed]
    for branch in ("both", "rgb", "gray"):
        for direction in ("image_to_shape", "shape_to_image"):
            ranks = []
            for i, (cloud, pictures) in enumerate(pairs):
                if direction == "image_to_shape":
                    cosines = [torch.cosine_similarity(pictures[branch], other, dim=0) for other, _ in pairs]
                else:
                    cosines = [torch.cosine_similarity(cloud, other[branch], dim=0) for _, other in pairs]
                ranks.append(1 + sum(cosine > cosines[i] for cosine in cosines).item())
            found = metrics[direction][branch]
            for k in (1, 5, 10):
                assert found[f"recall_at_{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 13)
            assert found["median_rank"] == sorted(ranks)[6]
    assert Image.open(tmp_path / "sheet.png").width > 500
    output = capsys.readouterr().out
    assert "image to shape, both" in output and "chance" in output and "--val_fraction" not in output


def test_bad_pairs_are_named_and_left_out_and_the_exit_code_says_so(model, tmp_path, monkeypatch, capsys):
    names = write_pairs(tmp_path / "data", 6, views=1)
    for picture in view_path(tmp_path / "data", names[2]).parent.glob("*.png"):
        picture.write_bytes(b"no picture")
    cloud_path(tmp_path / "data", names[4]).write_bytes(b"no cloud")
    command = ["search", "--model_path", tmp_path / "last.pth", "--data_root", tmp_path / "data", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [str(a) for a in (*command, "--json", tmp_path / "m.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script.__file__, run_name="__main__")
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert ended.value.code == 1 and metrics["pairs"] == 4 and set(metrics["skipped"]) == {names[2], names[4]}
    output = capsys.readouterr().out
    assert ".png is not a readable PNG" in output and f"{names[4]}.ply is not a readable PLY" in output
    (tmp_path / "list.txt").write_text(names[2])
    with pytest.raises(DataError, match="none of the pairs could be read"):
        run(tmp_path, "--data_root", tmp_path / "data", "--list", tmp_path / "list.txt")


def write_gallery(folder):
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        write_ply(folder / f"cloud{i}.ply", rng.normal(size=(60, 3)) * rng.uniform(0.2, 2, 3))
    (folder / "deep" / "tent.off").write_text(
        "OFF\n4 4 0\n0 0 0\n2 0 0\n0 3 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    )


def test_a_shape_of_the_gallery_finds_itself_and_pictures_find_shapes(model, tmp_path, capsys):
    write_gallery(tmp_path / "mine")
    photo = Image.new("RGB", (50, 30), "white")
    photo.paste((200, 20, 20), (10, 5, 30, 25))
    photo.save(tmp_path / "photo.jpg")
    photo.convert("RGBA").rotate(30).save(tmp_path / "cut.png")
    shapes = [tmp_path / "mine" / "cloud2.ply", tmp_path / "mine" / "deep" / "tent.off"]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "cloud1.ply").write_bytes((tmp_path / "mine" / "cloud1.ply").read_bytes())
    result = run(
        tmp_path,
        *("--gallery", tmp_path / "mine", "--query", *shapes, tmp_path / "copy" / "cloud1.ply"),
        *(tmp_path / "photo.jpg", tmp_path / "cut.png", "--sheet", tmp_path / "s.png", "--json", tmp_path / "s.json"),
    )
    assert json.loads((tmp_path / "s.json").read_text()) == result and not result["skipped"]
    assert len(result["gallery"]) == 5 and (tmp_path / "s.png").stat().st_size > 10_000
    first = {query["query"]: query["found"][0] for query in result["queries"]}
    for shape in shapes:
        assert first[str(shape)]["path"] == str(shape) and first[str(shape)]["similarity"] == 1
    assert first[str(tmp_path / "copy" / "cloud1.ply")]["name"] == "cloud1"
    assert [query["background"] for query in result["queries"]] == [None, None, None, "plain", "transparent"]
    for query in result["queries"]:
        values = [item["similarity"] for item in query["found"]]
        assert len(values) == 5 and values == sorted(values, reverse=True)
    assert "photo.jpg (picture, background plain)" in capsys.readouterr().out


def test_without_a_gallery_the_shapes_of_the_pairs_are_searched(model, tmp_path):
    names = write_pairs(tmp_path / "data", 6)
    query = cloud_path(tmp_path / "data", names[3])
    (tmp_path / "list.txt").write_text("\n".join(names[1:]))
    pairs = ("--data_root", tmp_path / "data", "--list", tmp_path / "list.txt", "--num_points", 48)
    result = run(tmp_path, *pairs, "--query", query, "--sheet", tmp_path / "s.png")
    assert len(result["gallery"]) == 5
    assert result["queries"][0]["found"][0] == {"name": names[3], "path": str(query), "similarity": 1.0}


def test_a_picture_is_compared_as_in_the_pairs(model, tmp_path):
    write_gallery(tmp_path / "mine")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8))
    picture.save(tmp_path / "photo.png")
    (query,) = run(tmp_path, "--gallery", tmp_path / "mine", "--query", tmp_path / "photo.png", "--top", 9)["queries"]
    images = plain_images(RenderPixels(16)(picture)[None], 16)
    settings = script.PredictorSettings(task="features", num_points=24, device="cpu")
    report = script.Predictor(tmp_path / "last.pth", settings)
    with torch.no_grad():
        wanted = sum(model.project_images(name, images[name])[0] for name in ("rgb", "gray"))
        for item in query["found"]:
            path = next(p for p in (tmp_path / "mine").rglob("*.*") if str(p) == item["path"])
            shape = model.point_head(torch.from_numpy(report.predict(path, path.stem).features)[None])[0]
            assert item["similarity"] == pytest.approx(torch.cosine_similarity(wanted, shape, dim=0).item(), abs=1e-3)


def test_a_plain_background_stays_when_asked(model, tmp_path):
    write_gallery(tmp_path / "mine")
    photo = Image.new("RGB", (40, 40), "white")
    photo.paste((200, 20, 20), (10, 5, 30, 25))
    photo.save(tmp_path / "photo.png")
    search = ("--gallery", tmp_path / "mine", "--query", tmp_path / "photo.png")
    replaced, kept = (run(tmp_path, *search, *more)["queries"][0] for more in ((), ("--keep_background",)))
    assert (replaced["background"], kept["background"]) == ("plain", "kept") and replaced["found"] != kept["found"]


def test_bad_queries_and_shapes_are_named(model, tmp_path, capsys):
    write_gallery(tmp_path / "mine")
    (tmp_path / "mine" / "cut.off").write_text("OFF\n4 4 0\n0 0 0\n")
    (tmp_path / "no.png").write_text("no picture")
    strange = tmp_path / "mine" / os.fsdecode(b"\xff.ply")
    shutil.copy(tmp_path / "mine" / "cloud0.ply", strange)
    shape, search = tmp_path / "mine" / "cloud0.ply", ("--gallery", tmp_path / "mine", "--query")
    result = run(tmp_path, *search, shape, tmp_path / "no.png", tmp_path / "gone.png")
    bad = {str(tmp_path / name) for name in ("mine/cut.off", "no.png", "gone.png")}
    assert set(result["skipped"]) == {*bad, str(strange)}
    assert capsys.readouterr().out.count("skipped: ") == 4 and len(result["queries"]) == 1
    with pytest.raises(DataError, match=r"no query could be used: .*no\.png is not a readable picture") as caught:
        run(tmp_path, *search, tmp_path / "no.png")
    assert "cut.off" not in str(caught.value)
    with pytest.raises(DataError, match="the gallery has no usable shape"):
        run(tmp_path, "--gallery", tmp_path / "empty", "--query", shape)


def test_settings_and_checkpoints_that_cannot_search(model, tmp_path):
    with pytest.raises(UserError, match="--gallery is searched by --query"):
        run(tmp_path, "--gallery", "models")
    with pytest.raises(UserError, match="--fill 2"):
        run(tmp_path, "--fill", 2)
    encoder = model.point_encoder
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"encoder": describe_encoder(encoder), "point_encoder": encoder.state_dict()})
    with pytest.raises(CheckpointError, match=r"last\.pth contains no projection heads and image encoders"):
        run(tmp_path, "--data_root", tmp_path)


def test_the_pairs_that_a_run_held_out_are_measured(model, tmp_path, capsys):
    names = write_pairs(tmp_path / "data", 8)
    save_model(tmp_path / "last.pth", held_out=names[2:5])
    metrics = run(tmp_path, "--data_root", tmp_path / "data")
    assert (metrics["pairs"], metrics["held_out"]) == (3, True)
    shown = capsys.readouterr().out
    assert "held out of the run's training" in shown and "are not in" not in shown
    save_model(tmp_path / "last.pth", held_out=[*names[2:5], "other/gone"])
    assert run(tmp_path, "--data_root", tmp_path / "data")["pairs"] == 3
    assert f"1 pairs that it held out are not in {tmp_path / 'data'}" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("\n".join(names[:4]))
    assert run(tmp_path, "--data_root", tmp_path / "data", "--list", tmp_path / "list.txt")["pairs"] == 4
    save_model(tmp_path / "last.pth", held_out=["other/set"])
    metrics = run(tmp_path, "--data_root", tmp_path / "data")
    assert (metrics["pairs"], metrics["held_out"]) == (8, False)


def test_a_run_of_one_branch_is_measured_by_it(model, tmp_path):
    save_model(tmp_path / "last.pth", "gray")
    write_pairs(tmp_path / "data", 6)
    metrics = run(tmp_path, "--data_root", tmp_path / "data", "--num_points", 48)
    assert list(metrics["image_to_shape"]) == ["gray"] and metrics["num_points"] == 48
