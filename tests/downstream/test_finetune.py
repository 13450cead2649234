import json

import pytest
import torch

from downstream.classification import finetune as script
from engine.load_model import encoder_from_checkpoint
from models import build_encoder
from models.task_heads import Classification
from tests.support.checkpoints import save_encoder, save_model, save_published
from tests.support.comparing import metrics
from utils.errors import CheckpointError, DataError, UserError

SMALL = ["--dataset", "demo", "--k", 4, "--emb_dims", 16, "--batch_size", 6, "--num_points", 32]
EVAL = ["--dataset", "demo", "--num_points", 32]

SCORES = {"overall_accuracy": 50.0, "mean_class_accuracy": 50.0, "class_accuracy": {}}


def test_training_learns_the_classes_and_its_encoder_can_be_used_again(run, tmp_path, capsys):
    report = tmp_path / "m.json"
    result = run("--epochs", 12, "--json", report)
    assert json.loads(report.read_text()) == result
    (record,) = result["runs"]
    assert (record["training_samples"], record["validation_samples"], record["labels_used"]) == (27, 3, 30)
    # Three validation clouds choose the best epoch nearly at random; of 12 test clouds chance gets 4.
    assert record["last"]["test"]["overall_accuracy"] > 60
    assert "best on val" in capsys.readouterr().out
    path = tmp_path / "runs/a/best.pth"
    again = run("--eval", "--model_path", path, small=EVAL)
    assert again["runs"][0]["test"] == record["best"]["test"]
    assert encoder_from_checkpoint(path).k == 4
    assert metrics(tmp_path / "runs/a")[0]["lr"] > 0.09  # SGD, a hundred times --lr, as released


def test_limited_labels_keep_a_cloud_of_every_class_and_count_what_is_held_out(run):
    runs = run("--epochs", 1, "--label_fraction", 0.01, 0.5)["runs"]
    assert [(r["training_samples"], r["validation_samples"], r["labels_used"]) for r in runs] == [
        (3, 0, 3),
        (13, 2, 15),
    ]
    assert runs[0]["best"] is None and runs[0]["selected_on"] is None and runs[1]["best"]


def test_resuming_with_other_labels_names_the_flag_and_not_the_batch_that_they_limit(run):
    run("--epochs", 1, "--label_fraction", 0.1)
    for flags, message in (
        (("--label_fraction", 0.2), r"\(--label_fraction \[0.1\] there, \[0.2\] here\)"),
        (("--label_fraction", 0.1, "--holdout", 0.5), r"\(--holdout 0.1 there, 0.5 here\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run("--epochs", 1, *flags, "--resume")


def test_pretrained_encoder_and_published_classifier(run, tmp_path):
    save_encoder(tmp_path / "pre.pth", build_encoder("pointnet_cls", emb_dims=16))
    few = [*EVAL, "--batch_size", 6, "--epochs", 1]
    run("--pretrain_path", tmp_path / "pre.pth", small=few)
    assert "encoder pointnet_cls (emb_dims 16)" in (tmp_path / "runs/a/run.log").read_text()
    model = Classification(build_encoder("dgcnn_cls", emb_dims=16), num_classes=3)
    state = model.published_state_dict()
    aliases = {f"bn{i}.weight": state[f"conv{i}.1.weight"] for i in range(1, 6)}
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in {**state, **aliases}.items()}}, tmp_path / "p.pth")
    scores = run("--eval", "--model_path", tmp_path / "p.pth", "--k", 4, small=EVAL)
    assert 0 <= scores["runs"][0]["test"]["overall_accuracy"] <= 100


def test_a_released_classifier_is_scored_with_the_released_neighbors(run, tmp_path, monkeypatch, caplog):
    model = Classification(build_encoder("dgcnn_cls", emb_dims=16), num_classes=3)
    save_published(tmp_path / "model.t7", model)
    scored = []
    monkeypatch.setattr(script, "score", lambda args, model, clouds: scored.append(model.encoder.k) or SCORES)
    run("--eval", "--model_path", tmp_path / "model.t7", small=EVAL)
    assert scored == [16] and "--k 16 is used" in caplog.text


def test_bad_input_is_named(run, tmp_path):
    model = Classification(build_encoder("dgcnn_cls", k=4, emb_dims=16), num_classes=5)
    save_model(tmp_path / "m.pth", model, table={"class_names": list("abcde")})
    with pytest.raises(CheckpointError, match=r"knows 5 classes \(a, b, c, d, \.\.\.\), demo has 3 \(ball, plate, rod"):
        run("--eval", "--model_path", tmp_path / "m.pth")
    with pytest.raises(UserError, match="k = 40 neighbors in clouds of 32 points"):
        run("--k", 40)
    with pytest.raises(UserError, match="--batch_size 1"):
        run("--batch_size", 1)
    with pytest.raises(DataError, match="demo"):
        run(root=tmp_path / "nothing")
    assert not (tmp_path / "runs").exists()
