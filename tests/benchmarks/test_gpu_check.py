"""What can be seen of `make gpu` without a GPU: its end there, its checks on the CPU, its page."""

import functools
import json
import logging
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import dry_run, gpu_check, run_all
from benchmarks.gpu_check import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, SMALL, Report, Row
from models.image import IMAGE_ENCODERS
from tests.support.paths import ROOT
from utils.cli import run
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def report():
    return Report(CPU, sizes=SMALL)


def test_without_triton_or_on_windows_it_says_what_is_missing(tmp_path):
    words = f"""
import os, sys
sys.modules["triton"] = sys.modules["resource"] = None
os.__dict__.pop("getloadavg", None)
from benchmarks import dry_run, gpu_check, measure
from utils.errors import UserError
measure.Path = lambda path: type("NoProc", (), {{"read_text": lambda *_, **__: open("/nowhere")}})
assert measure.machine()["load_average_before"] is None
dry_run.set_device_guard = lambda: None
for action in (measure.resident_megabytes, lambda: gpu_check.main(["--dry", "--output_dir", {str(tmp_path)!r}])):
    try:
        action()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    memory, kernels = done.stdout.splitlines()
    assert "Linux and macOS only; use --device cuda" in memory and "pip install triton" in kernels


def test_a_dry_run_is_quiet_and_leaves_loggers_as_they_were(monkeypatch):
    project, levels = logging.getLogger("crossnet"), []

    def outcomes(chosen, root):
        levels.append(project.level)
        yield chosen[0], "", []

    before = project.level
    monkeypatch.setattr(dry_run, "outcomes", outcomes)
    assert dry_run.main(["--only", str(dry_run.cases()[0])])
    assert levels == [logging.ERROR] and project.level == before


def test_a_dry_run_of_nothing_does_not_pass():
    with pytest.raises(UserError, match="no case has --only 'dgcnn_csl' in its name; one is called 'pretraining, "):
        dry_run.main(["--only", "dgcnn_csl"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: gpu_check.main(["--output_dir", str(tmp_path / "gpu")]))
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and "--device cuda cannot be used here" in shown and "GPU_ARGS=--dry" in shown
    assert not (tmp_path / "gpu").exists()


def test_the_kernels_check_passes_and_notices_a_wrong_form(report, monkeypatch):
    gpu_check.check_kernels(report)
    plain, triton, own = report.rows
    assert plain.status == PASS and "gradient of W" in plain.detail
    assert triton.status == own.status == NOT_APPLICABLE
    real = gpu_check.edge_conv
    wrong = {torch.float32: 1.01, torch.float64: 1}
    monkeypatch.setattr(gpu_check, "edge_conv", lambda x, *args, **named: wrong[x.dtype] * real(x, *args, **named))
    report.check("kernels", "wrong", lambda: gpu_check.kernels_agree(CPU, SMALL, "torch"))
    assert report.rows[-1].status == FAIL and "above" in report.rows[-1].detail


@pytest.mark.parametrize(("amp", "variant"), [("off", "plain"), ("off", "chunks"), ("bf16", "channels_last")])
def test_a_step_agrees_with_float64_and_a_wrong_one_does_not(monkeypatch, amp, variant):
    monkeypatch.setitem(IMAGE_ENCODERS, "resnet18", dry_run.TinyImageNet)
    sizes = {"device": CPU, "sizes": SMALL}
    exact = gpu_check.one_step(
        "dgcnn_cls", amp="off", variant=variant if variant == "chunks" else "plain", dtype=torch.float64, **sizes
    )
    step = {"amp": amp, "variant": variant, **sizes}
    assert "cosine" in gpu_check.compare_step("dgcnn_cls", exact=exact, **step)
    for wrong in ((exact[0] * 1.2, exact[1]), (exact[0], exact[1].roll(1))):
        with pytest.raises(gpu_check.Deviation, match="cosine of gradients"):
            gpu_check.compare_step("dgcnn_cls", exact=wrong, **step)


def test_steps_are_compared_without_tf32_in_convolutions(monkeypatch):
    allowed = []

    def one_step(*_, **__):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return 1.0, torch.ones(3, dtype=torch.float64)

    monkeypatch.setattr(gpu_check, "one_step", one_step)
    exact = (1.0, torch.ones(3, dtype=torch.float64))
    gpu_check.compare_step("pointnet_cls", amp="off", variant="plain", device=CPU, sizes=SMALL, exact=exact)
    assert [*allowed, torch.backends.cudnn.allow_tf32] == [False, True]


def test_gradients_in_half_precision_do_not_overflow():
    sizes = {"device": CPU, "dtype": torch.float32, "sizes": SMALL}
    _, gradients = gpu_check.one_step("pointnet_cls", amp="fp16", variant="plain", **sizes)
    assert gradients.isfinite().all()


def test_a_gpu_that_has_failed_makes_every_training_row_fail_but_the_report_is_written(report, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "manual_seed", broken)
    gpu_check.check_training(report)
    assert {row.status for row in report.rows} == {FAIL, NOT_APPLICABLE}


def test_every_training_row_is_there(report, monkeypatch):
    monkeypatch.setattr(gpu_check, "one_step", lambda *_, **__: (1.0, torch.ones(3, dtype=torch.float64)))
    gpu_check.check_training(report)
    assert len(report.rows) == 5 * 3 * 4
    assert {row.status for row in report.rows} == {PASS, NOT_APPLICABLE}
    assert all(row.status == (NOT_APPLICABLE if "compile" in row.name else PASS) for row in report.rows)


def test_speed_is_measured_by_stage(monkeypatch):
    monkeypatch.setitem(IMAGE_ENCODERS, "resnet18", dry_run.TinyImageNet)
    found = gpu_check.measure_speed(CPU, SMALL, "off", repeats=1)
    assert found["shapes_per_s"] > 0 and found["hours"] > 0
    stages = ("augmentation", "point encoder", "image encoders", "loss", "backward pass", "optimizer")
    assert tuple(found["stages_ms"]) == stages and all(found["stages_ms"].values())


def test_versions_and_runs_without_a_gpu(report):
    gpu_check.check_environment(report)
    gpu_check.check_runs(report)
    assert [row.status for row in report.rows] == [PASS, *[NOT_APPLICABLE] * 4]
    assert torch.__version__ in report.rows[0].detail


def test_a_check_without_time_is_not_run_and_does_not_pass(tmp_path, monkeypatch):
    late = Report(CPU, sizes=SMALL, seconds=-1)
    late.check("group", "name", lambda: "")
    late.check("group", "for a GPU", lambda: "", on_gpu=True)
    assert [row.status for row in late.rows] == [NOT_RUN, NOT_APPLICABLE] and "the time is over" in late.rows[0].detail
    monkeypatch.setattr(gpu_check, "resolve_device", lambda name: CPU)
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["--only", "environment", "--minutes", "1e-9", "--output_dir", str(tmp_path)])
    assert caught.value.code == 1 and json.loads((tmp_path / "report.json").read_text())["counts"][NOT_RUN] == 1


def test_a_report_that_could_not_be_written_ends_before_the_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "resolve_device", lambda name: CPU)
    monkeypatch.setattr(gpu_check, "CHECKS", {"environment": lambda report: pytest.fail("a check began")})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        gpu_check.main(["--only", "environment", "--output_dir", str(tmp_path / "file" / "gpu")])


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_a_fallback_to_slower_operations_fails_the_check_in_which_it_happens(report, level, request):
    project = logging.getLogger("crossnet")
    request.addfinalizer(functools.partial(project.setLevel, project.level))
    project.setLevel(level)

    def falls_back():
        logging.getLogger("crossnet.kernels").warning("using PyTorch operations: no compiler here")
        return "fine"

    report.check("speed", "slow", falls_back)
    report.check("speed", "as before", lambda: "fine")
    assert [row.status for row in report.rows] == [FAIL, PASS] and "no compiler here" in report.rows[0].detail


def test_a_command_that_takes_too_long_is_ended(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.command_output([sys.executable, "-S", "-c", "import time; time.sleep(60)"], 0.1)
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_the_suite_hides_gpus_from_all_but_the_tests_that_the_check_runs():
    text = "import tests.conftest, os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'not set'))"
    command = [sys.executable, "-c", text]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_VISIBLE_DEVICES", "CROSSNET_TEST_GPU"):
            patch.delenv(name, raising=False)
        assert gpu_check.command_output(command, 100) == ""
        assert gpu_check.command_output(command, 100, env={"CROSSNET_TEST_GPU": "1"}) == "not set"


def test_runs_take_the_gpu_that_is_checked(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_check, "command_output", lambda command, seconds: commands.append(command) or "")
    monkeypatch.setattr(gpu_check, "stop_and_resume", lambda out, *, more: commands.append(list(more)) or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu_check.check_runs(Report(torch.device("cuda", 1), sizes=SMALL))
    devices = [[word for word in command if word.startswith("cuda")][-1] for command in commands]
    assert devices == ["cuda:1", "cuda:1", "cuda"]


def test_a_run_is_stopped_and_resumed(tmp_path):
    small = "--device cpu --num_points 24 --k 4 --emb_dims 16 --image_size 16 --batch_size 8 --workers 0".split()
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("\n".join(dry_run.ShapeNetRender(str(gpu_check.DEMO)).ids[:16]))
    script = ("-m", "tests.support.small_run")  # with a small image network
    found = gpu_check.stop_and_resume(tmp_path, script=script, more=(*small, "--list", str(shapes)), seconds=400)
    assert "8 epochs" in found


def test_the_page_shows_every_row(tmp_path):
    rows = [Row("a", "x", PASS, "fine", 1.0), Row("a", "<y>", FAIL, "1 < 2"), Row("b", "z", NOT_APPLICABLE, "1 GPU")]
    page = gpu_check.write_report(tmp_path, rows, title="a card", numbers={"n": 1}, about={"commit": "abc"})
    text = page.read_text()
    assert "1 PASS, 1 FAIL, 0 NOT RUN, 1 not applicable" in text and "&lt;y&gt;" in text and "1 &lt; 2" in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert [row["status"] for row in found["rows"]] == [PASS, FAIL, NOT_APPLICABLE] and found["commit"] == "abc"


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("a tensor is copied", 1)])
def test_a_dry_run_writes_the_same_page(tmp_path, monkeypatch, problem, code):
    monkeypatch.setattr(dry_run, "cases", lambda: [dry_run.Case("pretraining", "pointnet_cls", "off", "torch")])
    monkeypatch.setattr(dry_run, "set_device_guard", lambda: None)
    monkeypatch.setattr(dry_run, "outcome", lambda *_: problem)
    with pytest.raises(SystemExit) as caught:
        run(lambda: gpu_check.main(["--dry", "--output_dir", str(tmp_path)]))
    assert caught.value.code == code
    assert json.loads((tmp_path / "report.json").read_text())["counts"][FAIL] == code


def test_benchmarks_on_a_gpu_begin_with_the_check(tmp_path, monkeypatch):
    commands = []

    def fails(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(UserError, match="the GPU fails a check: see .*report.html"):
        run_all.main(["--output_dir", str(tmp_path)])
    assert len(commands) == 1 and "benchmarks.gpu_check" in commands[0]
