"""Progress of long jobs where nobody sits at a terminal."""

import sys
import time

import pytest

from tests.support.files import Terminal
from utils import progress as module
from utils.progress import progress


@pytest.fixture
def log(monkeypatch, capsys):
    """Return what is written to standard error, which is not a terminal here; a minute takes 0.05 seconds."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.05)
    return lambda: capsys.readouterr().err


def work(count, seconds, **settings):
    """Return the seconds that it really took."""
    begin = time.monotonic()
    for _ in progress(range(count), text="features", unit="clouds", **settings):
        time.sleep(seconds)
    return time.monotonic() - begin


def test_a_long_job_writes_a_line_now_and_then(log):
    seconds = work(20, 0.02)
    written = log()
    lines = written.splitlines()
    assert 3 <= len(lines) <= seconds / 0.05 + 2
    assert all(line.startswith("features: ") and "of 20 clouds" in line and "left" in line for line in lines)
    counts = [int(line.split()[1]) for line in lines]
    assert counts == sorted(counts) and counts[-1] > 10
    assert "\r" not in written


def test_a_long_item_writes_lines_too(log):
    seconds = work(2, 0.3)
    lines = log().splitlines()
    assert 3 <= len(lines) <= seconds / 0.05 + 2 and sum("0 of 2" in line for line in lines) >= 2


def test_a_job_that_ends_early_stops_writing(log, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.5)  # a busy machine may take 0.05 for what follows
    bar = progress(total=3, text="features", unit="clouds")
    del bar
    for _ in progress(range(3), text="features", unit="clouds"):
        break
    time.sleep(0.8)
    assert log() == ""


def test_a_short_job_writes_nothing(capsys):
    work(3, 0.001)
    assert capsys.readouterr().err == ""


def test_a_hidden_job_writes_nothing(log):
    work(10, 0.02, hidden=True)
    assert log() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(3, 0.001)
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_counts_continue_where_an_earlier_run_stopped(log):
    with progress(total=10, initial=6, text="shapes", unit="shape") as bar:
        for _ in range(4):
            time.sleep(0.04)
            bar.update()
    assert log().splitlines()[0].split()[1] in ("6", "7", "8")
