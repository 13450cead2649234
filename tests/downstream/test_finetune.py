import json

import pytest
import torch

from downstream.classification import finetune as script
from engine.checkpoint import save_checkpoint
from engine.load_model import describe_encoder, describe_fine_tuned, encoder_from_checkpoint
from models import build_encoder
from models.task_heads import Classification
from tests.support.pairs import write_demo_set
from utils.errors import CheckpointError, DataError, UserError

SMALL = ["--k", "4", "--emb_dims", "16", "--batch_size", "6", "--num_points", "32"]

SCORES = {"overall_accuracy": 50.0, "mean_class_accuracy": 50.0, "class_accuracy": {}}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run_folder.RunFolder.draw_curves", lambda folder: None)  # a second per epoch
    write_demo_set(tmp_path / "data")
    return tmp_path / "data"


def run(root, *arguments, small=SMALL):
    common = ["--dataset", "demo", "--data_root", root, "--output_dir", root.parent / "runs", "--exp_name", "a"]
    return script.main([str(a) for a in (*common, "--workers", 0, "--device", "cpu", *small, *arguments)])


def test_training_learns_the_classes_and_its_encoder_can_be_used_again(root, tmp_path, capsys):
    report = tmp_path / "m.json"
    metrics = run(root, "--epochs", 12, "--json", report)
    assert json.loads(report.read_text()) == metrics
    (record,) = metrics["runs"]
    assert (record["training_samples"], record["validation_samples"], record["labels_used"]) == (27, 3, 30)
    # Three validation clouds choose the best epoch nearly at random; of 12 test clouds chance gets 4.
    assert record["last"]["test"]["overall_accuracy"] > 60
    assert "best on val" in capsys.readouterr().out
    path = tmp_path / "runs/a/best.pth"
    again = run(root, "--eval", "--model_path", path, small=["--num_points", 32])
    assert again["runs"][0]["test"] == record["best"]["test"]
    assert encoder_from_checkpoint(path).k == 4
    lines = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] > 0.09  # SGD, a hundred times --lr, as released


def test_limited_labels_keep_a_cloud_of_every_class_and_count_what_is_held_out(root):
    runs = run(root, "--epochs", 1, "--label_fraction", 0.01, 0.5)["runs"]
    assert [(r["training_samples"], r["validation_samples"], r["labels_used"]) for r in runs] == [
        (3, 0, 3),
        (13, 2, 15),
    ]
    assert runs[0]["best"] is None and runs[0]["selected_on"] is None and runs[1]["best"]


def test_pretrained_encoder_and_published_classifier(root, tmp_path):
    encoder = build_encoder("pointnet_cls", emb_dims=16)
    save_checkpoint(tmp_path / "pre.pth", {"encoder": describe_encoder(encoder), "point_encoder": encoder.state_dict()})
    few = ["--batch_size", 6, "--num_points", 32, "--epochs", 1]
    run(root, "--pretrain_path", tmp_path / "pre.pth", small=few)
    assert "encoder pointnet_cls (emb_dims 16)" in (tmp_path / "runs/a/run.log").read_text()
    model = Classification(build_encoder("dgcnn_cls", emb_dims=16), num_classes=3)
    state = model.published_state_dict()
    aliases = {f"bn{i}.weight": state[f"conv{i}.1.weight"] for i in range(1, 6)}
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in {**state, **aliases}.items()}}, tmp_path / "p.pth")
    scores = run(root, "--eval", "--model_path", tmp_path / "p.pth", "--k", 4, small=["--num_points", 32])
    assert 0 <= scores["runs"][0]["test"]["overall_accuracy"] <= 100


def test_a_released_classifier_is_scored_with_the_released_neighbors(root, tmp_path, monkeypatch, caplog):
    model = Classification(build_encoder("dgcnn_cls", emb_dims=16), num_classes=3)
    torch.save({f"module.{key}": value for key, value in model.published_state_dict().items()}, tmp_path / "model.t7")
    scored = []
    monkeypatch.setattr(script, "score", lambda args, model, clouds: scored.append(model.encoder.k) or SCORES)
    run(root, "--eval", "--model_path", tmp_path / "model.t7", small=["--num_points", 32])
    assert scored == [16] and "--k 16 is used" in caplog.text


def test_bad_input_is_named(root, tmp_path):
    model = Classification(build_encoder("dgcnn_cls", k=4, emb_dims=16), num_classes=5)
    save_checkpoint(tmp_path / "m.pth", {**describe_fine_tuned(model), "table": {"class_names": list("abcde")}})
    with pytest.raises(CheckpointError, match=r"knows 5 classes \(a, b, c, d, \.\.\.\), demo has 3 \(ball, plate, rod"):
        run(root, "--eval", "--model_path", tmp_path / "m.pth")
    with pytest.raises(UserError, match="--holdout 1"):
        run(root, "--holdout", 1)
    with pytest.raises(UserError, match="k = 40 neighbors in clouds of 32 points"):
        run(root, "--k", 40)
    with pytest.raises(UserError, match="--batch_size 1"):
        run(root, "--batch_size", 1)
    with pytest.raises(DataError, match="demo"):
        run(tmp_path / "nothing")
    assert not (tmp_path / "runs").exists()
