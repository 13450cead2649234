import json
from weakref import WeakSet

import h5py
import numpy as np
import pytest
import torch

from datasets.s3dis import CLASS_NAMES, S3DIS
from downstream import finetuning
from downstream.segmentation import main_semseg as script
from engine.load_model import fine_tuned_from_checkpoint
from models import build_encoder
from models.task_heads import PartSegmentation, SemanticSegmentation
from tests.support.checkpoints import save_encoder, save_model
from tests.support.segmentation_sets import ROOMS, write_rooms
from utils.errors import CheckpointError, DataError, UserError

SMALL = ["--k", 4, "--emb_dims", 16, "--batch_size", 4, "--epochs", 1]


def build(in_channels=3, k=4, emb_dims=16, classes=13):
    torch.manual_seed(0)
    encoder = build_encoder("dgcnn_semseg", k=k, emb_dims=emb_dims, in_channels=in_channels)
    return SemanticSegmentation(encoder, num_classes=classes)


def save_rooms(path, **kwargs):
    return save_model(path, build(**kwargs), table={"class_names": CLASS_NAMES, "train_areas": [1]})


def published_names(state):
    """Rename as in the 9-channel DGCNN repository: DataParallel's prefix, each batch norm a second time as bnN."""
    published = {}
    for key, value in state.items():
        published[f"module.{key}"] = value
        block, place, *rest = key.split(".")
        if place == "1":
            published[f"module.bn{block.removeprefix('conv')}.{rest[0]}"] = value
    return published


def test_one_area_trains_and_both_protocols_are_scored_by_name(run, evaluate, tmp_path, capsys):
    report = tmp_path / "m.json"
    metrics = run("--protocol", "both", "--epochs", 15, "--lr", 0.01, "--in_channels", 9, "--json", report)
    assert json.loads(report.read_text()) == metrics
    (record,) = metrics["runs"]
    assert record["test_area"] == 5 and record["train_areas"] == [1, 2, 3, 4, 6]
    assert record["held_out_rooms"] == 5 and record["training_samples"] == 5
    assert metrics["protocols"] == ["blocks", "rooms"] == list(record["best"]["test"])
    for scores in record["best"]["test"].values():
        assert np.sum(scores["confusion"]) == 2 * 64  # every point of the room counts once, however often it is seen
        assert scores["overall_accuracy"] > 60 and len(scores["absent_classes"]) <= 10
    folder = tmp_path / "runs" / "a"
    assert (folder / "confusion_blocks.png").stat().st_size and (folder / "confusion_rooms.png").stat().st_size
    output = capsys.readouterr().out
    assert "protocol blocks: OA" in output and "protocol rooms: OA" in output and "not in mIoU: beam" in output
    again = evaluate(folder / "best.pth", "--protocol", "both")["runs"][0]
    assert again["test"] == record["best"]["test"]


