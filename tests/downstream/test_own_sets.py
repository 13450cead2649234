"""Own labeled clouds, and ModelNet in the layouts that people have, go through every script that scores clouds."""

import json

import numpy as np
import pytest

from downstream.classification import few_shot, finetune, tsne
from downstream.classification import main as svm
from downstream.probe import LinearProbe
from tests.support.files import write_h5
from tests.support.shape_files import STRETCH, write_class_folders, write_point_cloud_datasets, write_resampled
from utils.errors import DataError

SMALL = ["--k", "3", "--emb_dims", "8", "--num_points", "32", "--device", "cpu"]
RANDOM = [*SMALL, "--random_init", "--calibrate_bn"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mine")
    write_class_folders(root)
    return root


def run(script, root, *arguments, dataset="folder"):
    return script.main(["--dataset", dataset, "--data_root", str(root), *map(str, arguments)])


def origin(metrics, split="test"):
    return metrics["data"][split]


def test_linear_svm_and_retrieval(root, tmp_path, capsys):
    pictures = ("--retrieval_sheet", tmp_path / "r.png", "--confusion_matrix", tmp_path / "c.png")
    metrics = run(svm, root, *RANDOM, "--shots", 1, "--shot_draws", 2, "--json", tmp_path / "m.json", *pictures)
    assert (metrics["classes"], metrics["train_clouds"], metrics["test_clouds"]) == (5, 30, 15)
    assert metrics["test_accuracy_mean"] > 40 and metrics["retrieval_map"] > 30  # 20 by chance
    assert origin(json.loads((tmp_path / "m.json").read_text()))["folder"] == str(root)
    assert origin(metrics)["layout"] == "<split>/<class>/<file>"
    repeated = origin(metrics, "train")["clouds_with_repeated_points"]
    assert f"note: {repeated} train clouds have fewer than 32 points" in capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size for name in ("r.png", "c.png"))


def test_few_shot(root):
    metrics = run(few_shot, root, *RANDOM, "--ways", 3, "--shots", 2, "--queries", 2, "--runs", 3)
    assert origin(metrics)["clouds"] == 15


def test_fine_tuning(root, tmp_path, small_runs):
    place = ("--output_dir", tmp_path, "--exp_name", "a", "--workers", 0)
    metrics = run(finetune, root, *SMALL, *place, "--epochs", 1, "--batch_size", 6)
    assert origin(metrics, "train")["clouds"] == 30
    again = run(finetune, root, "--num_points", 32, "--eval", "--model_path", tmp_path / "a" / "last.pth", *place)
    assert set(again["runs"][0]["test"]["class_accuracy"]) == set(STRETCH)


def test_tsne(root, tmp_path):
    metrics = run(tsne, root, *RANDOM, "--output", tmp_path / "map.png")
    assert metrics["clouds"] == 15 and metrics["data"]["folder"] == str(root)


def test_the_probe_of_a_pretraining_run(root):
    probe = LinearProbe("folder", root, num_points=32)
    assert (len(probe.train), len(probe.test)) == (30, 15)


@pytest.mark.parametrize("write", [write_point_cloud_datasets, write_resampled])
def test_the_layout_of_modelnet_is_named_in_the_result(tmp_path, write):
    folder = write(tmp_path)
    metrics = run(
        svm, tmp_path, *SMALL, "--num_points", 20, "--random_init", "--shots", "--svm_c", 1, dataset="modelnet40"
    )
    assert origin(metrics, "train") == {"layout": metrics["data"]["test"]["layout"], "folder": str(folder), "clouds": 8}
    assert ("PointCloudDatasets" in origin(metrics)["layout"]) == (write is write_point_cloud_datasets)


@pytest.mark.parametrize(("train", "test"), [([0, 1, 2, 3], [0, 1, 2]), ([0, 1, 2], [0, 1, 2, 3])])
def test_classes_without_names_that_one_split_lacks(tmp_path, monkeypatch, capsys, small_runs, train, test):
    for split, classes in (("train", train), ("test", test)):
        labels = np.repeat(classes, 4)
        data = np.random.default_rng(0).normal(size=(len(labels), 32, 3)) * (1 + labels[:, None, None])
        write_h5(tmp_path / f"{split}.h5", data=data.astype("f4"), label=labels)
    drawn = []
    monkeypatch.setattr(svm, "draw_confusion_matrix", lambda *arguments, **_: drawn.append(arguments))
    metrics = run(svm, tmp_path, *RANDOM, "--confusion_matrix", tmp_path / "c.png")
    assert drawn[0][2] == tuple(f"class {i}" for i in range(4)) and metrics["test_clouds"] == 4 * len(test)
    note = "4 test clouds count as errors of the SVM, because no training cloud has their class: class 3"
    assert (note in capsys.readouterr().out) == (len(test) == 4)
    arguments = (*SMALL, "--output_dir", tmp_path, "--workers", 0, "--epochs", 1, "--batch_size", 6)
    if len(test) == 4:
        with pytest.raises(DataError, match="the test split has classes without training clouds: class 3"):
            run(finetune, tmp_path, *arguments)
    else:
        result = run(finetune, tmp_path, *arguments)["runs"][0]["last"]["test"]
        assert list(result["class_accuracy"]) == [f"class {i}" for i in range(4)]


def test_another_name_says_what_is_there(root):
    with pytest.raises(DataError, match=r"no ModelNet40 .*\(found there: --dataset folder\)"):
        run(svm, root, *RANDOM, dataset="modelnet40")
