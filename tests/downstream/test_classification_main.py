import json

import numpy as np
import pytest
from PIL import Image

from downstream.classification import main as script
from downstream.figures import draw_confusion_matrix
from models import build_encoder
from tests.support.checkpoints import save_encoder
from tests.support.commands import command
from tests.support.files import cut, write_h5
from utils.errors import CheckpointError, DataError, UserError
from utils.files import sha256

LABELS = {"train": [2] * 9 + [8] * 8 + [33] * 7, "test": [33] * 4 + [2] * 5 + [8] * 4}
SMALL = ["--random_init", "--emb_dims", "8", "--k", "3", "--num_points", "16", "--device", "cpu", "--batch_size", "8"]


def shapes(labels, seed, size=20):
    """Clouds that differ by class: balls, plates and rods."""
    rng = np.random.default_rng(seed)
    stretch = {2: (1, 1, 1), 8: (1, 0.1, 1), 33: (0.1, 1, 0.1)}
    return np.stack([rng.normal(size=(size, 3)) * stretch[label] for label in labels]).astype("f4") / 3


@pytest.fixture
def root(tmp_path):
    """Return a data root with a small ModelNet of three classes."""
    folder = tmp_path / "data" / "modelnet40_ply_hdf5_2048"
    for seed, (split, labels) in enumerate(LABELS.items()):
        write_h5(folder / f"ply_data_{split}0.h5", data=shapes(labels, seed), label=np.array(labels, "u1")[:, None])
    return tmp_path / "data"


def small_encoder():
    return build_encoder("dgcnn_cls", emb_dims=8, k=4)


def run(root, *arguments):
    return script.main(["--dataset", "modelnet10", "--data_root", str(root), *map(str, arguments)])


def test_random_encoder_end_to_end(root, tmp_path, capsys):
    report = tmp_path / "new" / "folder" / "result.json"
    metrics = run(root, *SMALL, "--calibrate_bn", "--shots", "1", "8", "--shot_draws", "4", "--json", report)
    assert json.loads(report.read_text()) == metrics
    (record,) = metrics["runs"]
    assert metrics["test_accuracy_mean"] == record["test_accuracy"] and metrics["test_accuracy_std"] == 0.0
    right = metrics["test_accuracy_mean"] * 13 / 100
    assert right == pytest.approx(round(right)) and right > 13 / 3
    assert (metrics["svm_c"], metrics["dataset"], metrics["variant"]) == (0.01, "modelnet10", None)
    assert (metrics["train_clouds"], metrics["test_clouds"], metrics["num_points"]) == (24, 13, 16)
    assert set(metrics["shots"]) == {"1", "8"} and metrics["shots_std_over"] == "draws"
    draws = record["shots_accuracies"]["1"]
    assert len(draws) == 4
    assert metrics["shots"]["1"] == pytest.approx([np.mean(draws), np.std(draws, ddof=1)])
    assert record["short_classes"] == {"8": {"table": 7}}
    assert 0 < metrics["retrieval_map"] <= 100 and record["retrieval_queries_left_out"] == 0
    assert (record["encoder"], record["k"], record["emb_dims"], record["feature_dim"]) == ("dgcnn_cls", 3, 8, 16)
    assert "torch" in metrics["versions"] and "scikit-learn" in metrics["versions"]
    output = capsys.readouterr().out
    assert "one run, so no deviation over runs" in output
    assert "8 labels: classes with fewer training clouds use all of them: table (7)" in output
    assert "24 train clouds, but the published set has 3991" in output


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [([2] * 5, (), "at least two classes"), ([2, 8, 33], ("--svm_c", 0.01, 1), "a class with two samples; give one")],
)
def test_labels_without_an_svm_are_told_before_features_are_computed(root, monkeypatch, labels, flags, message):
    file = root / "modelnet40_ply_hdf5_2048" / "ply_data_train0.h5"
    write_h5(file, data=shapes(labels, 0), label=np.array(labels, "u1")[:, None])
    monkeypatch.setattr(script, "features_of", None)
    with pytest.raises(DataError, match=f"modelnet10 cannot be scored: .*{message}"):
        run(root, *SMALL, *flags)


