"""A table of command lines of the released scripts: what each does here, run through the real ``main``."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_crossnet_con
from downstream.classification import finetune
from downstream.classification import main as linear_svm
from downstream.segmentation import main_partseg, main_semseg
from models import build_encoder
from models.projection_heads import point_projection
from models.task_heads import Classification, PartSegmentation, SemanticSegmentation
from tests.support.checkpoints import save_published
from tests.support.files import write_h5
from tests.support.paths import ROOT
from utils.errors import UserError

PRE, TUNE, PARTS, ROOMS, SVM = "train_crossnet_con.py finetune.py main_partseg.py main_semseg.py main.py".split()
SCRIPTS = {PRE: train_crossnet_con, SVM: linear_svm, TUNE: finetune, PARTS: main_partseg, ROOMS: main_semseg}
TINY = "--device cpu --workers 0 --k 4 --emb_dims 16 --batch_size 8 --epochs 1"
TRAINING = {  # in the place of the released sizes; the command line of the table comes behind them
    PRE: f"{TINY} --num_points 24 --image_size 16 --image_model resnet18 --eval_every 0",
    TUNE: f"{TINY} --num_points 24 --batch_size 40",
    PARTS: TINY,
    ROOMS: TINY,
}
SCORING = dict.fromkeys(TRAINING, "--device cpu --workers 0") | {SVM: "--device cpu --num_points 24 --shots 1"}

# Script, released command line, and what it does: settings of the run that it is.
RUN = [
    (PRE, "--model dgcnn --use_sgd True --start_epoch 0 --n_imgs 1", {"model": "dgcnn_cls", "use_sgd": True}),
    (PRE, "--model dgcnn_part --gpu 0 --use_sgd False", {"model": "dgcnn_partseg", "use_sgd": False}),
    (PRE, "--model dgcnn_sem --eval False --dataset ShapeNet", {"model": "dgcnn_semseg"}),
    (PRE, "--model dgcnn_seg --no_cuda True --use_sgd 1", {"model": "dgcnn_seg", "use_sgd": True}),
    (PRE, "--model dgcnn_cls --resume --model_path released/cls.pth", {"k": 4, "emb_dims": 16}),
    (
        TUNE,
        "--model dgcnn --dataset ModelNet40 --use_sgd True --scheduler cos --percent_train 0.5 --eval False",
        {"model": "dgcnn_cls", "use_sgd": True, "scheduler": "released", "label_fraction": [0.5], "eval": False},
    ),
    (TUNE, "--pretrain_path released/cls.pth --use_sgd 0 --no_cuda", {"use_sgd": False, "device": "cpu"}),
    (TUNE, "--model dgcnn --no-use_sgd --scheduler cos", {"use_sgd": False, "scheduler": "released"}),
    (
        PARTS,
        "--model dgcnn --dataset shapenetpart --scheduler cos --use_sgd True --normalize_input False",
        {"model": "dgcnn_partseg", "scheduler": "released", "use_sgd": True},
    ),
    (PARTS, "--pretrain_path released/part.pth --class_choice cone --scheduler step", {"scheduler": "step"}),
    (
        ROOMS,
        "--model dgcnn_seg --dataset S3DIS --train_area 1,2,3,4,5,6 --test_area 5 --scheduler cos",
        {"model": "dgcnn_semseg", "scheduler": "released", "train_area": [[1, 2, 3, 4, 5, 6]], "test_area": [5]},
    ),
]

# Script, released command line, files that are scored.
SCORE = [
    (TUNE, "--eval True --dataset modelnet40 --num_points 24 --model_path released/model.t7", ["released/model.t7"]),
    (PARTS, "--eval True --model_path released/model_part.t7", ["released/model_part.t7"]),
    (ROOMS, "--eval 1 --test_area 6 --model_root released/sem", ["released/sem/model_6.t7"]),
    (
        ROOMS,
        "--eval True --test_area all --model_root released/sem",
        [f"released/sem/model_{area}.t7" for area in range(1, 7)],
    ),
    (
        ROOMS,
        "--eval --test_area all --model_path 'released/sem/model_{area}.t7'",
        [f"released/sem/model_{area}.t7" for area in range(1, 7)],
    ),
    (SVM, "--dataset ModelNet40 --model dgcnn --model_path released/cls.pth --k 4 --gpu 0", ["released/cls.pth"]),
    (SVM, "--dataset modelnet40 --model_path released/cls.pth --k 4 --eval False", ["released/cls.pth"]),
]

# Script, released command line, and words of the line that refuses it: what to type.
REFUSE = [
    (PRE, "--eval", r"--eval: .*downstream/classification/main.py --model_path"),
    (PRE, "--eval True --model_path a.pth", r"--eval True: .*downstream/classification/main.py"),
    (PRE, "--start_epoch 100", r"--start_epoch 100: .*--resume"),
    (PRE, "--n_imgs 2", r"--n_imgs 2: .*one random rendering .*leave the flag out"),
    (PRE, "--dataset ModelNet40", r"--dataset ModelNet40: .*--eval_dataset of train_crossnet_con.py"),
    (PRE, "--gpu 0,1", r"--gpu 0,1: .*torchrun"),
    (TUNE, "--start_epoch 5", r"--start_epoch 5: .*--resume"),
    (TUNE, "--normalize_input True", r"--normalize_input True: .*as stored in the files"),
    (TUNE, "--percent_train 10", r"--label_fraction 10: expected more than 0 and at most 1"),
    (PARTS, "--dataset S3DIS", r"--dataset S3DIS: this script has one data set \(shapenetpart\)"),
    (PARTS, "--pretrain_path released/cls.pth", r"holds the encoder dgcnn_cls, .*--model dgcnn_partseg"),
    (ROOMS, "--dataset modelnet40", r"--dataset modelnet40: this script has one data set \(s3dis\)"),
    (ROOMS, "--eval True --test_area 6 --model_root released/some", r"model_6.t7 does not exist"),
    (
        ROOMS,
        "--eval --test_area all --model_path 'released/some/model_{area}.t7'",
        r"released/some/model_1.t7 does not exist",
    ),
    (ROOMS, "--eval True", r"--eval needs --model_path"),
    (SVM, "--pretrain_path best_model.pth", r"--pretrain_path best_model.pth: .*finetune.py with the same flags"),
    (SVM, "--exp_name cls --epochs 200", r"--exp_name cls: .*finetune.py"),
    (SVM, "--epochs 200 --use_sgd True", r"--epochs 200: .*finetune.py"),
    (SVM, "--percent_train 0.1", r"--percent_train 0.1: .*finetune.py"),
    (SVM, "--eval True --model_path released/model.t7", r"--eval True: .*finetune.py"),
]


@pytest.fixture(scope="module")
def place(data_root, tmp_path_factory):
    """Return a folder with ``data`` and with ``released``, files of the released scripts."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(data_root, place / "data")
    write_modelnet40(place / "data" / "modelnet40_ply_hdf5_2048")
    (place / "released" / "sem").mkdir(parents=True)
    (place / "released" / "some").mkdir()
    torch.manual_seed(0)
    encoders = {name: build_encoder(f"dgcnn_{name}", k=4, emb_dims=16) for name in ("cls", "partseg", "semseg")}
    head = point_projection(32, 16).state_dict()
    pretrained = {**encoders["cls"].state_dict(), **{f"inv_head.{key}": value for key, value in head.items()}}
    torch.save(pretrained, place / "released" / "cls.pth")
    torch.save(encoders["partseg"].state_dict(), place / "released" / "part.pth")
    models = {
        "model.t7": Classification(encoders["cls"], num_classes=40),
        "model_part.t7": PartSegmentation(encoders["partseg"], num_categories=2, num_parts=5),
        "some/model_5.t7": SemanticSegmentation(encoders["semseg"], num_classes=13),
        **{f"sem/model_{area}.t7": SemanticSegmentation(encoders["semseg"], num_classes=13) for area in range(1, 7)},
    }
    for name, model in models.items():
        save_published(place / "released" / name, model)
    return place


