"""Answers on one's own files: parts, rooms, classes, features; what cannot be used is named."""

import csv
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from datasets.s3dis import CLASS_NAMES, S3DISRooms
from datasets.s3dis_prepare import BlockSettings, Room, write_room
from downstream import predict as script
from downstream.finetuning import scores_of
from downstream.segmentation import drawing
from downstream.segmentation.main_semseg import predict_room
from models import build_encoder
from models.task_heads import Classification, PartSegmentation, SemanticSegmentation
from tests.support.checkpoints import save_encoder, save_model
from tests.support.commands import command
from utils.errors import CheckpointError, DataError, UserError

RNG = np.random.default_rng(0)
PART_TABLE = {
    "category_names": ["brick", "cone"],
    "part_counts": [2, 3],
    "part_names": ["b0", "b1", "c0", "c1", "c2"],
    "class_choice": None,
}


def save(path, task, encoder, table=None, **sizes):
    torch.manual_seed(0)
    return save_model(path, task(encoder, **sizes), table=table or {})


def run(tmp_path, model, *inputs, out="out"):
    return script.main(
        ["--model_path", str(model), "--output_dir", str(tmp_path / out), "--device", "cpu", *map(str, inputs)]
    )


def write_cloud(path, points, colors=None):
    kinds = [(axis, "f4") for axis in "xyz"] + [(c, "u1") for c in ("red", "green", "blue") if colors is not None]
    rows = np.empty(len(points), kinds)
    for name, column in zip(
        rows.dtype.names, (points if colors is None else np.hstack([points, colors])).T, strict=True
    ):
        rows[name] = column
    PlyData([PlyElement.describe(rows, "vertex")]).write(str(path))
    return path


def write_mesh(path):
    path.write_text("OFF\n4 4 0\n0 0 0\n2 0 0\n0 3 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n")
    return path


def read(path):
    vertex = PlyData.read(str(path))["vertex"].data
    return np.stack([vertex[axis] for axis in "xyz"], 1), vertex["label"], np.stack([vertex["red"], vertex["blue"]], 1)


@pytest.fixture
def parts(tmp_path):
    encoder = build_encoder("dgcnn_partseg", k=4, emb_dims=16)
    return save(tmp_path / "m.pth", PartSegmentation, encoder, PART_TABLE, num_categories=2, num_parts=5)


def test_every_point_of_a_cloud_gets_a_part_of_its_category(parts, tmp_path, capsys):
    points = RNG.normal(size=(150, 3)) * 40 + 7
    write_cloud(tmp_path / "a.ply", points)
    summary = run(tmp_path, parts, tmp_path / "a.ply", "--num_points", 64, "--category", "Cone")
    written, labels, colors = read(tmp_path / "out" / "a_parts.ply")
    np.testing.assert_allclose(written, points, rtol=1e-5)  # where they were in the file
    assert set(labels) <= {2, 3, 4}
    assert len(np.unique(colors[labels == labels[0]], axis=0)) == 1
    rows = list(csv.DictReader(open(tmp_path / "out" / "parts.csv")))
    assert sum(int(row["points"]) for row in rows) == 150 and {row["category"] for row in rows} == {"cone"}
    assert {row["name"] for row in rows} <= {"c0", "c1", "c2"}
    assert summary["task"] == "parts" and summary["skipped"] == {}
    assert Path(summary["files"][-1]).name == "sheet.png" and (tmp_path / "out" / "sheet.png").stat().st_size > 5000
    assert re.search(r"^a: cone: c\d \d+%", capsys.readouterr().out, re.MULTILINE)


def test_tables_and_answers_count_all_points_when_the_report_keeps_few(parts, tmp_path):
    write_cloud(tmp_path / "a.ply", RNG.normal(size=(10_000, 3)))
    settings = {"num_points": 500, "category": "cone", "device": "cpu"}
    whole = script.predict(parts, [tmp_path / "a.ply"], **settings)
    few = script.predict(parts, [tmp_path / "a.ply"], tmp_path / "out", keep_points=False, **settings)
    rows = list(csv.DictReader(open(tmp_path / "out" / "parts.csv")))
    labels = whole.predictions[0].labels
    assert sum(([int(row["label"])] * int(row["points"]) for row in rows), []) == sorted(labels)
    assert few.answers == whole.answers and len(few.answers) == 1
    kept = few.predictions[0]
    assert len(kept.points) == len(kept.labels) == 5000 and kept.points.base is None  # every second one, a copy
    np.testing.assert_array_equal(kept.labels, labels[::2])


