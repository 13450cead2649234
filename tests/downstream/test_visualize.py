import json

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

from datasets.s3dis import CLASS_COLORS
from downstream.segmentation import drawing
from downstream.segmentation import visualize as script
from models import build_encoder
from models.task_heads import Classification, PartSegmentation, SemanticSegmentation
from tests.support.checkpoints import save_model
from tests.support.segmentation_sets import write_parts, write_rooms
from utils.errors import CheckpointError, UserError


def run(tmp_path, *arguments):
    common = ["--data_root", tmp_path, "--output_dir", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    return script.main([str(a) for a in (*common, "--model_path", tmp_path / "m.pth", *arguments)])


def save(path, task, encoder, **sizes):
    torch.manual_seed(0)
    save_model(path, task(encoder, **sizes))


def read(path):
    vertex = PlyData.read(str(path))["vertex"].data
    return (np.stack([vertex[name] for name in names], 1) for names in ("xyz", ("red", "green", "blue")))


@pytest.fixture
def parts(tmp_path):
    folder = write_parts(tmp_path)
    encoder = build_encoder("dgcnn_partseg", k=4, emb_dims=16)
    save(tmp_path / "m.pth", PartSegmentation, encoder, num_categories=2, num_parts=5)
    return folder


def test_parts_are_written_in_the_colors_of_the_data_set(parts, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: drawn.append(figure))
    metrics = run(tmp_path, "--items", 3, "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == metrics
    # One of each category before a second one of the first.
    assert list(metrics["accuracy"]) == ["brick 0", "brick 2", "cone 1"]
    assert len(metrics["files"]) == 1 + 3 * 4
    shapes = script.ShapeNetPart(tmp_path, "test")
    points, colors = read(tmp_path / "out" / "cone_1_truth.ply")
    np.testing.assert_allclose(points, shapes.points[1])
    np.testing.assert_array_equal(colors, np.round(255 * shapes.taxonomy.colors[shapes.parts[1]]))
    _, errors = read(tmp_path / "out" / "cone_1_errors.ply")
    _, guess = read(tmp_path / "out" / "cone_1_prediction.ply")
    wrong = (guess != colors).any(1)
    assert (errors[wrong] == np.round(255 * np.array(drawing.WRONG_RED))).all()
    assert (errors[~wrong] == np.round(255 * np.array(drawing.RIGHT_GRAY))).all()
    assert metrics["accuracy"]["cone 1"] == pytest.approx(100 * (1 - wrong.mean()))
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["brick 0", "truth", "prediction"] and titles[3].startswith("errors: ")
    legend = [text.get_text() for text in figure.axes[14].get_legend().get_texts()]
    assert set(legend) >= {"cone part 0", "cone part 1", "cone part 2"} and not any("brick" in name for name in legend)


def test_parts_of_one_category_and_a_picture_that_opens(parts, tmp_path):
    metrics = run(tmp_path, "--task", "parts", "--class_test", "cone", "cone", "--items", 2)
    assert list(metrics["accuracy"]) == ["cone 1", "cone 3"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 5


def test_clouds_of_fewer_points_than_neighbors_are_refused(parts, tmp_path):
    with pytest.raises(UserError, match="k = 4 neighbors in clouds of 3 points"):
        run(tmp_path, "--num_points", 3)
    write_rooms(tmp_path, ["Area_5_hall_1"], points=48)
    save(tmp_path / "m.pth", SemanticSegmentation, build_encoder("dgcnn_semseg", k=4, emb_dims=16), num_classes=13)
    with pytest.raises(UserError, match="k = 49 neighbors in clouds of 48 points"):
        run(tmp_path, "--k", 49)


def test_all_rooms_that_are_named_are_drawn(tmp_path):
    rooms = ["Area_5_hall_1", "Area_5_office_1"]
    write_rooms(tmp_path, rooms, points=48)
    save(tmp_path / "m.pth", SemanticSegmentation, build_encoder("dgcnn_semseg", k=4, emb_dims=16), num_classes=13)
    assert list(run(tmp_path, "--rooms", *rooms, "--items", 1)["accuracy"]) == rooms


def test_rooms_are_drawn_whole_with_their_own_colors(tmp_path):
    write_rooms(tmp_path, ["Area_5_hall_1", "Area_5_office_1", "Area_2_hall_1"], points=48)
    save(tmp_path / "m.pth", SemanticSegmentation, build_encoder("dgcnn_semseg", k=4, emb_dims=16), num_classes=13)
    metrics = run(tmp_path, "--rooms", "Area_5_office_1")
    assert list(metrics["accuracy"]) == ["Area_5_office_1"] and (tmp_path / "out/sheet.png").exists()
    points, colors = read(tmp_path / "out" / "Area_5_office_1_truth.ply")
    assert len(points) == 2 * 48 and points[:, 2].max() <= 3 and points[:, 0].max() > 2  # meters
    low = points[:, 2] < 0.6
    assert (colors[low] == np.round(255 * CLASS_COLORS[1])).all()
    _, scan = read(tmp_path / "out" / "Area_5_office_1_input.ply")
    assert len(np.unique(scan, axis=0)) > 90
    with pytest.raises(UserError, match="no room Area_5_x in area 5; it has Area_5_hall_1, Area_5_office_1"):
        run(tmp_path, "--rooms", "Area_5_x")


def test_what_cannot_be_drawn_is_said(parts, tmp_path):
    with pytest.raises(UserError, match="unknown category 'boat'"):
        run(tmp_path, "--class_test", "boat")
    model = PartSegmentation(build_encoder("dgcnn_partseg", emb_dims=16), num_categories=2, num_parts=6)
    torch.save(model.published_state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="knows 6 parts of 2 categories"):
        run(tmp_path)  # published weights tell their task by their head
    with pytest.raises(CheckpointError, match="dgcnn_partseg, which has no head for semantic segmentation"):
        run(tmp_path, "--task", "rooms")
    save(tmp_path / "m.pth", Classification, build_encoder("dgcnn_cls", emb_dims=8), num_classes=3)
    with pytest.raises(CheckpointError, match="is not a model of parts or rooms: it is a model of classification"):
        run(tmp_path)
