r"""Break runs on purpose, again and again, and check that nothing is lost.

Each fault trains a tiny model on tiny pairs (12 steps, 3 epochs, a checkpoint every 2 steps, two probes), breaks it at
a random moment, resumes it, and compares the end with that of an uninterrupted run: weights, optimizer, scores and
metrics must be the same bit for bit. What should be refused must end with one message and change nothing.

commands:
  python -m tests.robustness.faults --repeat 20 --json faults.json
  python -m tests.robustness.faults --only sigkill_in_save --repeat 100 --seed 2
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import engine.checkpoint
import engine.resume
import train_crossnet_con
from data.unpack import unpack
from datasets.shapenet_render import ShapeNetRender
from downstream.classification import finetune
from downstream.classification import main as classification
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.run_folder import CHECKPOINTS
from engine.task import Run
from tests.data.test_unpack import UNSAFE
from tests.robustness.fuzz import mutate
from tests.support.comparing import equal, metrics
from tests.support.files import contents
from tests.support.pairs import cloud_path, view_path, write_demo_set, write_pairs
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import main
from utils.cli import EXIT_TERMINATED, EXIT_USER_ERROR, HelpFormatter, positive_int, run, write_json
from utils.errors import DamagedCheckpointError, DataError, UserError

# Three epochs of four steps, probed after the second and the last.
REFERENCE = ("--epochs", "3", "--save_every", "2", "--eval_every", "2")
STEPS = 12
SPEED = {"shapes_per_s", "data_wait"}


# --- the uninterrupted run, and what is compared with it ---


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without the fields that differ from run to run."""
    return [{key: value for key, value in record.items() if key not in SPEED} for record in records]


def same_end(folder: Path, reference: Path) -> None:
    """Check that a run ended bit for bit as the uninterrupted one, and left no temporary file."""
    for name in ("last.pth", "best.pth"):
        ours, theirs = load_checkpoint(folder / name), load_checkpoint(reference / name)
        for part in ("point_encoder", "heads_and_image_encoders", "optimizer", "scaler", "random"):
            assert equal(ours[part], theirs[part]), (name, part)
        for progress in (ours["progress"], theirs["progress"]):
            del progress["seconds"], progress["waited"]
        assert ours["progress"] == theirs["progress"]
    assert without_speed(metrics(folder)) == without_speed(metrics(reference))
    assert not list(folder.glob("*.tmp"))


def _train(script: Callable[[list[str]], Any], argv: list[str], harm: Callable[[], None] | None, output: Path) -> None:
    """Run in a separate process, with its output in a file."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115 - until the process ends
    os.dup2(sys.stdout.fileno(), 2)
    logging.getLogger().handlers.clear()
    with small_runs():
        if harm:
            harm()
        run(lambda: script(argv))


def screen(out: Path) -> Path:
    """Return the file for the console output of a folder's runs."""
    return out.with_suffix(".txt")


def remove(out: Path) -> None:
    """Empty a folder, which may be a mounted disk."""
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def in_child(function: Callable[..., None], *args: Any) -> int:
    """Call a function in a forked process; return its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


class Place:
    """Data, an uninterrupted run on it, and folders for runs that are broken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.count = folder, folder / "data", 0
        write_pairs(self.root, 16, unpaired=1)
        write_demo_set(self.root)
        self.reference = self.new() / "crossnet"
        assert self.train(self.reference.parent) == 0, self.output(self.reference.parent)
        self.size = (self.reference / "best.pth").stat().st_size

    def new(self) -> Path:
        """Make a folder for a run."""
        self.count += 1
        path = self.folder / f"try{self.count}"
        path.mkdir()
        return path

    def copy(self) -> Path:
        """Make a folder with the finished run."""
        out = self.new()
        shutil.copytree(self.reference, out / "crossnet")
        return out

    def arguments(self, out: Path, *more: Any) -> list[str]:
        """Return the command line of a run."""
        return arguments(self.root, out, *REFERENCE, *more)

    def train(self, out: Path, *more: Any, harm: Callable[[], None] | None = None) -> int:
        """Call ``harm`` in a process and run the script in it; return its exit code."""
        return in_child(_train, main, self.arguments(out, *more), harm, screen(out))

    def output(self, out: Path) -> str:
        """Return the console output of the runs in a folder."""
        return screen(out).read_text()

    def finish(self, out: Path, *more: Any) -> None:
        """Resume, compare the end with the uninterrupted run, and clean up."""
        screen(out).unlink(missing_ok=True)  # data workers that were orphaned may complain there
        assert self.train(out, *(more or ("--resume",))) == 0, self.output(out)
        same_end(out / "crossnet", self.reference)
        assert "Traceback" not in self.output(out), self.output(out)
        remove(out)