def test_several_seeds_give_mean_and_deviation_over_runs(root, capsys):
    metrics = run(root, *SMALL, "--seeds", 1, 2, 3, "--shots", 2, "--shot_draws", 2)
    runs = metrics["runs"]
    assert [record["random_init_seed"] for record in runs] == [1, 2, 3]
    for key, mean, std in (
        ("test_accuracy", metrics["test_accuracy_mean"], metrics["test_accuracy_std"]),
        ("retrieval_map", metrics["retrieval_map"], metrics["retrieval_map_std"]),
    ):
        values = [record[key] for record in runs]
        assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert metrics["retrieval_map_std"] > 0  # the seeds give different encoders
    means = [record["shots"]["2"][0] for record in runs]
    assert metrics["shots"]["2"] == pytest.approx([np.mean(means), np.std(means, ddof=1)])
    assert metrics["shots_std_over"] == "runs"
    output = capsys.readouterr().out
    assert "mean over 3 runs" in output and "not a fair baseline" in output


def test_a_seed_repeats_its_run(root):
    def numbers(*arguments):
        record = run(root, *SMALL, "--calibrate_bn", "--shots", 1, "--shot_draws", 3, *arguments)["runs"][0]
        return record["test_accuracy"], record["shots"], record["retrieval_map"]

    assert numbers("--seed", 5) == numbers("--seed", 5)
    assert numbers("--seed", 5) != numbers("--seed", 6)


def test_calibration_changes_the_features(root):
    plain = run(root, *SMALL, "--shots")
    calibrated = run(root, *SMALL, "--shots", "--calibrate_bn", "--calibration_clouds", 10)
    assert plain["retrieval_map"] != calibrated["retrieval_map"]
    assert (plain["calibration_clouds"], calibrated["calibration_clouds"]) == (None, 10)
    assert plain["shots"] == {}


def test_checkpoints_are_rebuilt_without_flags_and_identified(root, tmp_path, capsys):
    paths = [save_encoder(tmp_path / name / "last.pth", small_encoder()) for name in "ab"]
    metrics = run(root, "--model_path", *paths, "--shots", "--num_points", 16)
    assert [record["model_path"] for record in metrics["runs"]] == list(map(str, paths))
    assert [record["name"] for record in metrics["runs"]] == list(map(str, paths))  # last.pth alone would be ambiguous
    assert [record["sha256"] for record in metrics["runs"]] == [sha256(path) for path in paths]
    assert {record["k"] for record in metrics["runs"]} == {4}
    assert metrics["number_of_runs"] == 2 and "untrained" not in capsys.readouterr().out
    reference = run(root, "--model_path", paths[1], "--shots", "--num_points", 16, "--batch_size", 3)["runs"][0]
    assert reference["test_accuracy"] == metrics["runs"][1]["test_accuracy"]
    assert reference["name"] == "last.pth"


def test_calibrating_a_checkpoint_warns(root, tmp_path, capsys):
    path = save_encoder(tmp_path / "last.pth", small_encoder())
    run(root, "--model_path", path, "--shots", "--num_points", 16, "--calibrate_bn")
    assert "warning: --calibrate_bn replaces" in capsys.readouterr().out


def test_checksum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_c_is_chosen_by_cross_validation_when_several_are_given(root, capsys):
    record = run(root, *SMALL, "--calibrate_bn", "--svm_c", "1e-9", "0.5", "--shots", "--cv_folds", 3)["runs"][0]
    assert set(record["cv_accuracy_by_c"]) == set(record["test_accuracy_by_c"]) == {"1e-09", "0.5"}
    assert record["svm_c"] == 0.5 and record["cv_accuracy_by_c"]["0.5"] > record["cv_accuracy_by_c"]["1e-09"]
    assert record["test_accuracy"] == record["test_accuracy_by_c"]["0.5"]
    assert "chosen by cross-validation on the training split" in capsys.readouterr().out


def test_c_is_a_list_only_where_runs_differ():
    record = {"test_accuracy": 50.0, "svm_c": 0.1, "shots": {}, "retrieval_map": 20.0}
    assert script.summarize([record, record])["svm_c"] == 0.1
    summary = script.summarize([record, {**record, "svm_c": 1.0, "test_accuracy": 52.0}])
    assert summary["svm_c"] == [0.1, 1.0]
    assert (summary["test_accuracy_mean"], summary["test_accuracy_std"]) == pytest.approx((51.0, 2**0.5))


