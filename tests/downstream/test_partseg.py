import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from datasets.shapenet_part import ShapeNetPart
from downstream import finetuning
from downstream.predict import Predictor, PredictorSettings, predict
from downstream.segmentation import main_partseg as script
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.load_model import fine_tuned_from_checkpoint
from engine.task import Run
from models import build_encoder
from models.task_heads import PartSegmentation, SemanticSegmentation
from tests.support.checkpoints import save_encoder, save_model, save_published
from tests.support.comparing import metrics
from tests.support.segmentation_sets import write_parts
from utils.errors import CheckpointError, DataError, UserError

SMALL = ["--k", 4, "--emb_dims", 16, "--batch_size", 4, "--epochs", 2]


def save_parts(path, *, categories=2, parts=5, published=False):
    torch.manual_seed(0)
    encoder = build_encoder("dgcnn_partseg", emb_dims=16, k=20 if published else 4)
    model = PartSegmentation(encoder, num_categories=categories, num_parts=parts)
    if published:
        save_published(path, model)
    else:
        save_model(path, model, table=table(categories, parts))
    return model


def table(categories, parts):
    counts = [parts // categories] * (categories - 1) + [parts - parts // categories * (categories - 1)]
    names = ["brick", "cone", *map(str, range(2, categories))][:categories]
    every = [f"{name} part {i}" for name, count in zip(names, counts, strict=True) for i in range(count)]
    return {"category_names": names, "part_counts": counts, "part_names": every, "class_choice": None}


def test_training_learns_the_parts_and_reports_best_and_last(run, evaluate, tmp_path, capsys):
    report = run("--epochs", 12, "--lr", 0.01, "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == report
    (record,) = report["runs"]
    assert record["selected_on"] == "val" and record["training_samples"] == 8
    assert record["last"]["epoch"] == 12 and 1 <= record["best"]["epoch"] <= 12
    assert record["best"]["val_instance_miou"] >= record["last"]["val_instance_miou"]
    # A third of the points would be right by chance.
    assert record["best"]["test"]["accuracy"] > 60
    folder = tmp_path / "runs" / "a"
    assert {p.name for p in folder.iterdir()} >= {"last.pth", "best.pth", "config.json", "metrics.jsonl", "run.log"}
    lines = metrics(folder)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert {"step", "loss", "lr", "shapes_per_s", "data_wait", "val_instance_miou"} <= lines[0].keys()
    assert lines[-1]["lr"] < lines[0]["lr"] / 30
    output = capsys.readouterr().out
    assert "best on val" in output and "last (epoch 12)" in output
    assert (folder / "run.log").read_text().count("starts fresh") == 2
    again = evaluate(folder / "best.pth")["runs"][0]["test"]
    assert again == record["best"]["test"]


def test_a_run_that_was_stopped_within_an_epoch_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    few = ["--epochs", 3, "--save_every", 1, "--log_every", 1]
    whole = run(*few)["runs"][0]
    shutil.move(tmp_path / "runs", tmp_path / "whole")
    step, stop = Run.step, iter(range(4))  # of 6 steps, 2 an epoch: stops in the middle of the second

    def interrupted(self, batch):
        if next(stop, None) == 3:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", interrupted)
        run(*few)
    resumed = run(*few, "--resume")["runs"][0]
    assert resumed["last"] == whole["last"]
    first, second = (torch.load(tmp_path / name / "a" / "last.pth", weights_only=True) for name in ("whole", "runs"))
    for part in ("point_encoder", "head"):
        assert all(torch.equal(first[part][key], value) for key, value in second[part].items())
    # A finished run is not trained again.
    monkeypatch.setattr(finetuning, "train", None)
    assert run(*few, "--resume")["runs"][0]["last"] == whole["last"]


def pretrained(path):
    torch.manual_seed(5)
    encoder = build_encoder("dgcnn_partseg", k=4, emb_dims=16)
    save_encoder(path, encoder)
    return encoder


def test_pretrained_encoder_is_loaded_whole_and_told(run, tmp_path):
    encoder = pretrained(tmp_path / "pre.pth")
    few = ["--batch_size", 4, "--epochs", 1, "--lr", 0]
    run("--pretrain_path", tmp_path / "pre.pth", "--momentum", 0, small=few)
    trained = torch.load(tmp_path / "runs/a/last.pth", weights_only=True)
    assert trained["encoder"]["kwargs"] == {"k": 4, "emb_dims": 16}
    for name, parameter in encoder.named_parameters():
        assert torch.equal(trained["point_encoder"][name], parameter), name
    output = (tmp_path / "runs/a/run.log").read_text()
    assert f"loaded from {tmp_path / 'pre.pth'}, all of it" in output
    assert "head for part segmentation (conv7, conv8, conv9, conv10, conv11)" in output


def test_an_encoder_of_another_layout_is_refused_before_the_run_folder_is_touched(run, tmp_path):
    encoder = build_encoder("dgcnn_cls", k=4, emb_dims=16)
    save_encoder(tmp_path / "pre.pth", encoder)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "last.pth").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="dgcnn_cls, which has no head for part segmentation: pretrain with"):
        run("--pretrain_path", tmp_path / "pre.pth", "--overwrite")
    assert (folder / "last.pth").read_bytes() == b"precious"
    with pytest.raises(UserError, match="holds an earlier run"):
        run()
    assert (folder / "last.pth").read_bytes() == b"precious"


