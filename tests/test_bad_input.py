"""Invalid user input: exit code 2, one clear message without a traceback, nothing overwritten."""

import multiprocessing

import h5py
import numpy as np
import pytest
import torch

import train_crossnet_con as train
from datasets import pack
from downstream.classification import main as classify
from models import build_encoder
from tests.support.checkpoints import save_encoder
from tests.support.commands import command
from tests.support.files import contents, cut
from tests.support.pairs import cloud, cloud_path, view_path, write_demo_set, write_pairs, write_ply
from tests.support.paths import ROOT
from tests.support.small_run import arguments
from utils.cli import run

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def data(tmp_path):
    """Write five pairs, a labeled set and an encoder checkpoint."""
    root = tmp_path / "data"
    write_pairs(root, 5)
    write_demo_set(root)
    save_encoder(tmp_path / "encoder.pth", build_encoder("pointnet_cls", emb_dims=8))
    return root


def script(module, argv, capsys):
    """Run a script as its last lines do; return its exit code and standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(lambda: module.main([str(argument) for argument in argv]))
    return caught.value.code, capsys.readouterr().err


def refused(module, argv, capsys, folder, *shown):
    """Check that the script fails with one message containing all of ``shown``, and that no file changes or appears."""
    before = contents(folder)
    code, err = script(module, argv, capsys)
    assert code == 2, err
    assert "Traceback" not in err and "Caught" not in err
    assert len([line for line in err.splitlines() if "error: " in line]) == 1
    message = err.split("error: ")[1]
    for text in shown:
        assert str(text) in message
    assert "object at 0x" not in message and len(message) < 700
    after = contents(folder)
    new = {name for name in after if name not in before}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in new)  # at most empty folders


def first(root):
    return sorted(str(p.relative_to(root / "ShapeNet"))[:-4] for p in (root / "ShapeNet").rglob("*.ply"))[0]


def empty(root):
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()


def drop_renderings(root):
    for path in (root / "ShapeNetRendering").rglob("*.png"):
        path.unlink()


def ply(write):
    """Write to the first shape's cloud."""
    return lambda root: write(cloud_path(root, first(root)))


def every_view_a_text(root):
    for path in view_path(root, first(root)).parent.glob("*.png"):
        path.write_text("no picture")


DATA = {
    "empty folder": (empty, ["no clouds", "download_data.sh"]),
    "truncated PLY": (ply(cut), ["02691156/shape01.ply", "not a readable PLY", "download or convert it again"]),
    "PLY without z": (ply(lambda p: write_ply(p, cloud(1), axes="xy")), ["shape01.ply", "x, y, z"]),
    "NaN points": (ply(lambda p: write_ply(p, np.full((48, 3), np.nan))), ["shape01.ply", "not finite"]),
    "text for a PNG": (every_view_a_text, ["shape01/rendering/0", "not a readable PNG", "render it again"]),
    "no renderings": (drop_renderings, ["none of the 5 clouds", "rendering", "download_data.sh"]),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "skipping"])
@pytest.mark.parametrize("what", DATA)
def test_broken_pretraining_data(what, strict, workers, data, tmp_path, capsys):
    harm, shown = DATA[what]
    harm(data)
    argv = arguments(data, tmp_path / "out", "--epochs", 1, "--eval_every", 0, "--workers", workers)
    if strict:
        argv.append("--strict_data")
    if what in ("text for a PNG",) or (not strict and what not in ("empty folder", "no renderings")):
        # Found while training: the run has begun, its folder holds settings and log but no checkpoint.
        code, err = script(train, argv, capsys)
        assert code == 2 and "Traceback" not in err and err.count("error: ") == 1
        assert all(text in err for text in shown[:2]) and "object at 0x" not in err
        assert not list((tmp_path / "out").rglob("*.pth")) and not multiprocessing.active_children()
    else:
        refused(train, argv, capsys, tmp_path, *shown)