def test_demo_and_scanobjectnn_are_read_by_their_names(root, capsys):
    for split, labels in LABELS.items():
        targets = {33: 14, 8: 4, 2: 0}
        for path in (root / f"demo_hdf5/ply_data_{split}0.h5", root / f"ScanObjectNN/main_split/{split}.h5"):
            write_h5(path, data=shapes(labels, 3), label=np.array([targets[label] for label in labels]))
    common = ["--data_root", str(root), *SMALL, "--shots"]
    assert script.main(["--dataset", "demo", *common])["test_clouds"] == 13
    metrics = script.main(["--dataset", "scanobjectnn", *common])
    assert metrics["variant"] == "OBJ_BG"
    assert metrics["files"]["train"] == [str(root / "ScanObjectNN/main_split/train.h5")]
    assert metrics["files"]["train"][0] in capsys.readouterr().out
    with pytest.raises(DataError, match="no ScanObjectNN PB_T50_RS"):
        script.main(["--dataset", "scanobjectnn", "--variant", "T50_RS", *common])


def test_a_missing_set_is_told_from_a_damaged_one(root):
    with pytest.raises(DataError, match=r"no DemoShapes .*found there: --dataset modelnet10\)"):
        script.main(["--dataset", "demo", "--data_root", str(root), *SMALL])
    path = root / "modelnet40_ply_hdf5_2048" / "ply_data_test0.h5"
    cut(path)
    with pytest.raises(DataError, match="truncated") as error:
        run(root, *SMALL)
    assert "found there" not in str(error.value)


def test_pictures_are_written(root, tmp_path):
    confusion, sheet = tmp_path / "figures" / "confusion.png", tmp_path / "figures" / "sheet.png"
    run(root, *SMALL, "--shots", "--confusion_matrix", confusion, "--retrieval_sheet", sheet)
    for path in (confusion, sheet):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 5


def test_confusion_matrix_shows_shares_of_the_true_class(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path):
        axes = figure.axes[0]
        drawn["cells"] = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts}
        drawn["rows"] = [label.get_text() for label in axes.get_yticklabels()]

    monkeypatch.setattr("downstream.figures.save_figure", keep)
    truth, predicted = np.array([5, 5, 5, 5, 1, 1]), np.array([5, 5, 5, 1, 1, 7])
    names = [f"name {i}" for i in range(8)]
    draw_confusion_matrix(truth, predicted, names, tmp_path / "x.png", title="t")
    assert drawn["rows"] == ["name 1 (2)", "name 5 (4)", "name 7 (0)"]
    assert drawn["cells"] == {(0, 0): "50", (0, 2): "50", (1, 0): "25", (1, 1): "75"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_points", "21"], r"21 points .*have 20"),
        (["--num_points", "2"], "k = 3 neighbors in clouds of 2 points"),
        (["--cv_folds", "1"], "at least 2 folds"),
        (["--calibrate_bn", "--calibration_clouds", "1"], "--calibration_clouds 1: .* at least two clouds"),
        (["--confusion_matrix", "result.docx"], "must end in"),
        (["--json", "/proc/nowhere/x.json"], "cannot write"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_wrong_settings_are_refused(root, arguments, message):
    with pytest.raises(UserError, match=message):
        run(root, *SMALL, *arguments)


def test_settings_that_do_not_go_together(root, tmp_path):
    path = save_encoder(tmp_path / "last.pth", small_encoder())
    with pytest.raises(UserError, match="--seeds"):
        run(root, "--model_path", path, "--seeds", 1, 2)
    with pytest.raises(UserError, match="--k: pointnet_cls has no such setting"):
        run(root, "--random_init", "--model", "pointnet_cls", "--k", 3, "--num_points", 16)
    with pytest.raises(CheckpointError, match="holds a dgcnn_cls, not the pointnet_cls"):
        run(root, "--model_path", path, "--model", "pointnet_cls", "--num_points", 16)
    save_encoder(tmp_path / "nine.pth", build_encoder("dgcnn_semseg", k=3, emb_dims=8, in_channels=9))
    with pytest.raises(CheckpointError, match="nine.pth holds an encoder of 9 values per point, not 3"):
        run(root, "--model_path", tmp_path / "nine.pth", "--num_points", 16)
    cut(path)
    with pytest.raises(CheckpointError, match=str(path)):
        run(root, "--model_path", path, "--num_points", 16)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--random_init", "--model_path", "x"],
        ["--random_init", "--svm_c", "0"],
        ["--random_init", "--seeds", "-1"],
        ["--random_init", "--shots", "0"],
    ],
)
def test_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["downstream/classification/main.py"], ["-m", "downstream.classification.main"]])
def test_runs_by_path_and_as_a_module_and_reports_errors_in_one_message(words, tmp_path):
    done = command(*words, "--random_init", "--dataset", "modelnet40", "--data_root", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no ModelNet40 in") and "Traceback" not in done.stderr
    assert "data/download_data.sh modelnet40" in done.stderr
