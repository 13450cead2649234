import argparse
import json
import logging
import math
import os

import pytest
import torch

from utils import cli
from utils.cli import (
    HelpFormatter,
    add_common_arguments,
    add_run_arguments,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    resolve_device,
    run,
    seed_number,
    write_json,
)
from utils.errors import CheckpointError, DataError, UserError


@pytest.mark.parametrize("kind", [UserError, DataError, CheckpointError])
def test_a_users_mistake_is_one_message_and_exit_code_2(kind, capsys):
    def main():
        raise kind("data/x.ply is gone")

    with pytest.raises(SystemExit) as caught:
        run(main)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err) == (2, "", "error: data/x.ply is gone\n")


def test_an_error_of_a_data_worker_is_shown_without_the_traceback_around_it(capsys):
    loader = torch.utils.data.DataLoader(Failing(), num_workers=1)
    with pytest.raises(SystemExit) as caught:
        run(lambda: next(iter(loader)))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: cloud 0 is broken: (DataError: 3)\n"


class Failing(torch.utils.data.Dataset):
    """A data set whose samples cannot be read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise DataError(f"cloud {index} is broken: (DataError: 3)") from error


def test_other_ends_keep_their_exit_code(capsys):
    def interrupted():
        raise KeyboardInterrupt

    for main, code in ((lambda: {}, 0), (interrupted, 130), (lambda: exit(7), 7)):
        with pytest.raises(SystemExit) as caught:
            run(main)
        assert caught.value.code == code
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):  # a defect of ours shows where it is
        run(lambda: 1 / 0)


def test_help_shows_defaults_and_line_breaks():
    parser = argparse.ArgumentParser(prog="x", description="first\n  second", formatter_class=HelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--zero", type=int, default=0, help="a number")
    parser.add_argument("--flag", action="store_true", help="a switch")
    text = parser.format_help()
    assert "first\n  second" in text
    for shown in (
        "(default: data)",
        "(default: auto)",
        f"(default: {min(4, os.cpu_count() or 1)})",
        "(default: 1)",
        "a number (default: 0)",
    ):
        assert shown in text
    assert "False" not in text and "None" not in text


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (positive_int, {"1": 1, "20": 20}, ("0", "-1", "1.5", "x", "")),
        (non_negative_int, {"0": 0, "20": 20}, ("-1", "1.5", "x")),
        (seed_number, {"0": 0, "4294967295": 2**32 - 1}, ("-1", "4294967296", "x")),
        (positive_float, {"1e-3": 1e-3, "1e30": 1e30}, ("0", "-1", "nan", "inf", "x")),
        (non_negative_float, {"0": 0.0, "2.5": 2.5}, ("-0.1", "nan", "inf", "x")),
    ],
)
def test_numbers_on_the_command_line(kind, good, bad, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=kind)
    for text, value in good.items():
        assert parser.parse_args(["--n", text]).n == value
    for text in bad:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--n={text}"])
        assert caught.value.code == 2 and "argument --n: " in capsys.readouterr().err


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    names = ["foo", "", "0", "meta", "hpu", "xla", "mps", "cuda:99", "cpu:x"]
    for name in names if torch.cuda.is_available() else [*names, "cuda"]:
        with pytest.raises(UserError, match=f"--device {name} cannot be used here .*--device cpu") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends a machine with GPUs, and a launcher's variables; returns the GPUs made current."""

    def pretend(count, current=0, **launcher):
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in launcher.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
        monkeypatch.setattr(cli, "_check_that_it_computes", lambda device: None)
        return chosen

    return pretend


TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
ALONE_ON_ITS_NODE = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("current", "launcher", "expected"),
    [
        (0, {}, "cuda:0"),
        (2, {}, "cuda:2"),
        (0, {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, "cuda:0"),
        (0, TORCHRUN, "cuda:1"),
        (0, ALONE_ON_ITS_NODE, "cuda:0"),
        (0, {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, "cuda:1"),
        (0, {"WORLD_SIZE": 8}, "cuda:0"),  # a scheduler's variable: nobody to meet
    ],
)
def test_a_gpu_always_has_an_index_and_becomes_the_current_one(machine, name, current, launcher, expected):
    chosen = machine(4, current, **launcher)
    device = resolve_device(name)
    assert device == torch.device(expected) and chosen == [device.index]


def test_a_gpu_that_is_named_is_taken(machine):
    for launcher in ({}, ALONE_ON_ITS_NODE):
        chosen = machine(2, **launcher)
        assert resolve_device("cuda:1") == torch.device("cuda:1") and chosen == [1]
    chosen = machine(2, **TORCHRUN)
    assert resolve_device("cpu") == torch.device("cpu") and not chosen


def test_processes_on_a_machine_do_not_share_a_gpu(machine):
    machine(4, **TORCHRUN)
    with pytest.raises(UserError, match="4 processes on this machine need a GPU each, it has 4 and --device is cuda:0"):
        resolve_device("cuda:0")
    machine(3, **TORCHRUN)
    with pytest.raises(UserError, match="4 processes .* it has 3 .*--nproc_per_node"):
        resolve_device()


def test_a_launcher_that_does_not_number_the_processes_of_a_machine_is_an_error(machine):
    machine(4, RANK=1, WORLD_SIZE=4)
    with pytest.raises(UserError, match="sets RANK and WORLD_SIZE but not LOCAL_RANK.*torchrun"):
        resolve_device()
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_does_not_take_a_gpu_that_does_not_compute(machine, monkeypatch, caplog):
    def too_old(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    machine(1)
    monkeypatch.setattr(cli, "_check_that_it_computes", too_old)
    with caplog.at_level(logging.WARNING, logger="crossnet"):
        assert resolve_device() == torch.device("cpu")
    assert "no kernel image" in caplog.text and "\nand more" not in caplog.text
    with pytest.raises(UserError, match="--device cuda cannot be used here .*no kernel image.*--device cpu"):
        resolve_device("cuda")
    machine(4, **TORCHRUN)
    monkeypatch.setattr(cli, "_check_that_it_computes", too_old)
    with pytest.raises(UserError, match="--device auto cannot be used here"):  # the others would wait for this process
        resolve_device()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
            "1.00 GiB is free. Process 1 has 7 GiB memory in use."
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_message_that_helps(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.count("\n") == 1 and shown.startswith("error: not enough memory (")
    assert all(word in shown for word in ("--batch_size", "--amp bf16", "--chunk_size"))


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(main)


def test_write_json_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1, "b": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": 1, "b": [1.5, None]}
    (tmp_path / "new" / "a.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*a.json: No space left"):
        write_json(path, {"a": math.pi})
    assert json.loads(path.read_text())["a"] == 1 and [p.name for p in path.parent.iterdir()] == ["a.json"]
    for unwritable in (path / "x.json", tmp_path / "new"):
        with pytest.raises(UserError, match="cannot write"):
            write_json(unwritable, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    write_json(None, {"a": object()})


@pytest.mark.parametrize("name", ["", ".", "..", "../e1", "a/../..", "/tmp/run"])
def test_a_run_name_that_leaves_the_output_folder_is_refused(name, capsys):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, exp_name="crossnet", save_every=1)
    with pytest.raises(SystemExit):
        parser.parse_args(["--exp_name", name])
    assert "no name of a folder below --output_dir" in capsys.readouterr().err
    assert parser.parse_args(["--exp_name", "group/run"]).exp_name == "group/run"


def test_going_on_and_starting_again_exclude_each_other(capsys):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, exp_name="crossnet", save_every=1)
    with pytest.raises(SystemExit):
        parser.parse_args(["--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err