# --- the faults; each tries once, at a moment that the generator chooses ---


def die() -> None:
    """End this process as the memory killer, kill -9 or a power cut do."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return a function that makes a step call ``act`` between its forward and its backward pass."""

    def harm() -> None:
        original = Run.optimizer_step

        def update(self: Run) -> None:
            if self.progress.step == step:
                act()
            original(self)

        Run.optimizer_step = update

    return harm


def sigkill_in_step(place: Place, rng: random.Random) -> None:
    """SIGKILL in the middle of a step, up to three times in one run."""
    out = place.new()
    for step in sorted(rng.sample(range(STEPS), rng.randint(1, 3))):
        assert place.train(out, "--resume", harm=at_step(step, die)) == -signal.SIGKILL
        assert step < 4 or len(metrics(out / "crossnet")) == step // 4
    place.finish(out)


class _DyingFile(io.FileIO):
    """A file whose process is killed after a given number of bytes is written."""

    left = 0

    def write(self, data: Any) -> int:
        """Write, or write the beginning and die."""
        data = memoryview(data).cast("B")
        if self.left < len(data):
            super().write(data[: self.left])
            die()
        self.left -= len(data)
        return super().write(data)


def _note_saves(journal: Path) -> None:
    """Record every save that has returned."""

    def save(path: Path, payload: dict[str, Any], keep: Path | None) -> None:
        save_checkpoint(path, payload, keep=keep)
        with open(journal, "a") as file:
            file.write(f"{path.name} {payload['progress']['step']}\n")

    engine.resume.save_checkpoint = save


def nothing_half_written(out: Path) -> None:
    """Check that every checkpoint is intact, and not older than the last one reported as saved."""
    journal = out / "journal"
    saved = dict(line.split() for line in journal.read_text().splitlines()) if journal.exists() else {}
    for name, step in saved.items():
        assert load_checkpoint(out / "crossnet" / name)["progress"]["step"] >= int(step)


def sigkill_in_save(place: Place, rng: random.Random) -> None:
    """SIGKILL when a random number of bytes of a random checkpoint are written."""
    out = place.new()
    nth, after = rng.randrange(7), int(rng.random() * 0.95 * place.size)

    def harm() -> None:
        opened = iter(range(100))

        def dying_open(path: Path, mode: str) -> Any:
            if next(opened) != nth:
                return open(path, mode)
            file = _DyingFile(path, mode)
            file.left = after
            return file

        _note_saves(out / "journal")
        engine.checkpoint.open = dying_open

    assert place.train(out, harm=harm) == -signal.SIGKILL
    assert list((out / "crossnet").glob("*.pth.tmp"))
    nothing_half_written(out)
    place.finish(out)


def sigkill_around_replace(place: Place, rng: random.Random) -> None:
    """SIGKILL when a checkpoint is written but not yet in its place, or just is; also the one before it."""
    out = place.new()
    nth, when = rng.randrange(7), rng.choice(("fsync", "before", "after"))

    def harm() -> None:
        replace, fsync = os.replace, os.fsync
        seen = iter(range(100))

        def dying_replace(source: Path, target: Path) -> None:
            now = Path(target).suffix == ".pth" and when != "fsync" and next(seen) == nth
            if now and when == "before":
                die()
            replace(source, target)
            if now:
                die()

        def dying_fsync(number: int) -> None:
            if when == "fsync" and next(seen) == nth:
                die()
            fsync(number)

        _note_saves(out / "journal")
        os.replace, os.fsync = dying_replace, dying_fsync

    assert place.train(out, harm=harm) == -signal.SIGKILL
    nothing_half_written(out)
    place.finish(out)