def write_modelnet40(folder):
    """Two training clouds and a test cloud of each class."""
    for seed, (split, count) in enumerate((("train", 80), ("test", 40))):
        points = np.random.default_rng(seed).normal(size=(count, 24, 3)).astype("f4")
        labels = (np.arange(count) % 40)[:, None].astype("u1")
        write_h5(folder / f"ply_data_{split}0.h5", data=points, label=labels)
        (folder / f"{split}_files.txt").write_text(f"data/modelnet40_ply_hdf5_2048/ply_data_{split}0.h5\n")
    (folder / "shape_names.txt").write_text("".join(f"class{i}\n" for i in range(40)))


@pytest.fixture(autouse=True)
def inside(monkeypatch, place, small_runs):
    monkeypatch.chdir(place)


@pytest.mark.parametrize(("script", "line", "settings"), RUN)
def test_it_trains_with_these_settings(script, line, settings, tmp_path):
    out = ["--output_dir", str(tmp_path), "--exp_name", "a"]
    SCRIPTS[script].main([*TRAINING[script].split(), *out, *shlex.split(line)])
    assert (tmp_path / "a" / "last.pth").is_file()
    found = json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]
    assert {name: found[name] for name in settings} == settings
    assert not {"gpu", "no_cuda", "start_epoch", "n_imgs", "percent_train", "normalize_input"} & found.keys()


