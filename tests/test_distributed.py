"""Pretraining and fine-tuning in two processes (gloo): same results as in one process, and a joint end on failure."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from torch.distributed import run

import train_crossnet_con as pretraining
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from downstream.classification import finetune
from downstream.segmentation import main_partseg, main_semseg
from engine import launch
from engine.checkpoint import load_checkpoint
from engine.task import Run
from models import CrossNet
from tests.robustness.faults import wait_for
from tests.support.comparing import assert_close, metrics
from tests.support.pairs import cloud_path, write_pairs
from tests.support.paths import ROOT
from tests.support.segmentation_sets import write_parts, write_rooms
from tests.support.several import exit_codes, output_of, redirect, run_together, start_together
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import Pretraining
from utils.cli import EXIT_TERMINATED
from utils.errors import UserError

# Two steps of eight pairs.
SHORT = ("--epochs", 1, "--eval_every", 0)


def double(tensors):
    """Make a batch in float64, so that rounding does not hide differences."""
    floats = {k: v.double() for k, v in tensors.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**tensors, **floats}


@contextlib.contextmanager
def float64_runs():
    """Small runs in float64 with short timeouts; forked processes inherit this."""
    inputs_of = Pretraining.inputs_of
    with small_runs() as patch:
        patch.setattr(pretraining, "CrossNet", lambda *args, **kwargs: CrossNet(*args, **kwargs).double())
        patch.setattr(Pretraining, "collate", staticmethod(lambda samples: double(collate_pairs(samples))))
        patch.setattr(
            Pretraining, "inputs_of", lambda self, batch, *, epoch: double(inputs_of(self, batch, epoch=epoch))
        )
        patch.setattr(launch, "BEAT_SECONDS", 0.3)
        patch.setattr(launch, "BEATS_UNTIL_LOST", 200)
        yield patch


@pytest.fixture(autouse=True)
def small():
    with float64_runs():
        yield


def assert_same_runs(ours, theirs, *, tolerance=1e-9):
    """Check that two run folders agree up to the order of sums: weights, statistics, optimizer, scores."""
    ours_last, theirs_last = (load_checkpoint(folder / "last.pth") for folder in (ours, theirs))
    for part in ("point_encoder", "heads_and_image_encoders", "head"):
        if part in theirs_last:
            assert_close(ours_last[part], theirs_last[part], tolerance=tolerance)
    for number, state in theirs_last["optimizer"]["state"].items():
        assert_close(ours_last["optimizer"]["state"][number], state, tolerance=tolerance)
    varying = {"seconds", "waited", "sums"}
    our_progress, their_progress = (
        {k: v for k, v in last["progress"].items() if k not in varying} for last in (ours_last, theirs_last)
    )
    assert our_progress == their_progress
    varying = {"shapes_per_s", "data_wait"}
    records = [[{k: v for k, v in r.items() if k not in varying} for r in metrics(folder)] for folder in (ours, theirs)]
    assert len(records[0]) == len(records[1])
    for found, expected in zip(*records, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


CASES = {
    "con, both": (),
    "con, rgb": ("--image_modality", "rgb"),
    "con, gray": ("--image_modality", "gray"),
    "con, same object masked": ("--mask_same_object",),
    "ave, both": ("--objective", "ave"),
    "ave, rgb": ("--objective", "ave", "--image_modality", "rgb"),
    "ave, gray": ("--objective", "ave", "--image_modality", "gray"),
    "part segmentation": ("--model", "dgcnn_partseg"),
    "semantic segmentation": ("--model", "dgcnn_semseg"),
    "PointNet": ("--model", "pointnet_cls"),
    "workers": ("--workers", 1),
    "accumulated": ("--accumulate", 2),
    "one chunk": ("--chunk_size", 100),
    "accumulated chunks": ("--accumulate", 2, "--chunk_size", 100),
}


@pytest.fixture(scope="module")
def of_two(data_root, tmp_path_factory):
    """Train every case with two processes, started once."""
    out = tmp_path_factory.mktemp("two")

    def main():
        for name, flags in CASES.items():
            pretraining.main(arguments(data_root, out, *SHORT, *flags, "--batch_size", 4, "--exp_name", name))

    with float64_runs():
        run_together(main, out / "logs")
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_with_the_doubled_batch_trains(data_root, of_two, tmp_path, case):
    pretraining.main(arguments(data_root, tmp_path, *SHORT, *CASES[case], "--batch_size", 8))
    assert_same_runs(of_two / case, tmp_path / "crossnet")
    assert {path.name for path in (of_two / case).iterdir()} == {"last.pth", "config.json", "metrics.jsonl", "run.log"}
    assert json.loads((of_two / case / "config.json").read_text())["processes"] == 2


def test_only_the_main_process_writes_to_the_screen(of_two):
    first, second = ((of_two / "logs" / f"{rank}.log").read_text() for rank in range(2))
    assert second == "" and first.count("objects in 2 process(es)") == len(CASES) and "FutureWarning" not in first


def test_without_shared_statistics_the_result_is_another(data_root, of_two, tmp_path):
    run_together(lambda: pretraining.main(arguments(data_root, tmp_path, *SHORT, "--no_sync_bn")), tmp_path)
    ours, theirs = (metrics(folder)[-1]["loss"] for folder in (tmp_path / "crossnet", of_two / "con, both"))
    assert ours != pytest.approx(theirs, rel=1e-3)


PROBED = ("--epochs", 2, "--eval_every", 1, "--save_every", 0)


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """Train in one process without interruption, with probes."""
    out = tmp_path_factory.mktemp("whole")
    with float64_runs():
        pretraining.main(arguments(data_root, out, *PROBED, "--batch_size", 8))
    return out / "crossnet"


def terminate_in(step, rank):
    """SIGTERM to one process in one of its steps."""
    original = Run.step

    def terminating(self, batch):
        if self.progress.step == step and launch.rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    Run.step = terminating


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(data_root, whole, tmp_path, before, after):
    def main(processes, *flags):
        pretraining.main(arguments(data_root, tmp_path, *PROBED, "--batch_size", 8 // processes, *flags))

    def interrupted():
        terminate_in(2, before - 1)
        main(before)

    codes = exit_codes(start_together(interrupted, tmp_path / "logs", before))
    assert codes == [143] * before, output_of(tmp_path / "logs")
    assert output_of(tmp_path / "logs").count("stopped by SIGTERM at step 3") == 1
    assert load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]["step"] == 3
    run_together(lambda: main(after, "--resume"), tmp_path / "logs", after)
    assert_same_runs(tmp_path / "crossnet", whole)
    assert load_checkpoint(tmp_path / "crossnet" / "best.pth")["progress"]["best"] > 0


@pytest.mark.parametrize(
    ("processes", "batch", "message"),
    [
        (1, 4, "--batch_size 8 in 1 process.* there, 4 in 1 here.*global batch of 4, not 8: --batch_size 8 fits"),
        (2, 8, "--batch_size 8 in 1 process.* there, 8 in 2 here.*global batch of 16, not 8: --batch_size 4 fits"),
        (3, 2, "global batch of 6, not 8: 3 processes cannot share it"),
    ],
)
def test_another_global_batch_is_an_error_that_names_what_fits(
    data_root, whole, tmp_path, monkeypatch, processes, batch, message
):
    monkeypatch.setattr("engine.task.world_size", lambda: processes)
    monkeypatch.setattr("engine.resume.world_size", lambda: processes)
    monkeypatch.setattr("engine.task.wrap_ddp", lambda model: model)
    argv = arguments(data_root, tmp_path, *PROBED, "--batch_size", batch, "--resume", whole / "last.pth")
    with pytest.raises(UserError, match=message):
        pretraining.main(argv)


def one_message(folder, codes, message):
    text = output_of(folder)
    assert all(codes) and re.search(message, text), text
    assert text.count("error:") == 1 and "Traceback" not in text, text


def test_an_error_in_all_processes_or_in_one_ends_all_with_one_message(data_root, tmp_path):
    codes = exit_codes(
        start_together(lambda: pretraining.main(arguments(tmp_path / "absent", tmp_path)), tmp_path / "a")
    )
    one_message(tmp_path / "a", codes, "absent does not exist")
    write_pairs(tmp_path / "data", 16)
    broken = cloud_path(tmp_path / "data", ShapeNetRender(tmp_path / "data").ids[3])
    broken.write_text("ply\n")
    strict = arguments(tmp_path / "data", tmp_path, *SHORT, "--strict_data")
    codes = exit_codes(start_together(lambda: pretraining.main(strict), tmp_path / "b"))
    one_message(tmp_path / "b", codes, str(broken))
    codes = exit_codes(start_together(lambda: pretraining.main(["--batch_size", "x"]), tmp_path / "c"))
    assert codes == [2, 2] and output_of(tmp_path / "c").count("error: argument --batch_size") == 1


def test_unreadable_samples_of_all_processes_count_and_stop_all(tmp_path):
    write_pairs(tmp_path / "data", 16)
    broken = cloud_path(tmp_path / "data", ShapeNetRender(tmp_path / "data").ids[3])
    broken.write_text("ply\n")
    codes = exit_codes(
        start_together(lambda: pretraining.main(arguments(tmp_path / "data", tmp_path, *SHORT)), tmp_path / "logs")
    )
    one_message(tmp_path / "logs", codes, f"1 of (8|16) samples could not be read, more than 1 %.*{broken}")
    assert f"skipped: {broken}" in (tmp_path / "crossnet" / "run.log").read_text()


def fail_in_step(how, victim=1):
    """Return what happens to one process in its second step."""
    original = Run.step

    def step(self, batch):
        if self.progress.step == 1 and launch.rank() == victim:
            how()
        return original(self, batch)

    Run.step = step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(data_root, tmp_path, victim):
    def main():
        original = Run.optimizer_step

        def update(self):
            if self.progress.step == 1 and launch.rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self)

        Run.optimizer_step = update
        pretraining.main(arguments(data_root, tmp_path, *SHORT))

    codes = exit_codes(start_together(main, tmp_path / "logs"))
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == launch.EXIT_LOST_PROCESS
    one_message(tmp_path / "logs", codes, "gone.* killed, perhaps for want of memory.* --resume")


def test_a_process_that_torchrun_ends_because_another_is_gone_still_says_so(data_root, tmp_path):
    """This includes a signal that arrives after the loop has failed and before the message is written."""

    def main():
        original = pretraining.train

        def train(run):
            try:
                return original(run)
            except RuntimeError:
                os.kill(os.getpid(), signal.SIGTERM)
                raise

        pretraining.train = train
        fail_in_step(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
        pretraining.main(arguments(data_root, tmp_path, *SHORT))

    codes = exit_codes(start_together(main, tmp_path / "logs"))
    assert codes == [launch.EXIT_LOST_PROCESS, -signal.SIGKILL]
    one_message(tmp_path / "logs", codes, "another process is gone, as process 0 found.* --resume")


def test_a_process_ended_outside_of_training_ends_soon(tmp_path):
    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)  # longer than the test waits

    assert exit_codes(start_together(main, tmp_path / "logs")) == [EXIT_TERMINATED] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_ends_the_other(data_root, tmp_path, monkeypatch, victim):
    """This includes the process that hosts the store, without which nothing answers."""
    monkeypatch.setattr(launch, "BEATS_UNTIL_LOST", 10)

    def main():
        fail_in_step(lambda: os.kill(os.getpid(), signal.SIGSTOP), victim)
        pretraining.main(arguments(data_root, tmp_path, *SHORT))

    processes = start_together(main, tmp_path / "logs")
    assert exit_codes([processes[1 - victim]]) == [launch.EXIT_LOST_PROCESS]
    processes[victim].kill()
    exit_codes(processes)
    one_message(tmp_path / "logs", [1], f"process {victim} has been silent for 3 seconds.* --resume")


def test_the_process_in_which_all_meet_stands_still_at_once(data_root, tmp_path, monkeypatch):
    """It freezes before its first heartbeat, so its store does not answer."""
    monkeypatch.setattr(launch, "BEAT_SECONDS", 1.5)
    monkeypatch.setattr(launch, "BEATS_UNTIL_LOST", 4)

    def main():
        if launch.rank() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        pretraining.main(arguments(data_root, tmp_path, *SHORT))

    processes = start_together(main, tmp_path / "logs")
    processes[1].join(60)
    for process in processes:
        process.kill()
    assert exit_codes(processes) == [-signal.SIGKILL, launch.EXIT_LOST_PROCESS]
    one_message(tmp_path / "logs", [1], "process 0 has been silent for 6 seconds.* --resume")


def test_a_process_that_hangs_ends_the_others_after_the_timeout(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TIMEOUT", launch.timedelta(seconds=6))

    def main():
        fail_in_step(lambda: time.sleep(600))
        pretraining.main(arguments(data_root, tmp_path, *SHORT))

    codes = exit_codes(start_together(main, tmp_path / "logs"))
    assert codes == [launch.EXIT_LOST_PROCESS] * 2
    one_message(tmp_path / "logs", codes, "another process does not answer, as process 0 found")


def torchrun(folder, *argv):
    """Start torchrun in a fork of this process, which spares it the imports; its two processes are fresh ones."""

    def agent():
        redirect(folder / "torchrun.log")
        os.chdir(ROOT)
        run.main(["--standalone", "--nproc_per_node=2", "-m", "tests.support.small_run", *argv])

    process = multiprocessing.get_context("fork").Process(target=agent)
    process.start()
    return process


def test_torchrun_stopped_and_a_rank_killed_loses_nothing(data_root, tmp_path):
    """This is the only test with torchrun; in float32, because its processes do not inherit float64."""
    flags = ("--epochs", 2, "--eval_every", 0, "--save_every", 1, "--batch_size", 1)  # sixteen steps of two pairs
    argv = [*arguments(data_root, tmp_path, *flags), "--resume"]
    log = tmp_path / "crossnet" / "run.log"
    process = torchrun(tmp_path, *argv)
    wait_for(process, log, "step 2/16")
    process.terminate()
    (code,), output = exit_codes([process]), output_of(tmp_path)
    assert code and output.count("stopped by SIGTERM at step") == 1, output
    stopped = load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]["step"]
    assert 2 <= stopped < 8
    process = torchrun(tmp_path, *argv)
    wait_for(process, log, f"step {stopped + 2}/16")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    victim = next(
        int(pid) for pid in children.stdout.split() if b"\0RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()
    )
    os.kill(victim, signal.SIGKILL)
    (code,), output = exit_codes([process]), output_of(tmp_path)
    assert code and code != -signal.SIGKILL, output
    assert output.count("error: another process is gone") == 1 and "--resume" in output, output
    killed = load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]["step"]
    assert killed > stopped
    run_together(lambda: pretraining.main(argv), tmp_path / "logs")
    assert [record["step"] for record in metrics(tmp_path / "crossnet")] == [8, 16]


def fine_tune(root, out, *more):
    flags = "--dataset demo --k 4 --emb_dims 16 --num_points 32 --workers 0 --device cpu --epochs 2 --save_every 1"
    sizes = ["--test_batch_size", "5", "--data_root", str(root), "--output_dir", str(out), "--exp_name", "a"]
    return finetune.main([*flags.split(), *sizes, *map(str, more)])


@pytest.fixture
def fine_tuning_in_float64(monkeypatch):
    start_model, item = finetune.start_model, finetune.Clouds.__getitem__

    def started(*args, **kwargs):
        model, report = start_model(*args, **kwargs)
        return model.double(), report

    monkeypatch.setattr(finetune, "start_model", started)
    monkeypatch.setattr(finetune.Clouds, "__getitem__", lambda self, i: (item(self, i)[0].double(), item(self, i)[1]))


def test_fine_tuning_in_two_processes_is_fine_tuning_in_one(data_root, tmp_path, fine_tuning_in_float64):
    """This includes augmentation, dropout, validation and test."""
    logging.getLogger("crossnet").handlers.clear()
    report = tmp_path / "report.json"
    run_together(lambda: fine_tune(data_root, tmp_path / "two", "--batch_size", 3, "--json", report), tmp_path / "logs")
    (expected,) = fine_tune(data_root, tmp_path / "one", "--batch_size", 6)["runs"]
    assert_same_runs(tmp_path / "two" / "a", tmp_path / "one" / "a", tolerance=1e-7)
    (found,) = json.loads(report.read_text())["runs"]
    assert found["best"] == expected["best"] and found["last"] == expected["last"]
    assert (tmp_path / "two" / "a" / "result.json").exists()
    # Again, and by another number of processes: the finished run gives its result.
    assert fine_tune(data_root, tmp_path / "two", "--batch_size", 6, "--resume")["runs"][0]["last"] == found["last"]


def test_fine_tuned_trained_and_scored_by_two_processes_scores_the_same_in_one(tmp_path):
    """Three passes are split between two processes; confusion matrices are written once."""
    write_parts(tmp_path)
    write_rooms(tmp_path, [f"Area_{area}_{kind}_1" for area in (4, 5) for kind in ("hall", "office")], blocks=3)
    common = f"--data_root {tmp_path} --output_dir {tmp_path} --workers 0 --device cpu --test_batch_size 2".split()
    rooms = ["--protocol", "both", "--train_area", "4"]
    more = {"parts": (main_partseg, ["--votes", "2"]), "rooms": (main_semseg, rooms)}
    small_model = "--k 4 --emb_dims 16 --batch_size 2 --epochs 1 --json".split()

    def main():
        for name, (script, flags) in more.items():
            script.main([*common, *flags, "--exp_name", name, *small_model, str(tmp_path / f"{name}.json")])

    run_together(main, tmp_path / "logs")
    for name, (script, flags) in more.items():
        (record,) = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
        (alone,) = script.main([*common, *flags, "--eval", "--model_path", str(tmp_path / name / "last.pth")])["runs"]
        assert alone["test"] == record["last"]["test"]
    assert (tmp_path / "rooms" / "confusion_rooms.png").exists()


def test_a_run_on_the_cpu_does_not_start_nccl():
    for words, expected in {
        "--device cpu": True,
        "--epochs 1 --device=cpu --deterministic": True,
        "--dev cpu": True,
        "--device cuda": False,
        "--deterministic": False,
        "--device": False,  # refused by the script
        "": False,
    }.items():
        assert launch._asks_for_cpu(words.split()) is expected, words


def test_an_nccl_error_keeps_its_own_text():
    text = "NCCL error in: ProcessGroupNCCL.cpp:1\nncclInvalidUsage\nDuplicate GPU detected : rank 0 and rank 1"
    message, code = launch._explain_failure(torch.distributed.DistBackendError(text))
    assert text in message and "--resume" in message and code == launch.EXIT_LOST_PROCESS
    message, _ = launch._explain_failure(torch.distributed.DistNetworkError("Connection reset by peer"))
    assert "another process is gone" in message
    message, code = launch._explain_failure(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 1 GiB."))
    assert "--chunk_size" in message and code == 2


def test_alone_without_a_launchers_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.started_as_one_of_many()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.started_as_one_of_many()  # a scheduler's variable, but nobody to meet
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert launch.started_as_one_of_many()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launch.started_as_one_of_many()