def _save_for_ever(path: Path) -> None:
    for version in range(10**9):
        save_checkpoint(path, {"version": version, "values": torch.full((1000, 100), float(version))})


def sigkill_while_saving(place: Place, rng: random.Random) -> None:
    """SIGKILL from outside, at a random time, of a process that does nothing but save."""
    out = place.new()
    path = out / "last.pth"
    process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(path,))
    process.start()
    while not path.exists():
        time.sleep(0.001)
    time.sleep(0.05 * rng.random())
    process.kill()
    process.join()
    payload = load_checkpoint(path)
    assert (payload["values"] == payload["version"]).all()
    shutil.rmtree(out)


def wait_for(process: BaseProcess, file: Path, text: str) -> None:
    """Wait until a running process has written ``text`` to a file."""
    give_up = time.monotonic() + 500
    while time.monotonic() < give_up and process.is_alive():
        if file.exists() and text in file.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"{file} never said {text!r}; exit code of the process: {process.exitcode}")


def sigkill_from_outside(place: Place, rng: random.Random) -> None:
    """SIGKILL from outside while data workers read, at a random time after the first steps."""
    out = place.new()
    argv = place.arguments(out, "--workers", 2)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_train, args=(main, argv, None, screen(out)))
    process.start()
    wait_for(process, out / "crossnet" / "run.log", f"step {rng.randint(1, STEPS - 2)}/{STEPS}")
    time.sleep(0.02 * rng.random())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    place.finish(out)


def sigterm(place: Place, rng: random.Random) -> None:
    """SIGTERM in the middle of a step: the run saves, says how to resume, and ends with code 143."""
    out = place.new()
    step = rng.randrange(STEPS - 1)
    harm = at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert place.train(out, harm=harm) == EXIT_TERMINATED, place.output(out)
    assert "stopped by SIGTERM" in place.output(out)
    assert load_checkpoint(out / "crossnet" / "last.pth")["progress"]["step"] == step + 1
    place.finish(out)


def worker_killed(place: Place, rng: random.Random) -> None:
    """SIGKILL of one data worker, as by the system's memory killer."""
    out = place.new()
    which = rng.randrange(2)
    harm = at_step(rng.randrange(STEPS - 1), lambda: multiprocessing.active_children()[which].kill())
    assert place.train(out, "--workers", 2, harm=harm) == EXIT_USER_ERROR, place.output(out)
    assert "error: a process that reads data is gone" in place.output(out), place.output(out)
    place.finish(out)


_SHARED_MEMORY = Path("/dev/shm")
_NEW_NAMESPACES = 0x00020000 | 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_REMOUNT = 32


def _small_disk(folder: Path, size: int) -> Callable[[int], None]:
    """Mount a disk of ``size`` bytes that only this process sees; return a function that changes its size.

    Raises:
        PermissionError: this system does not let a process do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NAMESPACES):
        raise PermissionError("no user namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)

    def mount(size: int, flags: int = _REMOUNT) -> None:
        options = f"size={size}".encode()
        if libc.mount(b"none", bytes(folder), b"tmpfs", flags, options):
            raise PermissionError(f"no mount: {os.strerror(ctypes.get_errno())}")

    mount(size, 0)
    return mount


NOT_PERMITTED = 77


def _train_until_full(place: Place, out: Path, disk: Path, size: int, flags: Sequence[Any]) -> None:
    """Train until the disk is full, enlarge it, resume; in a process that alone sees the small disk."""
    try:
        resize = _small_disk(disk, size)
    except PermissionError:
        sys.exit(NOT_PERMITTED)
    code = place.train(out, *flags)
    if code == 0:
        sys.exit(0)  # it was large enough
    said = place.output(out)
    assert code == EXIT_USER_ERROR, said
    if disk == _SHARED_MEMORY:
        assert "error: a process that reads data" in said and "/dev/shm" in said, said
    for path in (out / "crossnet").glob("*.pth"):
        load_checkpoint(path)
    assert not list((out / "crossnet").glob("*.pth.tmp"))
    resize(64 << 20)
    place.finish(out, "--resume", *flags)


def _fill(place: Place, out: Path, disk: Path, size: int, *flags: Any) -> None:
    """Run with a disk of ``size`` bytes, then with a large one, in a separate process."""
    code = in_child(_train_until_full, place, out, disk, size, flags)
    if code == NOT_PERMITTED:
        raise NotImplementedError("this system does not let a process mount a small disk")
    assert code == 0, f"{disk} of {size} bytes: {place.output(out)}"
    shutil.rmtree(out)


def disk_full(place: Place, rng: random.Random) -> None:
    """Fill the disk at a random moment, then free it."""
    out = place.new()
    _fill(place, out, out, int(place.size * rng.uniform(0.02, 3)))


SHAPES = 120


def _many_pairs(place: Place) -> tuple[Path, list[str]]:
    """Write a larger set, of which less than 1 % may be bad; return its folder and ids."""
    root = place.folder / "many"
    if not root.exists():
        write_pairs(root, SHAPES, points=24, views=1)
    return root, ShapeNetRender(root).ids


def _unreadable(path: Path) -> None:
    """Make reading a path an input/output error, as a bad sector does."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


