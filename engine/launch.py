"""Several processes: how they start and end together."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.cli import EXIT_TERMINATED, explain, run
from utils.collectives import any_rank, rank

# A collective that some process does not join for so long has failed: that process hangs.
TIMEOUT = timedelta(minutes=10)
# A rank that misses this many heartbeats (35 s) is considered dead; all ranks then exit within a minute.
BEAT_SECONDS = 5.0
BEATS_UNTIL_LOST = 7
EXIT_LOST_PROCESS = 3


def started_as_one_of_many() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as one of several."""
    given = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return given and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(main: Callable[[], Any]) -> NoReturn:
    """Run a script's ``main``, as one of torchrun's processes where that started it; see ``utils.cli.run``.

    Of several processes only the main one writes to the screen. They end together: an error in one of them, or its
    loss, ends all, with one message.
    """
    if not started_as_one_of_many():
        run(main)
    signal.signal(signal.SIGTERM, _end_soon)
    if int(os.environ["RANK"]) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    store, own, size = next(rendezvous("env://", timeout=TIMEOUT))
    peers = _Peers(own, size)
    code: Any = 0
    try:
        # Tensors in memory travel by gloo in any case: what the processes agree on never waits for a GPU.
        gpus = not _asks_for_cpu(sys.argv[1:]) and torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
        try:
            main()
        except SystemExit as error:  # by agreement, or from wrong flags, which all processes got
            code = error.code
        any_rank(False)  # nobody leaves while others still need it
    except BaseException as error:
        peers.end_all(*_explain_failure(error))
    peers.stop()
    dist.destroy_process_group()
    sys.exit(code)


def _asks_for_cpu(argv: list[str]) -> bool:
    """Whether a command line says ``--device cpu``: NCCL would claim memory on a GPU that the run does not use."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--device", default="auto")
    with contextlib.suppress(argparse.ArgumentError):  # the script's own parser reports it
        return parser.parse_known_args(argv)[0].device.startswith("cpu")
    return False


def _end_soon(*_: object) -> None:
    """Handler of SIGTERM, also outside of training: torchrun sends it as soon as one process is gone.

    Another process that is about to say so has time for it; torchrun kills after 30 seconds.
    """
    ending = threading.Timer(4 * BEAT_SECONDS, os._exit, [EXIT_TERMINATED])
    ending.daemon = True
    ending.start()


def _explain_failure(error: BaseException) -> tuple[str, int]:
    """Message and exit code for an error of a process among several."""
    if explained := explain(error):
        return explained
    text = str(error)
    if "NCCL" in text:  # a lost process, or a machine that is set up wrongly: only NCCL's own words tell which
        advice = "All processes end; if a process or a machine was lost, continue with --resume"
        return f"error: NCCL failed in process {rank()}: {text.strip()}\n{advice}", EXIT_LOST_PROCESS
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        what = "does not answer" if "timed out" in text.lower() or "timeout" in text.lower() else "is gone"
        return _lost(f"another process {what}, as process {rank()} found"), EXIT_LOST_PROCESS
    return "".join(traceback.format_exception(error)), 1


def _lost(what: str) -> str:
    return (
        f"error: {what}: it was killed, perhaps for want of memory, or its machine is down. All processes end; "
        "go on from the newest checkpoint with --resume"
    )


class _Peers:
    """Keeps the processes of a run together, by the key-value store through which they met.

    Each process counts a beat there every few seconds and looks at its neighbour's count; so a process that was killed,
    stopped or cut off is noticed also where the others wait for it inside a GPU's collective, which raises no error.

    Args:
        own: number of this process.
        size: number of processes.
    """

    def __init__(self, own: int, size: int) -> None:
        # A separate connection: the main thread may block in the other one. A restart by torchrun starts afresh.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_connection = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self.store = dist.PrefixStore(f"peers {attempt}", own_connection)
        self.own, self.size, self.neighbor = own, size, (own + 1) % size
        self.keeps_the_store = own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # The neighbour's count, whether some process has failed, and how often the store has answered.
        self.heard: tuple[bytes, bool, int] = b"", False, 0
        self.ending = threading.Lock()
        self.stopped = threading.Event()
        self.store.set(f"beat {own}", "0")
        # Two threads: the one that asks the store may wait for its answer, the other one never waits.
        self.threads = [threading.Thread(target=task, daemon=True) for task in (self._exchange, self._watch)]
        for thread in self.threads:
            thread.start()

    def _exchange(self) -> None:
        beat, key = 0, f"beat {self.neighbor}"
        while not self.stopped.wait(BEAT_SECONDS):
            beat += 1
            try:
                self.store.set(f"beat {self.own}", str(beat))
                count = self.store.get(key) if self.store.check([key]) else b""
                self.heard = count, self.store.check(["failures"]), beat
            except RuntimeError:
                if not self.stopped.is_set():
                    self.end_all(_lost("the process that all meet in is gone"), EXIT_LOST_PROCESS)
                return

    def _watch(self) -> None:
        last, missed, answers = self.heard, 0, 0
        while not self.stopped.wait(BEAT_SECONDS):
            # Own beats, not the clock: a job that was suspended and goes on has lost nobody. Nor is one lost that has
            # not come yet; those that wait for it have their own timeout.
            heard = self.heard
            unanswered = heard[2] == last[2]
            silent = unanswered or heard[0] == last[0] != b""
            # The two threads' beats may fall together, so that an answer now and then seems to be missing.
            answers = answers + (not unanswered) if silent else 0
            last, missed = heard, missed + 1 if silent else 0
            if last[1]:
                self.end_all("", EXIT_LOST_PROCESS)
            if missed >= BEATS_UNTIL_LOST:
                # The store is process 0's, or of the agent beside it.
                lost = 0 if answers < missed / 2 else self.neighbor
                silence = f"process {lost} has been silent for {missed * BEAT_SECONDS:.0f} seconds"
                self.end_all(_lost(silence), EXIT_LOST_PROCESS)

    def _fails_first(self) -> bool:
        """Whether no other process has failed before, as far as is known: the store may be what failed."""
        answers: list[int] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answers.append(self.store.add("failures", 1))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(BEAT_SECONDS)
        return answers in ([], [1])

    def end_all(self, message: str, code: int) -> NoReturn:
        """End this process at once, and the others within a beat; the first one to fail says why.

        Nothing is waited for: an orderly exit would wait for the collectives that the others are in.
        """
        self.ending.acquire()  # never released: one thread ends the process
        if self._fails_first() and message:
            print(message.rstrip("\n"), file=sys.__stderr__, flush=True)
        if self.keeps_the_store:
            self.stopped.wait(2 * BEAT_SECONDS)  # the store ends with this process: the others are to read it first
        logging.shutdown()
        os._exit(code)

    def stop(self) -> None:
        """No longer look after the others: all are done."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(BEAT_SECONDS)
        with contextlib.suppress(RuntimeError):
            self.store.add("done", 1)
            while self.keeps_the_store and self.store.add("done", 0) < self.size:
                time.sleep(0.01)  # the others may be asking it still
