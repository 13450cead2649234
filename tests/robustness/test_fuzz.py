"""The fuzzer: that it notices each kind of defect, and a few hundred of its files."""

import faulthandler
import os
import random
import signal
import time
import zlib

import pytest

from tests.robustness import fuzz as module
from tests.robustness.fuzz import TARGETS, Target, defects, fuzz, main, mutate
from utils.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("small_runs")
VALID = bytes(range(256))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_end_in_valid_samples_or_in_an_error_that_names_the_file(name, tmp_path):
    outcomes = fuzz(name, TARGETS[name], range(20), seed=1, folder=tmp_path)
    assert [outcome.case for outcome in outcomes] == list(range(20))
    assert defects(outcomes) == []
    assert "refused" in {outcome.kind for outcome in outcomes}


SEED = 3  # with which one of the first six files is bad


def bad(data):
    return data != VALID and zlib.crc32(data) % 6 == 0


def write(root):
    (root / "a.bin").write_bytes(VALID)


def deaf():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)


def swallow():
    try:
        time.sleep(60)
    except Exception:
        time.sleep(60)


def raising(error):
    def act():
        raise error

    return act


def crash():
    faulthandler.disable()  # pytest's would fill the screen, though nothing is wrong
    os.kill(os.getpid(), signal.SIGSEGV)


PLANTED = {
    "crash (-11)": crash,
    "crash (3)": lambda: os._exit(3),
    "hang": swallow,
    "hang, deaf": deaf,
    "memory": lambda: bytearray(b"x" * (module.TOUCHED_MEMORY + (64 << 20))),
    "KeyError": raising(KeyError("x")),
    "UserError": raising(UserError("a.bin")),
    "unnamed": raising(DataError("some file is damaged")),
    "wrong sample": raising(AssertionError("shape (3,)")),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_every_kind_of_defect_is_put_down_to_its_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "GRACE", 4)

    def read(root):
        if bad((root / "a.bin").read_bytes()):
            PLANTED[kind]()

    outcomes = fuzz("planted", Target(write, read), range(6), seed=SEED, folder=tmp_path)
    copy = module.Copy("planted", Target(write, read), tmp_path / "again")
    copy.prepare()
    expected = {}
    for case in range(6):
        path, valid, _ = copy.change(case, SEED)
        expected[case] = kind.split(",")[0] if bad(path.read_bytes()) else "valid"
        path.write_bytes(valid)
    assert {outcome.case: outcome.kind for outcome in outcomes} == expected
    assert list(expected.values()).count("valid") == 5


def test_mutations_follow_from_the_generator_and_change_something():
    changed = {mutate(VALID, VALID[::-1], random.Random(i))[0] for i in range(100)}
    assert changed == {mutate(VALID, VALID[::-1], random.Random(i))[0] for i in range(100)}
    assert len(changed) > 90 and sum(data == VALID for data in changed) <= 1


def test_a_defect_makes_the_command_fail_and_its_file_is_kept(tmp_path, monkeypatch, capsys):
    def read(root):
        if (root / "a.bin").read_bytes() != VALID:
            raise KeyError("planted")

    monkeypatch.setattr(module, "TARGETS", {"planted": Target(write, read)})
    with pytest.raises(UserError, match="3 of 3 files showed a defect"):
        main(["--files", "3", "--only", "planted", "--keep", str(tmp_path / "kept")])
    assert "planted --case 2: KeyError" in capsys.readouterr().out
    assert len(list((tmp_path / "kept").iterdir())) == 3
    with pytest.raises(KeyError, match="planted"):
        main(["--only", "planted", "--case", "2"])