_DAMAGE: tuple[Callable[[Path], Any], ...] = (
    _unreadable,
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
)


def shared_memory_full(place: Place, rng: random.Random) -> None:
    """Give the run a /dev/shm of a random size, then a larger one."""
    _fill(place, place.new(), _SHARED_MEMORY, 4096 * rng.randint(2, 40), "--workers", 2)


@contextlib.contextmanager
def restored(files: Iterable[Path]) -> Iterator[None]:
    """Put files back as they were, whatever happens to them inside."""
    kept = {path: path.read_bytes() for path in files}
    try:
        yield
    finally:
        for path, content in kept.items():
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def bad_sample(place: Place, rng: random.Random) -> None:
    """One of 120 samples cannot be read: it is skipped, counted and named; with --strict_data the run stops."""
    root, ids = _many_pairs(place)
    out = place.new()
    name = rng.choice(ids[1:])
    files = [cloud_path(root, name)] if rng.random() < 0.5 else sorted(view_path(root, name).parent.glob("*.png"))
    damage = rng.choice(_DAMAGE)

    def harm() -> None:
        original = train_crossnet_con.train

        def train(run: Run) -> dict[str, Any]:
            for path in files:
                damage(path)  # after the start, which looks which files there are
            return original(run)

        train_crossnet_con.train = train

    flags = ("--data_root", root, "--epochs", 1, "--eval_every", 0, "--batch_size", 8, "--workers", 1)
    with restored(files):
        code = place.train(out, *flags, harm=harm)
    assert code == 0, place.output(out)
    log = (out / "crossnet" / "run.log").read_text()
    skipped = [line for line in log.splitlines() if "skipped: " in line]
    assert len(skipped) == 1 and name in skipped[0], log
    assert load_checkpoint(out / "crossnet" / "last.pth")["progress"]["bad"] == 1
    with restored(files):
        assert place.train(out, *flags, "--strict_data", "--overwrite", harm=harm) == EXIT_USER_ERROR
    assert name in place.output(out).split("error: ")[1]
    shutil.rmtree(out)


def many_bad_samples(place: Place, rng: random.Random) -> None:
    """More than 1 % of the samples cannot be read: the run stops and names one."""
    root, ids = _many_pairs(place)
    out = place.new()
    names = rng.sample(ids[8:], 3)
    files = [cloud_path(root, name) for name in names]
    with restored(files):
        for path in files:
            rng.choice(_DAMAGE[:3])(path)
        flags = ("--data_root", root, "--epochs", 1, "--eval_every", 0, "--batch_size", 8)
        assert place.train(out, *flags) == EXIT_USER_ERROR
    message = place.output(out).split("error: ")[1]
    assert "more than 1 %" in message and any(name in message for name in names)
    shutil.rmtree(out)