def test_limited_labels_are_one_run_each_and_keep_every_category(run, tmp_path):
    metrics = run("--label_fraction", 0.01, 0.5, "--epochs", 1)
    assert [record["training_samples"] for record in metrics["runs"]] == [2, 4]
    assert [record["validation_samples"] for record in metrics["runs"]] == [2, 2]
    assert (tmp_path / "runs/a/label_0.01/last.pth").exists() and (tmp_path / "runs/a/label_0.5/last.pth").exists()
    again = run("--label_fraction", 0.01, 0.5, 1, "--epochs", 1, "--resume")
    assert again["runs"][:2] == metrics["runs"] and again["runs"][2]["training_samples"] == 8


def test_a_linear_probe_trains_resumes_and_loads_everywhere(run, evaluate, tmp_path):
    encoder = pretrained(tmp_path / "pre.pth")
    few = ["--batch_size", 4, "--lr", 0.1]
    probe = ["--pretrain_path", tmp_path / "pre.pth", "--freeze_encoder", "--head", "linear", "--epochs", 2]
    record = run(*probe, small=few)["runs"][0]
    folder = tmp_path / "runs" / "a"
    saved = torch.load(folder / "last.pth", weights_only=True)
    assert all(torch.equal(value, saved["point_encoder"][key]) for key, value in encoder.state_dict().items())
    # Pooled features, one-hot category, features per point.
    assert saved["head"]["linear.weight"].shape == (5, 16 + 2 + encoder.local_dim, 1)
    assert {key.split(".")[0] for key in saved["head"]} == {"linear", "norm_pooled", "norm_local"}
    flags = json.loads((folder / "config.json").read_text())["arguments"]
    assert flags["freeze_encoder"] is True and flags["head"] == "linear"
    assert evaluate(folder / "last.pth")["runs"][0]["test"] == record["last"]["test"]
    assert run(*probe, "--resume", small=few)["runs"][0]["last"] == record["last"]
    np.save(tmp_path / "shape.npy", np.random.default_rng(0).normal(size=(64, 3)))
    report = predict(folder / "last.pth", [tmp_path / "shape.npy"], num_points=64, device="cpu")
    assert report.predictions[0].labels.shape == (64,)
    with pytest.raises(CheckpointError, match="--head linear there, published here"):
        run(*probe, "--head", "published", "--resume", small=few)
    # Checkpoints of earlier versions have no norms in front of the layer.
    saved["head"] = {key: value for key, value in saved["head"].items() if key.startswith("linear.")}
    torch.save(saved, tmp_path / "earlier.pth")
    evaluate(tmp_path / "earlier.pth")


def test_few_labels_of_points_train_and_select_the_best(run, data_root, tmp_path):
    metrics = run("--point_label_fraction", 0.1, "--label_fraction", 0.5, "--lr", 0.01)
    (record,) = metrics["runs"]
    assert (record["training_samples"], record["label_fraction"], record["point_label_fraction"]) == (4, 0.5, 0.1)
    # Only these 6 labels of a shape are known, in the validation too.
    parts = script.Parts(ShapeNetPart(data_root, "val"))
    rows = script.limited(parts, np.arange(4), 0.5, 1)
    model, _ = fine_tuned_from_checkpoint(tmp_path / "runs/a/last.pth", PartSegmentation)
    predicted = script.predict_parts(model, parts, device=torch.device("cpu"), batch_size=4, chosen=rows)
    right = [
        predicted[row][n] == parts.shapes.parts[i][n]
        for row, i in enumerate(rows)
        for n in np.flatnonzero(finetuning.labeled_points(parts.shapes.parts[i], 0.1, seed=1, index=int(i)))
    ]
    assert len(right) == 12 and record["last"]["val_accuracy"] == pytest.approx(100 * np.mean(right))
    with pytest.raises(UserError, match="--point_label_fraction 0: expected more than 0"):
        run("--point_label_fraction", 0, "--overwrite")