def test_the_sheet_shows_what_the_file_holds_and_what_is_predicted(parts, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: drawn.append(figure))
    colors = RNG.integers(256, size=(64, 3))
    write_cloud(tmp_path / "a.ply", RNG.normal(size=(64, 3)), colors)
    run(tmp_path, parts, tmp_path / "a.ply", "--num_points", 64, "--category", "cone", "--up", "z")
    (figure,) = drawn
    shown, predicted, legend = figure.axes
    assert [axes.get_title() for axes in (shown, predicted)] == ["a: cone", "prediction"]
    np.testing.assert_allclose(
        np.sort(shown.collections[0].get_facecolor()[:, :3], axis=0), np.sort(colors / 255, axis=0), atol=1e-6
    )
    names = [text.get_text() for text in legend.get_legend().get_texts()]
    assert names and set(names) <= {"c0", "c1", "c2"}


def test_a_room_of_ceiling_alone_is_drawn(tmp_path):
    model = SemanticSegmentation(build_encoder("dgcnn_semseg", k=4, emb_dims=16), num_classes=13)
    torch.nn.init.zeros_(model.head.conv9.weight)  # equal scores: the first class everywhere
    save_model(tmp_path / "m.pth", model, table={})
    write_cloud(tmp_path / "a.ply", RNG.uniform(size=(64, 3)))
    summary = run(tmp_path, tmp_path / "m.pth", tmp_path / "a.ply", "--num_points", 32)
    rows = list(csv.DictReader(open(tmp_path / "out" / "rooms.csv")))
    assert [(row["name"], row["points"]) for row in rows] == [("ceiling", "64")]
    assert Path(summary["files"][-1]).name == "sheet.png" and (tmp_path / "out" / "sheet.png").stat().st_size > 5000


def test_features_need_an_encoder_of_coordinates(tmp_path):
    encoder = build_encoder("dgcnn_semseg", k=4, emb_dims=16, in_channels=9)
    save(tmp_path / "m.pth", SemanticSegmentation, encoder, num_classes=13)
    write_cloud(tmp_path / "a.ply", RNG.uniform(size=(64, 3)))
    with pytest.raises(CheckpointError, match="m.pth holds an encoder of 9 values per point, not 3"):
        run(tmp_path, tmp_path / "m.pth", tmp_path / "a.ply", "--task", "features")


def test_the_parts_are_those_of_a_literal_pass(parts, tmp_path):
    points = RNG.normal(size=(64, 3))
    write_cloud(tmp_path / "a.ply", points)
    report = script.predict(parts, [tmp_path / "a.ply"], category="cone", num_points=64, device="cpu")
    model, _ = script.fine_tuned_from_checkpoint(parts, PartSegmentation)
    unit = torch.tensor(script.to_unit_sphere(report.predictions[0].points), dtype=torch.float32)
    with torch.no_grad():
        scores = model.eval()(unit.T[None], torch.tensor([1]))[0]
    np.testing.assert_array_equal(report.predictions[0].labels, 2 + scores[2:].argmax(0).numpy())


def test_the_category_is_the_likeliest_one_and_may_be_given_by_the_checkpoint(parts, tmp_path):
    write_cloud(tmp_path / "a.ply", RNG.normal(size=(64, 3)))
    report = script.predict(parts, [tmp_path / "a.ply"], num_points=64, device="cpu")
    model, _ = script.fine_tuned_from_checkpoint(parts, PartSegmentation)
    unit = torch.tensor(script.to_unit_sphere(report.predictions[0].points), dtype=torch.float32).T[None]
    shares = {}
    for number, (category, own) in enumerate((("brick", slice(0, 2)), ("cone", slice(2, 5)))):
        one = script.predict(parts, [tmp_path / "a.ply"], num_points=64, device="cpu", category=category)
        assert one.predictions[0].category == category
        with torch.no_grad():
            shares[category] = float(model.eval()(unit, torch.tensor([number]))[0].softmax(0)[own].sum(0).mean())
    assert report.predictions[0].category == max(shares, key=shares.get)
    encoder = build_encoder("dgcnn_partseg", k=4, emb_dims=16)
    table = {**PART_TABLE, "class_choice": "cone"}
    own = save(tmp_path / "own.pth", PartSegmentation, encoder, table, num_categories=2, num_parts=3)
    report = script.predict(own, [tmp_path / "a.ply"], num_points=64, device="cpu")
    assert report.predictions[0].category == "cone" and set(report.predictions[0].labels) <= {2, 3, 4}
    with pytest.raises(UserError, match="cone alone"):
        script.predict(own, [tmp_path / "a.ply"], category="brick", device="cpu")