def damaged_checkpoint(place: Place, rng: random.Random) -> None:
    """Damage the newest checkpoint, or the two newest, or all: the newest intact one is used, if any."""
    out = place.copy()
    folder = out / "crossnet"
    names = CHECKPOINTS[: rng.randint(1, 3)]
    for path in (folder / name for name in names):
        whole = path.read_bytes()
        while (changed := mutate(whole, rng.randbytes(1000), rng)[0]) == whole or still_reads(path, changed):
            pass  # the zip format has bytes that nobody reads
    before = contents(folder)
    if names == CHECKPOINTS:
        assert place.train(out, "--resume") == EXIT_USER_ERROR
        assert "are damaged; start over with --overwrite" in place.output(out).split("error: ")[1]
        assert contents(folder) == before
        place.finish(out, "--overwrite")
        return
    assert place.train(out, "--resume") == 0, place.output(out)
    for name in names:
        assert f"{name} is damaged" in place.output(out)
        assert (folder / f"{name}.damaged").read_bytes() == before[name]
    same_end(folder, place.reference)
    remove(out)


def still_reads(path: Path, changed: bytes) -> bool:
    """Write changed bytes to a checkpoint; return whether it can still be read (and then holds the same)."""
    before = load_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(changed)
    try:
        assert equal(load_checkpoint(path), before), "a damaged checkpoint was read as another one"
    except DamagedCheckpointError:
        return False
    path.write_bytes(whole)
    return True


def lost_checkpoint(place: Place, rng: random.Random) -> None:
    """last.pth is gone, or previous.pth too; other files of the run may be gone or cut off."""
    out = place.copy()
    folder = out / "crossnet"
    for name in CHECKPOINTS[: rng.randint(1, 2)]:
        (folder / name).unlink()
    if rng.random() < 0.5:
        (folder / "config.json").unlink()
    if rng.random() < 0.5:
        (folder / "run.log").unlink()
    # A line that was being written when the power failed.
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + text[: rng.randrange(1, 40)])
    place.finish(out)


def leftovers(place: Place, rng: random.Random) -> None:
    """Temporary files of an earlier crash, whole or not, are never taken for the real ones."""
    out = place.new()
    assert place.train(out, harm=at_step(rng.randrange(2, STEPS), die)) == -signal.SIGKILL
    whole = (place.reference / "last.pth").read_bytes()
    for name in ("last.pth", "best.pth"):
        (out / "crossnet" / f"{name}.tmp").write_bytes(whole[: rng.choice((0, rng.randrange(len(whole)), len(whole)))])
    (out / "crossnet" / "metrics.jsonl.tmp").write_text("{")
    place.finish(out)


class Bomb:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickle_bomb(place: Place, rng: random.Random) -> None:
    """Code in a checkpoint, at each place where one is read: refused, never run, nothing changed."""
    out = place.copy()
    marker, bomb = out / "ran", out / "bomb.pth"
    payload = load_checkpoint(place.reference / "last.pth")
    payload[rng.choice(list(payload))] = Bomb(marker)
    form = rng.choice(("zip", "older", "pickle"))
    if form == "pickle":
        bomb.write_bytes(pickle.dumps({"a": Bomb(marker)}, protocol=rng.choice((0, 2, 4, 5))))
    else:
        torch.save(payload, bomb, _use_new_zipfile_serialization=form == "zip")
    for name in CHECKPOINTS:  # a bare pickle is not a checkpoint that an older one may replace
        shutil.copy(bomb, out / "crossnet" / name)
    common = ["--device", "cpu", "--data_root", str(place.root), "--dataset", "demo"]
    tuning = ["--workers", "0", "--output_dir", str(out), "--exp_name", "tuned"]
    readers = (
        (main, place.arguments(out, "--resume")),
        (main, place.arguments(out, "--exp_name", "new", "--model_path", bomb)),
        (classification.main, [*common, "--model_path", str(bomb), "--num_points", "24"]),
        (finetune.main, [*common, *tuning, "--pretrain_path", str(bomb), "--num_points", "24"]),
        (finetune.main, [*common, *tuning, "--eval", "--model_path", str(bomb), "--num_points", "24"]),
    )
    for script, argv in readers:
        screen(out).unlink(missing_ok=True)
        before = contents(out / "crossnet")
        assert in_child(_train, script, argv, None, screen(out)) == EXIT_USER_ERROR, place.output(out)
        text = place.output(out)
        assert "is refused: it holds objects other than tensors" in text or form == "pickle", text
        assert "bomb.pth is" in text or "last.pth is" in text
        assert text.count("error: ") == 1 and "Traceback" not in text, text
        assert not marker.exists() and contents(out / "crossnet") == before
    shutil.rmtree(out)