def test_class_choice_trains_a_model_of_its_parts_alone(run, evaluate, tmp_path):
    record = run("--class_choice", "cone")["runs"][0]
    assert record["training_samples"] == 4
    assert list(record["last"]["test"]["category_miou"]) == ["cone"]
    path = tmp_path / "runs/a/last.pth"
    assert torch.load(path, weights_only=True)["head"]["conv11.weight"].shape[0] == 3
    assert evaluate(path)["runs"][0]["test"] == record["last"]["test"]
    with pytest.raises(CheckpointError, match="is a model of the category cone, not of brick"):
        evaluate(path, "--class_choice", "brick")


def test_a_model_whose_checkpoint_says_no_category_is_scored_too(evaluate, tmp_path):
    model = save_parts(tmp_path / "m.pth")
    save_model(tmp_path / "bare.pth", model)
    whole, bare = (evaluate(tmp_path / name)["runs"][0]["test"] for name in ("m.pth", "bare.pth"))
    assert bare == whole


def test_class_test_scores_some_categories_of_a_model_of_all(evaluate, tmp_path):
    save_parts(tmp_path / "m.pth")
    everything = evaluate(tmp_path / "m.pth")["runs"][0]["test"]
    cones = evaluate(tmp_path / "m.pth", "--class_test", "cone")["runs"][0]["test"]
    assert cones["category_shapes"] == {"cone": 3}
    assert cones["instance_miou"] == pytest.approx(everything["category_miou"]["cone"])
    with pytest.raises(
        CheckpointError, match="model of all categories; --class_choice cone needs one trained on it alone"
    ):
        evaluate(tmp_path / "m.pth", "--class_choice", "cone")


