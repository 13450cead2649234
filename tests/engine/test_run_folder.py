import gc
import json
import logging
import subprocess
import sys
import types

import pytest
from PIL import Image

from engine.checkpoint import save_checkpoint
from engine.run_folder import RUN_FILES, RunFolder, WandbMirror
from tests.support.files import contents
from tests.support.paths import ROOT
from utils.errors import UserError


def record(epoch, **more):
    return {"epoch": epoch, "loss": 1 / epoch, "lr": 0.1, **more}


def test_an_earlier_run_is_kept_unless_asked(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "last.pth").write_bytes(b"")
    for name in RUN_FILES:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(UserError, match=f"{folder} holds an earlier run.*--resume.*--overwrite"):
            RunFolder(folder)
        with pytest.raises(UserError, match="holds an earlier run"):
            RunFolder(folder, resume=str(tmp_path / "elsewhere" / "last.pth"))
        RunFolder(folder, resume="auto")
        RunFolder(folder, resume=str(folder / "best.pth"))
        RunFolder(folder, overwrite=True)
        assert contents(folder) == {name: b"precious"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    RunFolder(tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.txt": b"mine"}


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from engine.run_folder import RunFolder
folder = RunFolder({str(tmp_path)!r}, resume="auto")
print("locked", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"another process .process {other.pid} on .* trains in {tmp_path}"):
            RunFolder(tmp_path, resume="auto")
        other.communicate("\n")
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("left by a process that was killed")
    folder = RunFolder(tmp_path, overwrite=True)
    RunFolder(tmp_path, resume="auto")  # the same process, as in a notebook
    folder.unlock()
    assert not (tmp_path / ".lock").exists()


def test_an_earlier_run_is_removed_when_the_new_one_begins(tmp_path):
    names = [*RUN_FILES, "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("old")
    folder = RunFolder(tmp_path, overwrite=True)
    folder.start_log()
    logging.getLogger("crossnet").info("before it begins")
    assert set(contents(tmp_path)) == set(names) and (folder / "run.log").read_text() == "old"
    folder.write_config({"arguments": {"lr": 1}})
    logging.getLogger("crossnet").info("after")
    folder.keep_start()
    assert set(contents(tmp_path)) == {"config.json", "run.log", "notes.txt"}
    assert json.loads((folder / "config.json").read_text()) == {"arguments": {"lr": 1}}
    lines = (folder / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["before it begins", "after"]


def test_an_earlier_run_comes_back_when_the_start_of_the_new_one_fails(tmp_path):
    for name in RUN_FILES:
        (tmp_path / name).write_text("old")
    before = contents(tmp_path)
    folder = RunFolder(tmp_path, overwrite=True)
    folder.start_log()
    folder.write_config({})
    assert {"best.pth.replaced", "run.log", "config.json"} <= set(contents(tmp_path))
    folder.discard_start()
    assert contents(tmp_path) == before
    resumed = RunFolder(tmp_path, resume="auto")  # a run that is continued is never undone
    resumed.start_log()
    resumed.write_config({})
    resumed.discard_start()
    assert set(contents(tmp_path)) == set(before)


def test_a_continued_run_keeps_its_files_and_log(tmp_path):
    for name in RUN_FILES:
        (tmp_path / name).write_text("old\n")
    folder = RunFolder(tmp_path, resume="auto", overwrite=True)
    folder.start_log()
    folder.write_config({})
    logging.getLogger("crossnet").info("new")
    assert all((folder / name).read_text().startswith("old") for name in RUN_FILES if name != "config.json")
    assert (folder / "run.log").read_text().endswith("new\n")


def test_resume_takes_the_newest_checkpoint_there_is(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.to_resume(None) is None and folder.to_resume("auto") is None
    folder.append_metrics(record(1))
    assert folder.to_resume("auto") is None and list(folder.metrics()) == []  # starts again: no line twice

    def save(path, step):
        save_checkpoint(path, {"progress": {"step": step}})

    save(tmp_path / "a.pth", 9)
    assert folder.to_resume(str(tmp_path / "a.pth"))[0] == tmp_path / "a.pth"
    for name, step, newest in (
        *(("best.pth", 4, "best.pth"), ("previous.pth", 2, "best.pth"), ("previous.pth", 6, "previous.pth")),
        ("last.pth", 8, "last.pth"),
    ):
        save(folder / name, step)
        path, payload = folder.to_resume("auto")
        assert path == folder / newest and payload["progress"]["step"] == max(step, 4)


def test_metrics_are_cut_back_and_a_torn_last_line_is_left_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for epoch in (1, 2, 3):
        folder.append_metrics(record(epoch))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [r["epoch"] for r in folder.metrics()] == [1, 2, 3]
    folder.cut_metrics(2)
    assert (folder / "metrics.jsonl").read_text() == "".join(json.dumps(record(e)) + "\n" for e in (1, 2))
    folder.append_metrics(record(3))
    assert [r["epoch"] for r in folder.metrics()] == [1, 2, 3]
    folder.cut_metrics(0)
    assert (folder / "metrics.jsonl").read_text() == ""


def test_metrics_that_cannot_be_written_are_one_clear_error(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left"):
        folder.append_metrics(record(1))
    (folder / "metrics.jsonl").unlink()
    folder.append_metrics(record(1))
    (folder / "metrics.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left"):
        folder.cut_metrics(1)
    assert [r["epoch"] for r in folder.metrics()] == [1]


def test_curves_that_cannot_be_written_do_not_end_the_run(tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics(record(1))
    (folder / "curves.png.tmp").symlink_to("/dev/full")
    folder.draw_curves()
    assert "No space left on device" in caplog.text and not (folder / "curves.png").exists()


def test_curves_are_a_picture_of_the_metrics(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.draw_curves()
    assert contents(folder.path) == {}
    sizes = []
    for epoch in (1, 2):
        scores = {"demo_test_accuracy": 50.0} if epoch == 2 else {}
        folder.append_metrics(record(epoch, loss_intra=0.5, loss_cross=0.5, **scores))
        folder.draw_curves()
        with Image.open(folder / "curves.png") as image:
            sizes.append(image.size)
    assert sizes[1][0] > sizes[0][0] > 500  # a panel more when there are scores
    assert set(contents(folder.path)) == {"metrics.jsonl", "curves.png"}


def test_the_log_of_a_second_run_does_not_go_into_the_firsts_file(tmp_path, caplog):
    first, second = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    logger = logging.getLogger("crossnet")
    first.start_log()
    first.write_config({})
    logger.info("to the first")
    second.start_log()
    second.write_config({})
    logger.info("to the second")
    assert (first / "run.log").read_text().endswith("to the first\n")
    assert (second / "run.log").read_text().endswith("to the second\n")
    assert "second" not in (first / "run.log").read_text()


def test_wandb_gets_every_record(monkeypatch, tmp_path):
    calls = []

    class Run:
        def log(self, record, step):
            calls.append((record, step))

        def finish(self):
            calls.append("finish")

    def init(**kwargs):
        calls.append(kwargs)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    mirror = WandbMirror("offline", name="x", folder=tmp_path, config={"lr": 1})
    mirror.log(record(1), step=3)
    mirror.finish()
    expected = {"project": "crossnet", "name": "x", "dir": str(tmp_path), "config": {"lr": 1}, "mode": "offline"}
    assert calls == [expected, (record(1), 3), "finish"]
    calls.clear()
    mirror = WandbMirror("disabled", name="x", folder=tmp_path, config={})
    mirror.log(record(1), step=3)
    mirror.finish()
    assert calls == []


def test_wandb_that_cannot_start_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb cannot start"):
        WandbMirror("offline", name="x", folder=tmp_path, config={})


def test_pictures_of_curves_leave_no_figure_in_memory(tmp_path):
    from matplotlib.figure import Figure

    folder = RunFolder(tmp_path / "run")
    folder.append_metrics({"epoch": 1, "loss": 1.0, "loss_intra": 0.5, "loss_cross": 0.5, "lr": 0.1})
    before = sum(isinstance(item, Figure) for item in gc.get_objects())
    folder.draw_curves()
    assert (folder / "curves.png").exists()
    assert sum(isinstance(item, Figure) for item in gc.get_objects()) <= before


def test_a_checkpoint_to_resume_that_is_not_there_is_named_and_not_the_run_in_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"--resume .*gone\.pth: the file does not exist"):
        RunFolder(tmp_path / "run", resume=str(tmp_path / "gone.pth"))


def test_curves_of_one_epoch_show_no_fractions_of_an_epoch(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("utils.pictures.save_figure", lambda figure, *_, **__: figures.append(figure))
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics(record(1))
    folder.draw_curves()
    (figure,) = figures
    assert all(tick == int(tick) for axis in figure.axes for tick in axis.get_xticks())
