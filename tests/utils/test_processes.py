"""Worker processes: results, errors, and a worker that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from tests.support.paths import ROOT
from utils.errors import DataError, UserError
from utils.processes import available_cores, run_jobs

SLEEP = """
import multiprocessing, os, sys, time
sys.path.insert(0, sys.argv[1])
from utils.processes import run_jobs
def work():
    print(os.getpid(), flush=True)
    time.sleep(60)
list(run_jobs(work, [()], workers=1, context=multiprocessing.get_context("fork")))
"""


def quotient(a: int, b: int) -> int:
    if b == 0:
        raise DataError(f"{a} cannot be divided by {b}")
    if b < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return a // b


def test_every_result_is_yielded():
    assert sorted(run_jobs(quotient, [(8, 1), (8, 2), (8, 4)], workers=2)) == [2, 4, 8]


def test_the_error_of_a_job_is_raised():
    with pytest.raises(DataError, match="8 cannot be divided by 0"):
        list(run_jobs(quotient, [(8, 1), (8, 0)], workers=1))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_worker_is_an_error_instead_of_an_endless_wait():
    with pytest.raises(UserError, match="was killed.*fewer --workers"):
        list(run_jobs(quotient, [(8, -1), (8, 1), (8, 2)], workers=2))


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_workers_end_with_a_process_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", SLEEP, str(ROOT)], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.kill()
        try:
            assert process.communicate(timeout=30)[0] == ""  # the worker, too, has closed the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def test_a_worker_that_dies_before_all_jobs_are_handed_over_is_the_same_error(monkeypatch):
    def submit(*_):
        raise BrokenProcessPool("A child process terminated abruptly")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match="was killed.*fewer --workers"):
        list(run_jobs(quotient, [(8, 1)], workers=1))


def test_cores_that_belong_to_other_jobs_do_not_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 128
