import argparse
import json
import math
from dataclasses import dataclass

import pytest
import torch

from engine.config import RunConfig
from utils.cli import (
    CommonSettings,
    flag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    run,
    seed_number,
    workers_flag,
    write_json,
)
from utils.errors import CheckpointError, DataError, UserError
from utils.processes import available_cores


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

    for main, code in ((lambda: {}, 0), (interrupted, 130), (lambda: exit(7), 7), (lambda: ["bad.ply"], 1)):
        with pytest.raises(SystemExit) as caught:
            run(main, failed=bool)
        assert caught.value.code == code
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):  # a defect of ours shows where it is
        run(lambda: 1 / 0)


@dataclass(kw_only=True)
class Example(CommonSettings):
    workers: int = workers_flag()
    zero: int = flag(0, type=int, help="a number")
    switch: bool = flag(False, help="a switch")
    names: list[str] = flag([], nargs="+", help="names, or none")


@dataclass(kw_only=True)
class Another(Example):
    zero: int = flag(1, "--nought", group="numbers", type=int, help="another number")
    one: str | None = flag(group="names", exclusive="name", required=True, help="a name")
    two: str | None = flag(exclusive="name", required=True, help="another name")
    plain: str = "not a flag"


def test_a_field_is_a_flag_that_subclasses_may_declare_again(capsys):
    parser = Another.parser(description="about")
    settings = Another.from_flags(parser.parse_args(["--two", "b", "--nought", "3", "--switch"]))
    assert (settings.zero, settings.one, settings.two, settings.switch) == (3, None, "b", True)
    assert settings.plain == "not a flag"
    assert (settings.device, settings.seed) == ("auto", 1)
    sections = [line for line in parser.format_help().splitlines() if line.endswith(":") and line[0] != " "]
    assert sections == ["options:", "common:", "numbers:", "names:"]
    for wrong in ([], ["--one", "a", "--two", "b"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    assert "one of the arguments --one --two is required" in capsys.readouterr().err


def test_help_shows_defaults_and_line_breaks():
    text = Example.parser(description="first\n  second", prog="x").format_help()
    assert "first\n  second" in text
    for shown in (
        "(default: data)",
        "(default: auto)",
        f"(default: {min(4, available_cores())})",
        "(default: 1)",
        "a number (default: 0)",
    ):
        assert shown in text
    assert not any(word in text for word in ("False", "None", "[]"))


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
    parser = RunConfig.parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--exp_name", name])
    assert "not the name of a folder below --output_dir" in capsys.readouterr().err
    assert parser.parse_args(["--exp_name", "group/run"]).exp_name == "group/run"


def test_going_on_and_starting_again_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        RunConfig.parser().parse_args(["--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_traceback_of_an_error_is_shown_if_asked_for(monkeypatch, capsys):
    def main():
        raise UserError("a.h5 is missing")

    for asked in (False, True):
        monkeypatch.setenv("CROSSNET_TRACEBACK", "1" if asked else "")
        with pytest.raises(SystemExit):
            run(main)
        shown = capsys.readouterr().err
        assert shown.endswith("error: a.h5 is missing\n") and ("Traceback" in shown) == asked