def assert_saved(evaluate, tmp_path, predicted, *flags):
    """Check what the command predicts with the model m.pth."""
    evaluate(tmp_path / "m.pth", *flags, "--save_predictions", tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5") as file:
        np.testing.assert_array_equal(file["predicted"][:], predicted)


def test_within_category_never_predicts_a_foreign_part(evaluate, data_root, tmp_path):
    model = save_parts(tmp_path / "m.pth").eval()
    parts = script.Parts(ShapeNetPart(data_root, "test"))
    taxonomy = parts.shapes.taxonomy
    settings = {"device": torch.device("cpu"), "batch_size": 4}
    free = script.predict_parts(model, parts, **settings)
    bound = script.predict_parts(model, parts, within_category=True, **settings)
    own = [set(taxonomy.parts_of(category)) for category in parts.shapes.categories]
    assert all(set(np.unique(row)) <= allowed for row, allowed in zip(bound, own, strict=True))
    inside = np.array([[p in allowed for p in row] for row, allowed in zip(free, own, strict=True)])
    assert not inside.all() and (bound == free)[inside].all()
    assert_saved(evaluate, tmp_path, bound, "--within_category")


def test_votes_average_the_shape_and_its_scaled_copies(evaluate, data_root, tmp_path):
    model = save_parts(tmp_path / "m.pth").eval()
    parts = script.Parts(ShapeNetPart(data_root, "test"))
    settings = {"device": torch.device("cpu"), "batch_size": 4}
    once, votes = (script.predict_parts(model, parts, votes=v, **settings) for v in (1, 4))
    assert once.shape == votes.shape == (6, 64) and (once != votes).any()
    assert (votes == script.predict_parts(model, parts, votes=4, device=torch.device("cpu"), batch_size=3)).all()
    assert (once[:2] == script.predict_parts(model, parts, chosen=np.array([0, 1]), **settings)).all()
    assert_saved(evaluate, tmp_path, votes, "--votes", 4)


def test_a_published_state_dict_is_scored(evaluate, tmp_path):
    save_parts(tmp_path / "published.pth", published=True)
    assert 0 <= evaluate(tmp_path / "published.pth")["runs"][0]["test"]["instance_miou"] <= 100


def test_pointnet_trains(run):
    few = ["--batch_size", 4, "--epochs", 1, "--emb_dims", 16]
    record = run("--model", "pointnet_seg", small=few)["runs"][0]
    assert 0 <= record["last"]["test"]["instance_miou"] <= 100


def test_nineteen_categories_of_ninety_four_parts_need_no_change_of_code(run, tmp_path):
    counts = {f"thing{i}": 4 if i else 22 for i in range(19)}
    assert sum(counts.values()) == 94
    write_parts(tmp_path / "data", counts, shapes={"train": 19, "val": 19, "test": 19})
    record = run("--epochs", 1, root=tmp_path / "data")["runs"][0]
    assert len(record["last"]["test"]["category_miou"]) == 19
    state = torch.load(tmp_path / "runs/a/last.pth", weights_only=True)["head"]
    assert state["conv7.0.weight"].shape[1] == 19 and len(state["conv11.weight"]) == 94


def test_bad_input_is_named_and_nothing_is_lost(run, evaluate, tmp_path):
    save_parts(tmp_path / "other.pth", categories=3, parts=7)
    with pytest.raises(
        CheckpointError, match=r"other\.pth knows 7 parts of 3 categories, the data set in .* has 5 .* 2"
    ):
        evaluate(tmp_path / "other.pth")
    semantic = SemanticSegmentation(build_encoder("dgcnn_semseg", k=4, emb_dims=16), num_classes=13)
    save_model(tmp_path / "rooms.pth", semantic)
    with pytest.raises(CheckpointError, match="holds a model for semantic segmentation; expected a model for part"):
        evaluate(tmp_path / "rooms.pth")
    pretraining = {"kind": "crossnet-pretraining", "encoder": {}, "point_encoder": {}}
    save_checkpoint(tmp_path / "pre.pth", pretraining)
    with pytest.raises(CheckpointError, match=r"an encoder without a head \(--pretrain_path takes that\)"):
        evaluate(tmp_path / "pre.pth")
    with pytest.raises(UserError, match="unknown category 'boat'; the categories are: brick, cone"):
        run("--class_choice", "boat")
    with pytest.raises(UserError, match="--class_choice is empty"):
        run("--class_choice", "")
    with pytest.raises(UserError, match="k = 80 neighbors in clouds of 64 points"):
        run("--k", 80)
    with pytest.raises(UserError, match="--eval needs --model_path"):
        run("--eval")
    with pytest.raises(UserError, match="--label_fraction 1.5"):
        run("--label_fraction", 1.5)
    assert not (tmp_path / "runs").exists()
    table = write_parts(tmp_path / "data") / "overallid_to_catid_partid.json"
    table.write_text('[["00000000", 1], ["00000001", 1]]')
    with pytest.raises(DataError, match="'pid' must be in 0..1"):
        run(root=tmp_path / "data")


def test_another_number_of_points_than_in_training_is_told_and_predictions_use_that_of_training(
    run, evaluate, tmp_path, caplog
):
    run("--epochs", 1, "--num_points", 32)
    path = tmp_path / "runs" / "a" / "last.pth"
    warning = "was trained on samples of 32 points; these have 64 (--num_points)"
    evaluate(path, "--num_points", 32)
    assert warning not in caplog.text
    evaluate(path)
    assert warning in caplog.text
    assert Predictor(path, PredictorSettings(device="cpu")).size == 32
    assert Predictor(path, PredictorSettings(device="cpu", num_points=48)).size == 48
    content = load_checkpoint(path)
    assert finetuning.trained_points(content) == 32 == finetuning.trained_points({"arguments": content["arguments"]})


def test_without_validation_files_some_training_shapes_choose_the_best(run, tmp_path):
    folder = write_parts(tmp_path / "data")
    (folder / "ply_data_val0.h5").unlink()
    (folder / "val_hdf5_file_list.txt").unlink()
    record = run("--epochs", 1, root=tmp_path / "data")["runs"][0]
    assert (record["training_samples"], record["validation_samples"], record["selected_on"]) == (7, 1, "val")


def test_the_released_habit_of_choosing_on_the_test_split_is_named(run, capsys):
    record = run("--select_on", "test", "--epochs", 1)["runs"][0]
    assert (record["selected_on"], record["training_samples"]) == ("test", 12)
    assert "best on test" in capsys.readouterr().out


def test_saved_predictions_give_the_score_again_by_a_literal_loop(run, evaluate, tmp_path):
    save_parts(tmp_path / "m.pth")
    scores = evaluate(tmp_path / "m.pth", "--save_predictions", tmp_path / "p.h5")["runs"][0]["test"]
    with h5py.File(tmp_path / "p.h5") as file:
        ious = []
        for truth, predicted, category in zip(file["truth"], file["predicted"], file["category"], strict=True):
            first, count = file["part_starts"][category], file["part_counts"][category]
            parts = []
            for part in range(first, first + count):
                both = sum(t == part and p == part for t, p in zip(truth, predicted, strict=True))
                either = sum(t == part or p == part for t, p in zip(truth, predicted, strict=True))
                parts.append(both / either if either else 1.0)
            ious.append(sum(parts) / len(parts))
        assert file["category_names"].asstr()[:].tolist() == ["brick", "cone"]
    assert len(ious) == 6 and 100 * sum(ious) / 6 == pytest.approx(scores["instance_miou"], abs=1e-6)
    with pytest.raises(UserError, match="p.h5 exists"):
        evaluate(tmp_path / "m.pth", "--save_predictions", tmp_path / "p.h5")
    with pytest.raises(UserError, match="--eval"):
        run("--save_predictions", tmp_path / "q.h5")