def test_classes_of_meshes_and_clouds_in_a_folder(tmp_path):
    model = save(
        tmp_path / "m.pth", Classification, build_encoder("dgcnn_cls", k=4, emb_dims=16),
        {"class_names": ["chair", "lamp", "table"]}, num_classes=3,
    )  # fmt: skip
    folder = tmp_path / "mine" / "deep"
    folder.mkdir(parents=True)
    write_mesh(folder / "a.off")
    np.save(folder / "b.npy", RNG.normal(size=(30, 3)))
    (folder / "notes.txt.md").write_text("not a shape")
    summary = run(tmp_path, model, tmp_path / "mine", "--num_points", 32, "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == summary
    rows = list(csv.DictReader(open(tmp_path / "out" / "classes.csv")))
    assert [Path(row["file"]).name for row in rows] == ["a.off", "b.npy"]
    for row in rows:
        values = {name: float(row[name]) for name in ("chair", "lamp", "table")}
        assert sum(values.values()) == pytest.approx(1, abs=1e-4)
        assert row["class"] == max(values, key=values.get) and float(row["probability"]) == max(values.values())
    again = script.predict(model, [tmp_path / "mine"], num_points=32, device="cpu")
    assert [p.name for p in again.predictions] == ["deep-a", "deep-b"]


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    return save_encoder(tmp_path / "pre.pth", build_encoder("dgcnn_cls", k=4, emb_dims=16), kind="pretraining")


def test_features_and_their_neighbors(encoder, tmp_path):
    for name in "abcd":
        write_cloud(tmp_path / f"{name}.ply", RNG.normal(size=(40, 3)) * [1, 1, 1 + 5 * (name > "b")])
    run(tmp_path, encoder, str(tmp_path / "*.ply"), "--num_points", 40, "--neighbors", 2)
    with np.load(tmp_path / "out" / "features.npz") as found:
        assert found["names"].tolist() == list("abcd") and found["features"].shape == (4, 32)
        assert np.isfinite(found["features"]).all()
    assert (tmp_path / "out" / "neighbors.png").stat().st_size > 5000


def test_the_sheet_of_neighbors_shows_the_whole_of_a_scan_in_order(encoder, tmp_path, monkeypatch):
    for name in "ab":
        write_cloud(tmp_path / f"{name}.ply", np.linspace([0, 0, 0], [1, 1, 1], 10_000))
    drawn = []
    monkeypatch.setattr(script, "draw_neighbors", lambda clouds, *_, **__: drawn.extend(clouds))
    run(tmp_path, encoder, str(tmp_path / "*.ply"), "--num_points", 40, "--neighbors", 1)
    assert all(1000 < len(points) < 5000 and points.max() > 0.99 for points in drawn) and len(drawn) == 2
    with pytest.raises(SystemExit):
        run(tmp_path, encoder, tmp_path / "a.ply", "--neighbors", -1)


def test_the_up_axis_of_a_file_does_not_matter_once_it_is_said(encoder, tmp_path):
    points = RNG.normal(size=(40, 3))
    write_cloud(tmp_path / "a.ply", points)
    (tmp_path / "z").mkdir()
    write_cloud(tmp_path / "z" / "a.ply", np.stack([points[:, 0], -points[:, 2], points[:, 1]], 1))
    one = script.predict(encoder, [tmp_path / "a.ply"], num_points=40, device="cpu").predictions[0]
    two = script.predict(encoder, [tmp_path / "z" / "a.ply"], num_points=40, up="z", device="cpu").predictions[0]
    np.testing.assert_allclose(one.features, two.features, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 9])
def test_a_room_is_predicted_as_the_whole_room_protocol_does(tmp_path, channels):
    encoder = build_encoder("dgcnn_semseg", k=4, emb_dims=16, in_channels=channels)
    model = save(tmp_path / "m.pth", SemanticSegmentation, encoder, num_classes=len(CLASS_NAMES))
    points = RNG.uniform(size=(300, 3)) * [2.2, 1.4, 2.5]
    colors = RNG.integers(256, size=(300, 3))
    write_cloud(tmp_path / "Area_1_office_1.ply", points * 1000, colors)
    report = script.predict(
        model, [tmp_path / "Area_1_office_1.ply"], tmp_path / "out", num_points=64, units="mm", device="cpu"
    )
    (found,) = report.predictions
    # The same room by the command that prepares S3DIS, and the evaluation of S3DIS.
    xyz = found.points * 0.001
    room = Room("Area_1_office_1", xyz, colors.astype(np.float32), np.zeros(300, np.uint8))
    write_room(tmp_path, room, "test", BlockSettings(num_points=64))
    folder = tmp_path / "indoor3d_sem_seg_hdf5_data_test"
    (folder / "all_files.txt").write_text("ply_data_all_Area_1_office_1.h5\n")
    with h5py.File(folder / "ply_data_all_Area_1_office_1.h5") as file:
        (folder / "room_filelist.txt").write_text("Area_1_office_1\n" * len(file["data"]))
    rooms = S3DISRooms(tmp_path, 1, in_channels=channels)
    net, _ = script.fine_tuned_from_checkpoint(model, SemanticSegmentation)
    _, expected, _ = predict_room(scores_of(net, rooms, batch_size=8, device=torch.device("cpu")), 300, "room")
    assert (found.labels == expected).mean() > 0.99
    assert (found.confidence > 1 / len(CLASS_NAMES)).all() and (tmp_path / "out" / "sheet.png").exists()
    written, labels, _ = read(tmp_path / "out" / "Area_1_office_1_rooms.ply")
    np.testing.assert_array_equal(labels, found.labels)
    np.testing.assert_allclose(written, points * 1000, rtol=1e-5)


