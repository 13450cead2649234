"""Published weights: their files, index and cards; how they load; every script takes them by name."""

import json
import logging
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import train_crossnet_con
from benchmarks import publish_weights
from downstream import predict
from downstream.classification import few_shot, finetune, tsne
from downstream.classification import main as linear_svm
from downstream.segmentation import main_partseg, main_semseg, visualize
from engine.load_model import crossnet_from_checkpoint, encoder_from_checkpoint
from models import build_encoder, pretrained
from tests.support.files import contents
from tests.support.paths import ROOT
from tests.support.small_run import arguments
from tests.support.weights import TINY, publish_tiny, save_pretraining, tiny_encoder
from utils.errors import CheckpointError, UserError
from utils.files import sha256

NAMES = list(TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of tiny weights of every encoder."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "WEIGHTS", folder)
        publish_tiny(folder, NAMES)
    return folder


@pytest.fixture
def weights(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    return folder


@pytest.fixture
def own_weights(folder, tmp_path, monkeypatch):
    """Return a copy that a test may change."""
    shutil.copytree(folder, tmp_path / "weights")
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def check_published(folder):
    """Every entry of an index has its file, of that checksum and encoder, and a card that names the checksum."""
    index = json.loads((folder / "index.json").read_text())
    for name, entry in index.items():
        assert sha256(folder / entry["file"]) == entry["sha256"]
        assert (folder / entry["file"]).stat().st_size == entry["bytes"]
        page = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert page == publish_weights.card(name, entry, page[page.index(publish_weights.KEPT) :])
        assert entry["sha256"] in page
        assert models.load(name).config() == entry["encoder"]["kwargs"]
    assert {path.stem for path in folder.glob("*.safetensors")} == set(index)
    return index


def test_weights_of_the_repository_are_those_of_its_index():
    check_published(pretrained.WEIGHTS)


def test_publishing_writes_the_file_its_entry_and_a_card(weights):
    index = check_published(weights)
    assert list(index) == NAMES
    entry = index["dgcnn_cls"]
    assert {key: entry[key] for key in ("data", "command", "commit", "steps", "seed", "dtype")} == {
        **{"data": "nothing", "command": "none", "commit": "abc", "steps": 120, "seed": 5, "dtype": "float16"}
    }
    assert float(entry["rounding"]) < 0.05
    assert f"float16; that changes features by {entry['rounding']} of" in (weights / "dgcnn_cls.md").read_text()
    for file in weights.glob("dgcnn_cls.*"):
        assert b"/private" not in file.read_bytes()


def test_publishing_again_keeps_the_limits_and_gives_the_same_bytes(own_weights):
    page = own_weights / "dgcnn_cls.md"
    page.write_text(page.read_text().replace("Not written yet.", "Chairs only."))
    before = (own_weights / "dgcnn_cls.safetensors").read_bytes()
    command = [str(save_pretraining(own_weights / "a.pth", tiny_encoder("dgcnn_cls"))), "--data", "d", "--command", "c"]
    with pytest.raises(UserError, match="there are weights 'dgcnn_cls'; replace them with --overwrite"):
        publish_weights.main(command)
    publish_weights.main([*command, "--overwrite", "--full"])
    assert "| stored in | float32, unchanged |" in page.read_text() and "float16" not in page.read_text()
    publish_weights.main([*command, "--overwrite", "--score", "ModelNet10=93.5 ± 0.3"])
    assert (own_weights / "dgcnn_cls.safetensors").read_bytes() == before
    assert "| ModelNet10 | 93.5 ± 0.3 |" in page.read_text() and "Chairs only." in page.read_text()
    assert list(json.loads((own_weights / "index.json").read_text())) == NAMES


def test_weights_may_have_a_name_of_their_own(own_weights):
    words = [str(save_pretraining(own_weights / "a.pth", tiny_encoder("dgcnn_cls"))), "--data", "d", "--command", "c"]
    publish_weights.main([*words, "--name", "mine-2.0", "--hours", "1.5", "--license", "CC0", "--steps", "7"])
    index = check_published(own_weights)
    entry, page = index["mine-2.0"], (own_weights / "mine-2.0.md").read_text()
    assert list(index) == [*NAMES, "mine-2.0"]
    assert (entry["hours"], entry["license"], entry["steps"]) == (1.5, "CC0", 7)
    assert "| hours | 1.5 |" in page and "| license | CC0 |" in page and "| steps | 7 |" in page
    assert encoder_from_checkpoint("pretrained:mine-2.0").config() == TINY["dgcnn_cls"]
    before = contents(own_weights.parent)
    for name in ("../up", "a/b", "", ".."):
        with pytest.raises(UserError, match=f"--name {name}: files are called this"):
            publish_weights.main([*words, "--name", name])
    assert contents(own_weights.parent) == before


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_loads_by_its_name_in_eval_mode(name, weights):
    expected, found = tiny_encoder(name).eval(), models.load(name)
    assert not found.training and found.config() == TINY[name]
    states = expected.state_dict(), found.state_dict()
    assert {tensor.dtype for tensor in states[1].values()} == {torch.float32, torch.int64}
    for key, tensor in states[0].items():
        rounded = tensor.half().to(tensor.dtype) if tensor.ndim > 1 else tensor
        assert torch.equal(states[1][key], rounded)
    hub = torch.hub.load(str(ROOT), name, source="local")
    x = torch.randn(2, 3, 20)
    assert torch.equal(hub(x).pooled, found(x).pooled)


def test_the_hub_builds_encoders_with_random_weights_too(weights):
    encoder = torch.hub.load(str(ROOT), "dgcnn_cls", source="local", pretrained=False, k=3, emb_dims=8)
    assert encoder.training and encoder.config() == {"k": 3, "emb_dims": 8}
    with pytest.raises(ValueError, match="dgcnn_cls: the weights fix k; give pretrained=False"):
        torch.hub.load(str(ROOT), "dgcnn_cls", source="local", k=3)


@pytest.mark.parametrize("name", ["models", "utils"])
def test_the_hub_names_a_module_of_another_project_that_is_in_the_way(name, monkeypatch):
    other = types.ModuleType(name)
    other.__file__ = f"/elsewhere/{name}.py"
    monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(ImportError, match=f"{name!r} is imported already .*/elsewhere/{name}.py.*: load this encoder"):
        torch.hub.load(str(ROOT), "dgcnn_cls", source="local")


def test_an_alias_of_the_released_scripts_loads_too(weights):
    assert models.load("dgcnn_seg").config() == TINY["dgcnn_partseg"]


def test_weights_that_cannot_be_had_are_told(own_weights):
    with pytest.raises(
        CheckpointError, match=r"no pretrained weights 'dgcnn': .*index.json names dgcnn_cls, dgcnn_par"
    ):
        models.load("dgcnn")
    with open(own_weights / "dgcnn_cls.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"is not the file that was published \(SHA-256 .*git checkout -- "):
        models.load("dgcnn_cls")
    (own_weights / "pointnet_cls.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pointnet_cls.safetensors is missing; .*git checkout -- "):
        models.load("pointnet_cls")
    for damaged in ("[]", '{"dgcnn_cls": 1}', '{"dgcnn_cls": {"file": "dgcnn_cls.safetensors"}}'):
        (own_weights / "index.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index.json is not an index of weights; .*git checkout -- weights"):
            models.load("dgcnn_cls")
    (own_weights / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*index.json .*git checkout -- weights"):
        models.load("dgcnn_cls")


def test_a_safetensors_file_is_a_checkpoint_whatever_its_origin(weights, tmp_path, caplog):
    from safetensors.torch import save_file

    encoder = tiny_encoder("dgcnn_cls")
    save_file({f"module.{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "other.safetensors")
    with caplog.at_level(logging.INFO, "crossnet"):
        found = encoder_from_checkpoint(tmp_path / "other.safetensors", k=4)
    assert found.config() == TINY["dgcnn_cls"] and torch.equal(found.conv1[0].weight, encoder.conv1[0].weight)
    assert "by its tensors it is a dgcnn_cls" in caplog.text
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut.safetensors is damaged or not a safetensors file"):
        encoder_from_checkpoint(tmp_path / "cut.safetensors")


@pytest.mark.usefixtures("small_runs")
def test_pretraining_starts_from_the_weights_of_its_model(weights, data_root, tmp_path):
    settings = ["--epochs", 1, "--eval_every", 0, "--lr", 1e-9, "--model", "pointnet_seg", "--emb_dims", 8]
    train_crossnet_con.main(arguments(data_root, tmp_path, "--exp_name", "a", "--model_path", "pretrained", *settings))
    found = encoder_from_checkpoint(tmp_path / "a" / "last.pth")
    torch.testing.assert_close(found.conv3.weight, models.load("pointnet_partseg").conv3.weight, rtol=0, atol=1e-6)


def test_frozen_features_of_weights_by_name_and_of_their_file(weights, data_root):
    file = str(weights / "dgcnn_cls.safetensors")
    common = f"--dataset demo --data_root {data_root} --num_points 24 --device cpu --model_path".split()
    runs = linear_svm.main([*common, "pretrained", "pretrained:pointnet_cls", file, "--shots", "1"])["runs"]
    assert [record["encoder"] for record in runs] == ["dgcnn_cls", "pointnet_cls", "dgcnn_cls"]
    assert [record["model_path"] for record in runs] == ["pretrained", "pretrained:pointnet_cls", file]
    assert runs[0]["sha256"] == runs[2]["sha256"] == sha256(file)
    assert runs[0]["test_accuracy"] == runs[2]["test_accuracy"]
    few = few_shot.main([*common, "pretrained", "--ways", "2", "--shots", "1", "--queries", "2", "--runs", "2"])
    assert few["encoders"][0]["sha256"] == sha256(file)


def test_the_map_of_weights(weights, data_root, tmp_path):
    common = f"--dataset demo --data_root {data_root} --num_points 24 --device cpu".split()
    tsne.main([*common, "--model_path", "pretrained:dgcnn_seg", "--output", str(tmp_path / "map.png")])
    with np.load(tmp_path / "map.npz") as numbers:
        assert numbers["features"].shape[1] == 16


@pytest.mark.parametrize(
    ("script", "name", "more"),
    [
        (finetune, "dgcnn_cls", ["--dataset", "demo", "--num_points", "24"]),
        (main_partseg, "dgcnn_partseg", []),
        (main_semseg, "dgcnn_semseg", ["--test_area", "5", "--train_area", "6"]),
    ],
)
@pytest.mark.usefixtures("small_runs", "weights")
def test_fine_tuning_starts_from_the_weights_that_its_task_takes(script, name, more, data_root, tmp_path):
    common = f"--data_root {data_root} --output_dir {tmp_path} --exp_name a --device cpu --workers 0".split()
    small = ["--batch_size", "4", "--epochs", "1", "--eval_every", "0", "--freeze_encoder"]
    script.main([*common, *small, "--pretrain_path", "pretrained", *more])
    found = encoder_from_checkpoint(tmp_path / "a" / "last.pth").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in models.load(name).state_dict().items())
    with pytest.raises(CheckpointError, match=r"holds an encoder without a head \(--pretrain_path takes that\)"):
        script.main([*common, "--eval", "--model_path", "pretrained", *more])


def test_features_of_files_by_weights(weights, tmp_path):
    np.savetxt(tmp_path / "a.xyz", np.random.default_rng(0).normal(size=(50, 3)))
    out = ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--num_points", "32"]
    summary = predict.main(["--model_path", "pretrained", *out, str(tmp_path / "a.xyz")])
    assert summary["task"] == "features" and len(summary["predicted"]) == 1
    with pytest.raises(CheckpointError, match="pretrained:dgcnn_partseg is not .*a model of parts or rooms"):
        visualize.main(["--model_path", "pretrained:dgcnn_partseg", "--output_dir", str(tmp_path / "pictures")])
    with pytest.raises(CheckpointError, match="dgcnn_cls.safetensors contains no projection heads and image encoders"):
        crossnet_from_checkpoint("pretrained")


def test_a_file_that_is_called_pretrained_still_is_a_file(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretraining(Path("pretrained"), build_encoder("pointnet_cls", emb_dims=4))
    assert encoder_from_checkpoint("pretrained").emb_dims == 4
    with pytest.raises(CheckpointError, match="holds a pointnet_cls, not the dgcnn_cls"):
        encoder_from_checkpoint("pretrained:pointnet_cls", model="dgcnn_cls")


def write_record(folder, seed, *, score, **about):
    """Write a record of a row that scores clouds."""
    folder = folder / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"test_accuracy_mean": score, "shots": {"1": [52.4, 6.9]}}))
    (folder / "row.json").write_text(json.dumps({"seed": seed, "flags": {}, "commands": [], **about}))


def test_commands_and_scores_come_from_the_record_of_a_row(own_weights, tmp_path):
    source = save_pretraining(tmp_path / "a.pth", tiny_encoder("dgcnn_cls"))
    words = [str(source), "--data", "d", "--overwrite", "--results", str(tmp_path / "results")]
    name = "modelnet10-pairs2k-con"
    folder = tmp_path / "results" / name
    before = (own_weights / "dgcnn_cls.safetensors").read_bytes()
    write_record(folder, 5, score=92.07, checkpoint_sha256="0")
    with pytest.raises(UserError, match=f"{name} has no record of these weights"):
        publish_weights.main([*words, "--full", "--row", name])
    assert (own_weights / "dgcnn_cls.safetensors").read_bytes() == before
    commands = ["python make.py", "python train.py", "python score.py"]
    write_record(folder, 5, score=92.07, checkpoint_sha256=sha256(source), commands=commands)
    entry = publish_weights.main([*words, "--row", name])
    assert entry["command"] == "python make.py; python train.py"
    assert entry["scores"] == {f"{name}, all labels": "92.1", f"{name}, 1 label": "52.4"}
    with pytest.raises(UserError, match="--row nothing: the plan has no such row"):
        publish_weights.main([*words, "--row", "nothing"])


def test_rows_that_score_published_weights_give_scores_over_seeds(own_weights, tmp_path):
    source = save_pretraining(tmp_path / "a.pth", tiny_encoder("dgcnn_cls"))
    words = [str(source), "--data", "d", "--overwrite", "--results", str(tmp_path / "results"), "--row", "demo-weights"]
    published = {"pretrained:dgcnn_cls": {"sha256": sha256(own_weights / "dgcnn_cls.safetensors")}}
    for seed, score in ((1, 92.0), (2, 94.0)):
        write_record(tmp_path / "results" / "demo-weights", seed, score=score, flags=published)
    earlier = {"pretrained:dgcnn_cls": {"sha256": "0"}}
    write_record(tmp_path / "results" / "demo-weights", 3, score=10.0, flags=earlier)
    with pytest.raises(UserError, match="give --command, or a --row that has scored the checkpoint"):
        publish_weights.main(words)
    entry = publish_weights.main([*words, "--command", "c"])
    assert entry["command"] == "c" and entry["scores"]["demo-weights, all labels"] == "93.0 ± 1.4"
    assert "| demo-weights, all labels | 93.0 ± 1.4 |" in (own_weights / "dgcnn_cls.md").read_text(encoding="utf-8")