SETTINGS = {
    "--batch_size 6": ["--batch_size 6", "5 pairs", "--batch_size 5 or less"],
    "--batch_size 1": ["--batch_size 1", "use 2 or more"],
    "--num_points 49": ["--num_points 49", "48"],
    "--k 25": ["--k 25", "24 points", "--k 24 or less"],
    "--eval_points 41": ["41 points", "40"],
    "--device cuda:77": ["--device cuda:77", "--device cpu"],
    "--device nowhere": ["--device nowhere", "--device cpu"],
    "--eval_dataset modelnet40": ["modelnet40", "download_data.sh"],
    "--list {tmp}/none.txt": ["none.txt"],
    "--model_path {tmp}/none.pth": ["none.pth does not exist"],
    "--model_path {tmp}/encoder.pth": ["encoder.pth", "pointnet_cls", "dgcnn_cls"],
    "--model_path {tmp}/cut.pth": ["cut.pth is damaged"],
    "--output_dir {tmp}/encoder.pth": ["cannot write to", "encoder.pth"],
    "--output_dir /proc/none": ["cannot write to /proc/none"],
    "--json {tmp}/encoder.pth/result.json": ["cannot write to", "encoder.pth"],
    "--resume {tmp}/encoder.pth": ["encoder.pth", "last.pth of this script"],
    "--workers -1": ["--workers", "negative"],
    "--lr nan": ["--lr", "finite"],
    "--temperature 0": ["--temperature", "above 0"],
    "--seed 99999999999": ["--seed", "2^32"],
    "--epochs 0": ["--epochs", "at least 1"],
    "--model point_mamba": ["--model", "dgcnn_cls"],
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_wrong_settings_of_pretraining(flags, data, tmp_path, capsys):
    (tmp_path / "cut.pth").write_bytes((tmp_path / "encoder.pth").read_bytes()[:2000])
    argv = arguments(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    refused(train, argv, capsys, tmp_path, *SETTINGS[flags])


def test_one_bad_setting_beside_an_earlier_run_changes_nothing(data, tmp_path, capsys):
    argv = arguments(data, tmp_path / "out", "--epochs", 1, "--eval_every", 0)
    train.main(argv)
    refused(train, argv, capsys, tmp_path, "holds an earlier run", "--resume", "--overwrite")
    refused(train, [*argv, "--resume", "--lr", "1"], capsys, tmp_path, "--lr 0.001 there, 1.0 here", "last.pth")
    refused(train, [*argv, "--overwrite", "--k", "30"], capsys, tmp_path, "--k 30")
    cut(tmp_path / "out" / "crossnet" / "last.pth")
    refused(train, [*argv, "--resume"], capsys, tmp_path, "last.pth is damaged", "--overwrite")


def without_label(root):
    with h5py.File(root / "demo_hdf5" / "ply_data_train0.h5", "r+") as file:
        del file["label"]


@pytest.mark.parametrize("module", [train, classify], ids=["pretraining", "classification"])
def test_labeled_file_without_labels(module, data, tmp_path, capsys):
    without_label(data)
    if module is train:
        argv = arguments(data, tmp_path / "out", "--epochs", 1)
    else:
        argv = ["--dataset", "demo", "--data_root", data, "--model_path", tmp_path / "encoder.pth", "--device", "cpu"]
    refused(module, argv, capsys, tmp_path, "ply_data_train0.h5", "'label'", "data/demo")


class Code:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("cut.pth", ["cut.pth is damaged"]),
        ("none.pth", ["none.pth does not exist"]),
        ("code.pth", ["code.pth is refused", "could run code"]),
        ("text.pth", ["text.pth is damaged or not a checkpoint"]),
    ],
)
def test_wrong_checkpoints_of_classification(name, shown, data, tmp_path, capsys):
    (tmp_path / "cut.pth").write_bytes((tmp_path / "encoder.pth").read_bytes()[:2000])
    torch.save({"a": Code()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("weights")
    argv = ["--dataset", "demo", "--data_root", data, "--model_path", tmp_path / name, "--num_points", 24]
    refused(classify, [*argv, "--device", "cpu"], capsys, tmp_path, *shown)


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("--out {tmp}/encoder.pth/x.h5", ["cannot write", "x.h5"]),
        ("--out {tmp}/encoder.pth", ["exists", "--overwrite"]),
        ("--out {tmp}/x.h5 --data_root {tmp}/none", ["none does not exist", "download_data.sh"]),
        ("--out {tmp}/x.h5 --list {tmp}/none.txt", ["none.txt"]),
    ],
)
def test_wrong_settings_of_packing(flags, shown, data, tmp_path, capsys):
    argv = ["--data_root", data, *flags.format(tmp=tmp_path).split()]
    refused(pack, argv, capsys, tmp_path, *shown)


def test_by_path_from_another_folder(tmp_path):
    """The script itself, as users start it."""
    done = command(ROOT / "train_crossnet_con.py", "--data_root", "nothing", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing does not exist") and len(done.stderr.splitlines()) == 1
    assert not any(contents(tmp_path).values())