def test_a_room_without_colors_or_with_wrong_units_is_refused_by_name(tmp_path):
    encoder = build_encoder("dgcnn_semseg", k=4, emb_dims=16, in_channels=9)
    model = save(tmp_path / "m.pth", SemanticSegmentation, encoder, num_classes=len(CLASS_NAMES))
    write_cloud(tmp_path / "gray.ply", RNG.uniform(size=(99, 3)))
    write_cloud(tmp_path / "far.ply", RNG.uniform(size=(99, 3)) * 5000, np.zeros((99, 3)))
    with pytest.raises(DataError, match="gray.ply has no colors") as error:
        script.predict(model, [tmp_path / "gray.ply", tmp_path / "far.ply"], num_points=64, device="cpu")
    assert "--units" in str(error.value)


def test_bad_files_are_named_and_skipped_and_the_exit_code_says_so(encoder, tmp_path):
    write_mesh(tmp_path / "good.off")
    (tmp_path / "cut.off").write_text("OFF\n4 4 0\n0 0 0\n2 0 0\n")
    (tmp_path / "empty.ply").write_bytes(b"")
    write_cloud(tmp_path / "few.ply", RNG.normal(size=(3, 3)))
    inputs = [tmp_path / name for name in ("good.off", "cut.off", "empty.ply", "few.ply", "missing.ply")]
    flags = ("--model_path", encoder, "--num_points", 32, "--output_dir", tmp_path / "out")
    done = command("downstream/predict.py", *flags, *inputs)
    assert done.returncode == 1, done.stderr
    for name in ("cut.off", "empty.ply", "few.ply", "missing.ply"):
        assert f"skipped: {tmp_path / name}" in done.stdout
    with np.load(tmp_path / "out" / "features.npz") as found:
        assert found["names"].tolist() == ["good"]
    with pytest.raises(UserError, match="not empty"):
        run(tmp_path, encoder, tmp_path / "good.off")
    with pytest.raises(DataError, match="none of the files"):
        run(tmp_path, encoder, tmp_path / "cut.off", "--num_points", 32, out="other")


def test_files_of_one_name_keep_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_mesh(tmp_path / folder / "a.off")
    names, missing = script.find_inputs([tmp_path / "one" / "a.off", tmp_path / "two" / "a.off", tmp_path / "one"])
    assert sorted(names) == ["one-a.off", "two-a.off"] and not missing
    (tmp_path / "set" / "lamps" / "old").mkdir(parents=True)
    write_mesh(tmp_path / "set" / "lamps" / "old" / "old.off")
    assert list(script.find_inputs([tmp_path / "set"])[0]) == ["lamps-old"]


def test_published_weights_answer_by_their_head(tmp_path, caplog):
    model = Classification(build_encoder("dgcnn_cls", k=20, emb_dims=16), num_classes=3)
    write_cloud(tmp_path / "a.ply", RNG.normal(size=(64, 3)))
    path = tmp_path / "published.pth"
    torch.save(model.published_state_dict(), path)
    with caplog.at_level("INFO", "crossnet"):
        report = script.predict(path, [tmp_path / "a.ply"], num_points=64, device="cpu")
    assert report.task == "classes" and report.label_names == ["class 0", "class 1", "class 2"]
    assert caplog.text.count("by its tensors it is a dgcnn_cls") == 1 and "left out" not in caplog.text
    asked = script.predict(path, [tmp_path / "a.ply"], task="features", num_points=64, device="cpu")
    torch.save(model.encoder.state_dict(), path)
    plain = script.predict(path, [tmp_path / "a.ply"], num_points=64, device="cpu")
    assert plain.task == "features"
    np.testing.assert_array_equal(asked.predictions[0].features, plain.predictions[0].features)
