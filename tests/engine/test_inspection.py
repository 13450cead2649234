"""What the command says of files: ours, fine-tuned, of other origins, and of those that fit nothing."""

import json

import pytest
import torch
from torchvision.models import resnet18

from engine.checkpoint.__main__ import main
from engine.inspection import _content
from models import pretrained
from models.task_heads import PartSegmentation
from tests.support.checkpoints import save_model
from tests.support.weights import TINY, publish_tiny, save_pretraining, tiny_encoder
from utils.errors import CheckpointError


def inspect(path, capsys, *more):
    found = main(["inspect", str(path), *more])
    return found, capsys.readouterr().out


def test_a_checkpoint_of_pretraining(tmp_path, capsys):
    path = save_pretraining(tmp_path / "last.pth", tiny_encoder("dgcnn_cls"))
    found, text = inspect(path, capsys, "--json", str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert found["settings"]["seed"] == 5 and (found["epoch"], found["step"]) == (3, 120)
    assert (found["encoder"], found["kwargs"], found["misfits"]) == ("dgcnn_cls", TINY["dgcnn_cls"], {})
    assert "checkpoint of this project, format 1: crossnet-pretraining" in text
    assert "encoder: dgcnn_cls (k 4, emb_dims 16): all 30 tensors fit" in text
    assert "git_commit: abc" in text and "settings: seed 5, batch_size 8" in text
    assert "use: --pretrain_path or --model_path\n" in text and "point_encoder: 30 tensors" in text


def test_long_and_empty_entries_are_shown_as_such():
    assert _content({}) == "empty"
    assert _content({"a": 1, "b": 2}) == "2 entries: a, b"
    assert _content(dict.fromkeys("abcdefgh", 1)) == "8 entries: a, b, c, d, e, ..."


def test_a_fine_tuned_model_has_a_head(tmp_path, capsys):
    model = PartSegmentation(tiny_encoder("dgcnn_partseg"), num_categories=2, num_parts=5)
    found, text = inspect(save_model(tmp_path / "best.pth", model), capsys)
    assert found["head"] == {"num_categories": 2, "num_parts": 5}
    assert f"format 1: {PartSegmentation.kind}" in text and "--eval" in text


def test_weights_of_another_origin_name_their_place_and_their_encoder(tmp_path, capsys):
    model = PartSegmentation(tiny_encoder("dgcnn_partseg"), num_categories=2, num_parts=5)
    state = {f"module.{key}": value for key, value in model.published_state_dict().items()}
    torch.save({"epoch": 7, "net": state}, tmp_path / "released.t7")
    found, text = inspect(tmp_path / "released.t7", capsys)
    assert (found["encoder"], found["kwargs"], found["misfits"]) == ("dgcnn_partseg", {"emb_dims": 16}, {})
    assert found["left_out"] == len(state) - len(model.encoder.state_dict())
    assert "tensors of the entry 'net', below 'module.'" in text and "epoch: 7" in text


def test_what_does_not_fit_is_named(tmp_path, capsys):
    state = tiny_encoder("pointnet_cls").state_dict()
    del state["conv1.weight"]
    state |= {"extra": torch.zeros(2), "conv2.weight": torch.zeros(3, 3, 1)}
    torch.save(state, tmp_path / "own.pth")
    found, text = inspect(tmp_path / "own.pth", capsys)
    assert found["misfits"] == {
        "missing": ["conv1.weight"],
        "unknown": ["extra"],
        "of another shape": ["conv2.weight is (3, 3, 1), not (64, 64, 1)"],
    }
    assert "none fits exactly; the nearest is pointnet_cls (emb_dims 16), 28 tensors fit" in text
    assert "1 missing: conv1.weight" in text and "1 unknown: extra" in text
    torch.save({"weights": resnet18().fc.state_dict(), "acc": 0.5}, tmp_path / "resnet.pth")
    found, text = inspect(tmp_path / "resnet.pth", capsys)
    assert "encoder" not in found and "encoder: none; no tensor has the name and shape of one of dgcnn_cls" in text


def test_weights_by_name_and_programs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    publish_tiny(tmp_path, ["pointnet_cls"])
    found, text = inspect("pretrained:pointnet_cls", capsys)
    assert found["kind"] == "point-encoder" and found["step"] == 120 and "all 30 tensors fit" in text
    (tmp_path / "a.onnx").touch()
    with pytest.raises(CheckpointError, match=r"a.onnx is an exported program, .*onnxruntime.InferenceSession"):
        main(["inspect", str(tmp_path / "a.onnx")])
