"""Pictures are drawn whatever MPLBACKEND says, and one that cannot be drawn costs nothing else."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from downstream.demo_report import embedded
from engine.run_folder import RunFolder
from tests.support.files import contents
from tests.support.paths import ROOT
from utils.errors import UserError, warn_on_failure
from utils.pictures import Figure, save_figure

NOTEBOOK = "module://matplotlib_inline.backend_inline"  # what a notebook's `!python` passes on
# Draws in a process for each backend; all have PyTorch of the first, and none Matplotlib.
DRAW = """
import os, sys, torch
for backend in sys.argv[2:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.environ["MPLBACKEND"] = backend
    from engine.run_folder import RunFolder
    folder = RunFolder(os.path.join(sys.argv[1], backend))
    folder.append_metrics({"epoch": 1, "loss": 1.0, "lr": 0.1})
    folder.draw_curves()
    import matplotlib
    from downstream import figures
    print(os.environ["MPLBACKEND"], matplotlib.rcParams._get("backend"))
    break
"""


def test_pictures_are_drawn_with_the_variables_of_a_notebook(tmp_path):
    command = [sys.executable, "-c", DRAW, str(tmp_path), NOTEBOOK, "svg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A notebook's own choice stays where it is installed; matplotlib 3.8 keeps its name elsewhere too.
    old = version("matplotlib").startswith("3.8.")
    for line, backend, kept in zip(done.stdout.splitlines()[-2:], (NOTEBOOK, "svg"), (False, True), strict=True):
        assert (tmp_path / backend / "curves.png").read_bytes().startswith(b"\x89PNG")
        environment, used = line.split(maxsplit=1)
        assert environment == backend and (used == backend) == (kept or old)


def test_everything_gets_matplotlib_from_the_module_that_sets_the_backend_aside():
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "checkpoints")]
    importing = re.compile(r"^\s*(from|import) (matplotlib|mpl_toolkits)\b", re.MULTILINE)
    found = [str(p.relative_to(ROOT)) for p in files if importing.search(p.read_text(encoding="utf-8"))]
    assert found == ["utils/pictures.py"]


def test_an_extra_that_fails_is_a_warning(caplog):
    with warn_on_failure("the picture"):
        raise ValueError("no such font\nmore")
    assert "the picture is left out (ValueError: no such font); the results are not affected" in caplog.text
    with pytest.raises(KeyboardInterrupt), warn_on_failure("the picture"):
        raise KeyboardInterrupt


def test_curves_that_cannot_be_drawn_do_not_end_the_run(tmp_path, caplog, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics({"epoch": 1, "loss": 1.0, "lr": 0.1})
    monkeypatch.setattr(Figure, "subplots", lambda *args, **kwargs: 1 / 0)
    folder.draw_curves()
    assert "curves.png is left out (ZeroDivisionError" in caplog.text


def test_a_picture_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.svg"
    save_figure(Figure(), path)
    before = contents(tmp_path)
    assert set(before) == {"a.svg"}

    def full(self, name, **_):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match="cannot write .*a.svg: No space left"):
        save_figure(Figure(), path)
    assert contents(tmp_path) == before


def test_the_report_of_the_demo_does_without_a_picture(tmp_path, caplog):
    assert "img" in embedded(Figure, "all")
    assert "img" not in embedded(tmp_path / "none.png", "curves & more") and "curves" in caplog.text
    assert "(could not be drawn) curves &amp; more" in embedded(lambda: 1 / 0, "curves & more")