@pytest.mark.parametrize(("script", "line", "files"), SCORE)
def test_it_scores_these_files(script, line, files):
    metrics = SCRIPTS[script].main([*SCORING[script].split(), *shlex.split(line)])
    assert [record["model_path"] for record in metrics["runs"]] == files


@pytest.mark.parametrize(("script", "line", "message"), REFUSE)
def test_it_is_refused_by_a_line_that_names_the_new_way(script, line, message, place, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        out = ["--output_dir", str(tmp_path / "a")] if script in TRAINING else []
        SCRIPTS[script].main([*TRAINING.get(script, "").split(), *out, *shlex.split(line)])
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pth"))


def test_words_that_were_always_true_are_named(caplog, tmp_path):
    finetune.build_parser().parse_args(["--use_sgd", "False"])
    assert "--use_sgd False means off here; the released scripts read any word as on" in caplog.text


@pytest.mark.parametrize("line", ["--use_sgd maybe", "--no-use_sgd True", "--scheduler cosinus", "--model resnet"])
def test_a_wrong_value_is_still_an_error_of_the_command_line(line, capsys):
    with pytest.raises(SystemExit) as caught:
        finetune.build_parser().parse_args(line.split())
    assert caught.value.code == 2 and line.split()[0] in capsys.readouterr().err


def test_the_gpu_of_a_number_is_taken_where_there_are_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in SCRIPTS.values():
        need = ["--random_init"] if module is linear_svm else []
        assert module.build_parser().parse_args([*need, "--gpu", "1"]).device == "cuda:1"
        assert module.build_parser().parse_args([*need, "--no_cuda"]).device == "cpu"


def documented_commands():
    """Return the commands in docs/fidelity.md that do what the released scripts do."""
    text = (
        (ROOT / "docs" / "fidelity.md").read_text("utf-8").split("## As released")[1].split("## Old command lines")[0]
    )
    commands = [shlex.split(cell) for cell in re.findall(r"`python ([^`]+)`", text)]
    return [(Path(path).name, arguments) for path, *arguments in commands]


def test_the_documented_commands_of_the_released_scripts_have_the_released_settings():
    commands = documented_commands()
    assert [script for script, _ in commands] == [
        *["train_crossnet_con.py"] * 4,
        *("finetune.py", "main_partseg.py", "main_semseg.py"),
    ]
    common = {"lr": 1e-3, "batch_size": 32, "test_batch_size": 32, "seed": 1}
    con = {"epochs": 250, "weight_decay": 1e-5, "svm_c": 0.01, "objective": "con", "temperature": None}
    ave = {"epochs": 120, "weight_decay": 1e-6, "svm_c": 0.1, "objective": "ave", "temperature": None}
    pretraining = {"lr_schedule": "released", "background": "released", "num_points": None, "image_model": "resnet50"}
    tuning = {"epochs": 200, "test_batch_size": 16, "weight_decay": 1e-4, "scheduler": "released"}
    expected = [
        *({**common, **pretraining, **con, "image_modality": "both"},),
        *({**common, **pretraining, **ave, "image_modality": modality} for modality in ("both", "rgb", "gray")),
        *({**common, **tuning, "use_sgd": sgd, "k": k} for sgd, k in ((True, 16), (False, 20), (False, 20))),
    ]
    for (script, arguments), settings in zip(commands, expected, strict=True):
        found = vars(SCRIPTS[script].build_parser().parse_args(arguments))
        assert {name: found[name] for name in settings} == settings
        assert found["select_on"] == "test"
