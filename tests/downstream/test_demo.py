"""The demo on tiny sets: its comparisons, its report, and its page."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.fake_gpu import fakes_gpus
from downstream import demo, demo_report
from models import pretrained
from tests.support.weights import publish_tiny
from utils import reproducible
from utils.errors import UserError


@pytest.fixture
def run(data_root, tmp_path, monkeypatch, small_runs):
    """Return a function that runs the demo on tiny sets, with settings of a few steps."""
    monkeypatch.setattr(
        "engine.run_folder.RunFolder.draw_curves", lambda folder: Figure().savefig(folder / "curves.png")
    )
    monkeypatch.setattr(demo_report, "draw_pairs", lambda *args, **kwargs: Figure())
    monkeypatch.setattr(demo, "PRETRAINING", {**demo.PRETRAINING, "workers": 0, "batch_size": 4})
    for name, task in demo.SEGMENTATION.items():
        tiny = task._replace(
            encoder={**task.encoder, "k": 4, "emb_dims": 16},
            pretraining={"epochs": 1, "num_points": 24, "image_size": 16},
            fine_tuning={**task.fine_tuning, "epochs": 2, "num_points": 24, "batch_size": 4},
            pictures={**task.pictures, "items": 1},
        )
        monkeypatch.setitem(demo.SEGMENTATION, name, tiny)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    publish_tiny(tmp_path, [])

    def call(*arguments):
        words = ["--data_root", data_root, "--output_dir", tmp_path / "out", "--device", "cpu", *arguments]
        return demo.main([str(word) for word in words])

    return call


def test_every_task_is_done_without_and_with_pretraining_and_shown(run, tmp_path, capsys):
    publish_tiny(tmp_path, ["dgcnn_cls", "dgcnn_partseg", "dgcnn_semseg"])
    report = run("--epochs", 1, "--num_points", 24)
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == report
    for name in ("untrained", "pretrained", "shipped"):
        assert {"test_accuracy_mean", "retrieval_map"} <= report[name].keys()
    page, printed = (out / "report.html").read_text(), capsys.readouterr().out
    for name, task in demo.SEGMENTATION.items():
        for start in (*demo.STARTS, demo.SHIPPED):
            reached = json.loads((out / name / f"{start}_1.json").read_text())["runs"][0]["best"]["test"]
            for key, score in task.scores.items():
                value = reached
                for step in score.path:
                    value = value[step]
                assert report[name][start][key] == {"mean": value, "std": 0.0, "values": [value]}
                assert f"<td>{value:.1f}</td>" in page and f"<th>{score.heading}</th>" in page
        assert json.loads((out / name / "shipped_1" / "config.json").read_text())["arguments"]["emb_dims"] is None
        assert f"{name}, shipped: {next(iter(task.scores.values())).heading}" in printed
    # One picture per sheet, curve and matrix, inside the page.
    assert page.count('src="data:image/png;base64,') == 6 + 2 * 2


@pytest.fixture
def no_pictures(monkeypatch):
    """Skip sheets and confusion matrices, which take seconds; one test covers them."""

    def blank(words):
        folder = Path(words[words.index("--output_dir") + 1])
        folder.mkdir(exist_ok=True)
        Figure().savefig(folder / "sheet.png")

    monkeypatch.setattr(demo.visualize, "main", blank)
    monkeypatch.setattr(demo.main_semseg, "draw", lambda *args: None)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.skipif(not fakes_gpus(), reason="PyTorch before 2.10 plays no GPU without a driver")
def test_the_demo_takes_a_gpu_where_there_is_one(run):
    pytest.importorskip("triton", reason="benchmarks.emulated_gpu plays its kernels")
    from benchmarks.emulated_gpu import emulated_gpu

    with emulated_gpu() as gpu:
        report = run("--tasks", "classification", "parts", "--epochs", 1, "--num_points", 24, "--device", "auto")
    assert report["tasks"] == ["classification", "parts"] and gpu.steps >= 4 and not gpu.problems


@pytest.mark.usefixtures("no_pictures")
def test_both_starts_have_the_same_encoder_and_budget(run, tmp_path):
    run("--tasks", "parts", "rooms")
    for name in demo.SEGMENTATION:
        folder = tmp_path / "out" / name
        scratch, pretrained = (json.loads((folder / f"{s}_1" / "config.json").read_text()) for s in demo.STARTS)
        differing = {k for k, v in scratch["arguments"].items() if pretrained["arguments"][k] != v}
        assert differing == {"pretrain_path", "model", "k", "emb_dims", "exp_name", "json"}
        assert pretrained["arguments"]["pretrain_path"] == str(folder / "pretraining_1" / "last.pth")
        logs = [(folder / f"{s}_1" / "run.log").read_text().splitlines() for s in demo.STARTS]
        # "<time> encoder NAME (SETTINGS): TENSORS: ORIGIN"
        encoders = [next(line for line in log if " encoder dgcnn_" in line).split(" encoder ")[1] for log in logs]
        assert encoders[0].split(": ")[:2] == encoders[1].split(": ")[:2]
        assert encoders[0].endswith("starts fresh") and encoders[1].endswith("last.pth, all of it")


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_demo_continues_and_keeps_its_finished_parts(run, tmp_path, monkeypatch, capsys):
    arguments = ("--tasks", "parts", "--seeds", 3)
    whole = run(*arguments, "--output_dir", tmp_path / "whole")
    assert not (tmp_path / "whole" / demo.UNFINISHED).exists()
    calls, task = [], demo.SEGMENTATION["parts"]

    def counted(words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return task.script(words)

    monkeypatch.setitem(demo.SEGMENTATION, "parts", task._replace(script=counted))
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert "the same command continues it and keeps its finished parts" in capsys.readouterr().out
    out = tmp_path / "out"
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts" / "pretraining_3").glob("*.pth")}
    assert kept and (out / demo.UNFINISHED).exists()
    report = run(*arguments)
    assert len(calls) == 3 and f"kept: {out / 'parts' / 'scratch_3.json'}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # pretraining was not repeated
    assert (report["continued"], whole["continued"]) == (True, False) and not (out / demo.UNFINISHED).exists()
    for start in demo.STARTS:
        assert report["parts"][start] == whole["parts"][start]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "parts"], "stopped demo with other git_commit: starting over"),
        (["--tasks", "parts", "--resume"], "kept"),
        (["--tasks", "parts", "--overwrite"], ""),
        (["--tasks", "rooms", "--resume"], "stopped demo with other tasks: --overwrite starts over"),
    ],
)
def test_a_stopped_demo_of_other_settings_or_code_starts_over(arguments, message, run, monkeypatch, capsys):
    monkeypatch.setattr(demo, "make_report", lambda args, folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reproducible, "git_commit", lambda: "another")
        run("--tasks", "parts")
    monkeypatch.setattr(demo, "make_report", lambda args, folder: {"kept": args.keep})
    if "rooms" in arguments:
        with pytest.raises(UserError, match=message):
            run(*arguments)
    else:
        assert run(*arguments) == {"kept": message == "kept"}
        assert message in capsys.readouterr().out + "kept"


@pytest.mark.usefixtures("no_pictures")
def test_several_seeds_give_mean_and_deviation(run, tmp_path):
    report = run("--tasks", "parts", "--seeds", 3, 8)
    assert "untrained" not in report and "rooms" not in report
    score = report["parts"]["scratch"]["instance_miou"]
    assert len(score["values"]) == 2 and score["values"][0] != score["values"][1]
    assert score["mean"] == pytest.approx(np.mean(score["values"]))
    assert score["std"] == pytest.approx(np.std(score["values"], ddof=1))
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{score['mean']:.1f} &plusmn; {score['std']:.1f}" in page and "deviation over seeds" in page


def test_the_picture_is_of_the_reported_weights():
    entry = {"epoch": 2, "test": {}}
    record = {"folder": "a", "best": {"epoch": 1}, "last": entry}
    assert demo.reported_checkpoint(record).name == "best.pth"
    assert demo.reported_checkpoint({**record, "best": entry}).name == "last.pth"
    assert demo.reported_checkpoint({**record, "best": None}).name == "last.pth"