def test_six_folds_in_one_call_go_on_where_they_stopped(run, evaluate, tmp_path, monkeypatch):
    trained, start, sets, alive = [], finetuning.train, WeakSet(), []

    class Counted(S3DIS):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sets.add(self)

    monkeypatch.setattr(script, "S3DIS", Counted)

    def train(run):
        trained.append(run.folder.path.name)
        alive.append(len(sets))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return start(run)

    monkeypatch.setattr(finetuning, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("--test_area", "all")
    with pytest.raises(UserError, match=r"area_3 is not finished \(it was not started\).*--resume"):
        evaluate(tmp_path / "runs" / "a", "--test_area", "all")
    with pytest.raises(UserError, match="holds an earlier run"):
        run("--test_area", "all")
    metrics = run("--test_area", "all", "--resume")
    assert trained == ["area_1", "area_2", "area_3", "area_3", "area_4", "area_5", "area_6"]
    assert alive[3:] == [12, 9, 6, 3]  # data of finished folds, with its open files, is gone
    assert [record["test_area"] for record in metrics["runs"]] == [1, 2, 3, 4, 5, 6]
    matrices = [np.array(record["best"]["test"]["blocks"]["confusion"]) for record in metrics["runs"]]
    assert metrics["six_fold"]["blocks"]["confusion"] == sum(matrices).tolist() and np.sum(matrices) == 12 * 64
    again = evaluate(tmp_path / "runs" / "a", "--test_area", "all")
    assert again["six_fold"] == metrics["six_fold"]


def test_train_area_trains_on_those_alone_and_never_on_the_tested_one(run):
    record = run("--test_area", 6, "--train_area", "1,2", 4)["runs"][0]
    assert record["train_areas"] == [1, 2, 4] and record["training_samples"] == 3
    with pytest.raises(UserError, match="names only area 5, which is the tested one"):
        run("--test_area", 5, "--train_area", "5", "--overwrite")


def test_a_finished_run_is_not_taken_for_one_of_another_area(run, tmp_path):
    areas = ("--train_area", "1,2", "--test_area")
    run(*areas, 5)
    for flags, message in (
        ((*areas, 4), r"\(--test_area \[5\] there, \[4\] here\)"),
        (("--train_area", "1,3", "--test_area", 5), r"\(--train_area \[\[1, 2\]\] there, \[\[1, 3\]\] here\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(*flags, "--resume")
    again = run(*areas, 5, "--resume", "--confusion_matrix", tmp_path / "c.png")  # which only draws
    assert again["runs"][0]["test_area"] == 5 and (tmp_path / "c.png").exists()


def test_the_released_train_area_leaves_the_tested_area_out(run):
    for number, areas in ((5, [1, 2, 3, 4, 6]), (1, [2, 3, 4, 5, 6])):
        (record,) = run("--train_area", "1,2,3,4,5,6", "--test_area", number, "--overwrite")["runs"]
        assert record["train_areas"] == areas and record["test_area"] == number


def test_few_labels_by_room_and_by_point_on_a_frozen_encoder(run, evaluate, tmp_path, capsys):
    encoder = build().encoder
    save_encoder(tmp_path / "pre.pth", encoder)
    few = ["--batch_size", 4, "--epochs", 1, "--pretrain_path", tmp_path / "pre.pth"]
    probe = ["--freeze_encoder", "--head", "linear", "--point_label_fraction", 0.05]
    metrics = run(*probe, "--label_fraction", 0.4, 0.7, "--confusion_matrix", tmp_path / "c.png", small=few)
    assert all((tmp_path / f"runs/a/label_{share}/confusion_blocks.png").exists() for share in (0.4, 0.7))
    assert [(r["label_fraction"], r["training_samples"], r["held_out_rooms"]) for r in metrics["runs"]] == [
        (0.4, 2, 2),
        (0.7, 4, 4),
    ]
    assert "six_fold" not in metrics and "40% of the samples, 5% of their points" in capsys.readouterr().out
    path = tmp_path / "runs/a/label_0.4/last.pth"
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(value, saved["point_encoder"][key]) for key, value in encoder.state_dict().items())
    assert {key.split(".")[0] for key in saved["head"]} == {"linear", "norm_pooled", "norm_local"}
    assert evaluate(path)["runs"][0]["test"] == metrics["runs"][0]["last"]["test"]
    with pytest.raises(UserError, match="--test_area all takes one --label_fraction"):
        run("--test_area", "all", "--label_fraction", 0.4, 0.7)
    with pytest.raises(UserError, match="--label_fraction 0: expected more than 0"):
        run("--label_fraction", 0, "--overwrite")


def test_labeled_rooms_are_a_share_and_follow_from_the_seed():
    rooms = [f"Area_1_office_{i}" for i in range(20)]
    for fraction, count in ((0.01, 1), (0.1, 2), (1, 20)):
        chosen = script.labeled_rooms(rooms, fraction, 3)
        expected = sorted(np.random.default_rng(3).permutation(20)[:count])
        assert chosen == [rooms[i] for i in expected]
        assert chosen == script.labeled_rooms(rooms, fraction, 3)
    assert script.labeled_rooms(rooms, 0.1, 4) != script.labeled_rooms(rooms, 0.1, 3)


def test_published_weights_of_nine_channels_are_scored(evaluate, data_root, tmp_path):
    model = build(in_channels=9, k=20)
    state = published_names(model.published_state_dict())
    assert {"module.conv1.0.weight", "module.bn1.running_var", "module.conv9.weight"} <= state.keys()
    assert state["module.conv1.0.weight"].shape == (64, 18, 1, 1)
    torch.save(state, tmp_path / "model_6.t7")
    path = tmp_path / "model_6.t7"
    metrics = evaluate(path, "--in_channels", 9, "--test_area", 6)
    loaded = fine_tuned_from_checkpoint(path, SemanticSegmentation)[0].eval()
    block, labels = S3DIS(data_root, [6], in_channels=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(block.T[None]), model.eval()(block.T[None]), rtol=0, atol=0)
    assert np.sum(metrics["runs"][0]["test"]["blocks"]["confusion"]) == 2 * 64
    with pytest.raises(CheckpointError, match="takes 9 values per point; --in_channels 3"):
        evaluate(path, "--in_channels", 3)
    del state["module.conv8.0.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"model_6\.t7 does not fit the head .* 1 missing: conv8\.0\.weight"):
        evaluate(path)


def test_a_room_is_put_together_from_the_mean_over_its_blocks():
    sure, unsure = torch.zeros(1, 13, 2), torch.zeros(1, 13, 2)
    sure[0, 4], unsure[0, 7] = 9.0, 1.0
    labels, index = torch.tensor([[4, 7]]), torch.tensor([[0, 1]])
    passes = [(sure, (None, labels, index, 0)), (unsure, (None, labels, index, 0))]
    truth, predicted, confidence = script.predict_room(passes, 2, "a")
    np.testing.assert_allclose(confidence[0], (sure[0].softmax(0) + unsure[0].softmax(0))[4, 0] / 2, rtol=1e-6)
    assert truth.tolist() == [4, 7] and predicted.tolist() == [4, 4]
    with pytest.raises(DataError, match="1 of the 3 points of a are in no test block"):
        script.predict_room(passes, 3, "a")


def test_a_pretrained_encoder_of_three_channels_starts_the_run_and_nine_are_refused(run, tmp_path):
    encoder = build().encoder
    save_encoder(tmp_path / "pre.pth", encoder)
    few = ["--batch_size", 4, "--epochs", 1]
    record = run("--pretrain_path", tmp_path / "pre.pth", small=few)["runs"][0]
    assert record["pretrain_path"] == str(tmp_path / "pre.pth")
    with pytest.raises(CheckpointError, match="an encoder of 3 values per point, not 9"):
        run("--pretrain_path", tmp_path / "pre.pth", "--in_channels", 9, "--overwrite", small=few)
    assert (tmp_path / "runs/a/last.pth").exists()


def test_whole_rooms_need_their_blocks_and_the_command_is_named_before_training(run, tmp_path):
    write_rooms(tmp_path / "data", ROOMS, blocks=1, whole=False)
    with pytest.raises(DataError, match="Make them from the raw rooms: python -m datasets.s3dis_prepare"):
        run("--protocol", "rooms", root=tmp_path / "data")
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_named(run, evaluate, tmp_path):
    save_rooms(tmp_path / "m.pth", classes=7)
    with pytest.raises(CheckpointError, match="has 7 classes, but S3DIS has 13"):
        evaluate(tmp_path / "m.pth")
    parts = PartSegmentation(build_encoder("dgcnn_partseg", k=4, emb_dims=16), num_categories=2, num_parts=5)
    save_model(tmp_path / "parts.pth", parts)
    with pytest.raises(CheckpointError, match="holds a model for part segmentation; expected a model for semantic"):
        evaluate(tmp_path / "parts.pth")
    save_rooms(tmp_path / "k.pth", k=65)
    with pytest.raises(UserError, match="k = 65 neighbors in clouds of 64 points"):
        evaluate(tmp_path / "k.pth", "--protocol", "rooms")
    with pytest.raises(UserError, match="--train_area names no area"):
        run("--train_area", ",")
    with pytest.raises(UserError, match="must be a run folder, or a pattern such as"):
        evaluate(tmp_path / "m.pth", "--test_area", "all")
    write_rooms(tmp_path / "data", [room for room in ROOMS if "Area_5" not in room])
    with pytest.raises(DataError, match="no room of area 5; it has rooms of the areas 1, 2, 3, 4, 6"):
        run(root=tmp_path / "data")


def test_scoring_on_an_area_that_was_trained_on_is_warned_of(evaluate, tmp_path, capsys):
    save_rooms(tmp_path / "m.pth")
    evaluate(tmp_path / "m.pth", "--test_area", 1, "--confusion_matrix", tmp_path / "c.png")
    assert "was trained on area 1" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size


def test_saved_predictions_give_the_scores_again_by_a_literal_loop(evaluate, tmp_path):
    save_rooms(tmp_path / "m.pth")
    arguments = ("--test_area", 5, "--protocol", "both", "--save_predictions", tmp_path / "p.h5")
    scores = evaluate(tmp_path / "m.pth", *arguments)["runs"][0]["test"]
    with h5py.File(tmp_path / "p.h5") as file:
        area = file["area_5"]
        assert sorted(area["rooms"]) == ["Area_5_hall_1", "Area_5_office_1"]
        for protocol, groups in (("blocks", [area["blocks"]]), ("rooms", list(area["rooms"].values()))):
            right, total, both, either = 0, 0, {}, {}
            for group in groups:
                for t, p in zip(group["truth"][()].ravel(), group["predicted"][()].ravel(), strict=True):
                    right, total = right + (t == p), total + 1
                    both[t] = both.get(t, 0) + (t == p)
                    either[t] = either.get(t, 0) + 1
                    if p != t:
                        either[p] = either.get(p, 0) + 1
            ious = [both.get(label, 0) / count for label, count in either.items()]
            assert 100 * right / total == pytest.approx(scores[protocol]["overall_accuracy"], abs=1e-6)
            assert 100 * sum(ious) / len(ious) == pytest.approx(scores[protocol]["mean_iou"], abs=1e-6)