def unsafe_archive(place: Place, rng: random.Random) -> None:
    """Unpack archives with '..', an absolute name, a link or a device: refused, and nothing is installed."""
    out = place.new()
    for make, members, _ in UNSAFE.values():
        archive = make(out / "archive", {f"ShapeNet/02691156/{rng.random()}.ply": b"x", **members})
        before = contents(out)
        try:
            unpack(archive, out / "root")
            raise AssertionError(f"{list(members)} was unpacked")
        except DataError as error:
            assert str(archive) in str(error)
        shutil.rmtree(out / "root")
        assert contents(out) == before
    shutil.rmtree(out)


# Each fault, and what it costs the user.
SINCE = "nothing but the steps since the last checkpoint, which are repeated bit for bit"
FAULTS: dict[str, tuple[Callable[[Place, random.Random], None], str]] = {
    function.__name__: (function, lost)
    for function, lost in (
        (sigkill_in_step, SINCE),
        (sigkill_in_save, SINCE),
        (sigkill_around_replace, SINCE),
        (sigkill_while_saving, "nothing that was saved"),
        (sigkill_from_outside, SINCE),
        (sigterm, "nothing"),
        (worker_killed, SINCE),
        (disk_full, SINCE),
        (shared_memory_full, SINCE),
        (bad_sample, "the sample"),
        (many_bad_samples, "nothing; the run stops"),
        (damaged_checkpoint, "the steps since the newest intact checkpoint, which are repeated bit for bit"),
        (lost_checkpoint, "the steps since the newest checkpoint left, which are repeated bit for bit"),
        (leftovers, SINCE),
        (pickle_bomb, "nothing; refused"),
        (unsafe_archive, "nothing; refused"),
    )
}


def try_fault(name: str, place: Place, number: int, seed: int) -> None:
    """Try a fault once; what happens follows from its name, number and seed.

    Raises:
        AssertionError: something was lost.
        NotImplementedError: this system does not allow the experiment.
    """
    FAULTS[name][0](place, random.Random(f"{seed} {name} {number}"))


def break_runs(names: list[str], folder: Path, *, repeat: int, seed: int) -> dict[str, dict[str, Any]]:
    """Try faults many times.

    Returns:
        For each: what it is, tries, failures, seconds, and what a user loses.
    """
    place = Place(folder)
    results = {}
    for name in names:
        function, lost = FAULTS[name]
        begun, failed, done = time.perf_counter(), 0, 0
        for number in range(repeat):
            try:
                try_fault(name, place, number, seed)
                done += 1
            except NotImplementedError as error:
                lost = f"not tried: {error}"
                break
            except Exception:
                done, failed = done + 1, failed + 1
                print(f"{name}, try {number}:\n{traceback.format_exc()}", file=sys.stderr)
        results[name] = {
            "fault": function.__doc__.splitlines()[0],
            "tries": done,
            "failed": failed,
            "seconds": round(time.perf_counter() - begun, 1),
            "lost": lost,
        }
        print(f"{name:<24}{done:>5} tries{failed:>5} failed   lost: {lost}", flush=True)
    return results


def parse_args(
    argv: list[str] | None, *, command: str, description: str, faults: Iterable[str], repeat: int
) -> argparse.Namespace:
    """Read the command line of a command that tries faults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.robustness.{command}", description=description, formatter_class=HelpFormatter
    )
    parser.add_argument("--repeat", type=positive_int, default=repeat, metavar="N", help="tries of each fault")
    parser.add_argument("--only", nargs="+", choices=list(faults), default=list(faults), help="these faults only")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the moments chosen")
    parser.add_argument("--json", metavar="FILE", help="also write the table to FILE as one JSON object")
    return parser.parse_args(argv)


def main_of_faults(argv: list[str] | None = None) -> dict[str, Any]:
    """Break runs; return the table."""
    args = parse_args(argv, command="faults", description=__doc__, faults=FAULTS, repeat=20)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = break_runs(args.only, Path(folder), repeat=args.repeat, seed=args.seed)
    write_json(args.json, {"seed": args.seed, "faults": results})
    if failed := sum(result["failed"] for result in results.values()):
        raise UserError(f"{failed} tries lost something")
    return results


if __name__ == "__main__":
    run(main_of_faults)
