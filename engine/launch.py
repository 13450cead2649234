"""Start and end several processes together."""

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

# A collective that a process has not joined after this time has failed: that process hangs.
TIMEOUT = timedelta(minutes=10)
# A rank that misses this many heartbeats (35 s) is considered dead; all ranks then exit within a minute.
BEAT_SECONDS = 5.0
BEATS_UNTIL_LOST = 7
EXIT_LOST_PROCESS = 3


def started_as_one_of_many() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started this process as one of several."""
    given = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return given and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(main: Callable[[], Any]) -> NoReturn:
    """Run a script's ``main``, alone (``utils.cli.run``) or as one of torchrun's processes.

    Only rank 0 writes to the terminal. If a process fails or is lost, all exit, with one message.
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
        # gloo for CPU tensors: agreements between the processes never wait for a GPU.
        gpus = not _asks_for_cpu(sys.argv[1:]) and torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
        try:
            main()
        except SystemExit as error:  # all processes exit: after SIGTERM, or on wrong flags
            code = error.code
        any_rank(False)  # no process leaves while others still need it
    except BaseException as error:
        peers.end_all(*_explain_failure(error))
    peers.stop()
    dist.destroy_process_group()
    sys.exit(code)


def _asks_for_cpu(argv: list[str]) -> bool:
    """Return whether a command line says ``--device cpu``; NCCL would then claim memory on an unused GPU."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--device", default="auto")
    with contextlib.suppress(argparse.ArgumentError):  # the script's own parser reports it
        return parser.parse_known_args(argv)[0].device.startswith("cpu")
    return False


def _end_soon(*_: object) -> None:
    """Exit a while after SIGTERM, which torchrun sends to all processes once one is gone.

    The delay lets the process that failed print its message; torchrun sends SIGKILL after 30 seconds.
    """
    ending = threading.Timer(4 * BEAT_SECONDS, os._exit, [EXIT_TERMINATED])
    ending.daemon = True
    ending.start()


def _explain_failure(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code for an error in one of several processes."""
    if explained := explain(error):
        return explained
    text = str(error)
    if "NCCL" in text:  # a lost process or a faulty set-up: only NCCL's text tells which
        advice = "All processes end; if a process or a machine was lost, continue with --resume"
        return f"error: NCCL failed in process {rank()}: {text.strip()}\n{advice}", EXIT_LOST_PROCESS
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        what = "does not answer" if "timed out" in text.lower() or "timeout" in text.lower() else "is gone"
        return _lost(f"another process {what}, as process {rank()} found"), EXIT_LOST_PROCESS
    return "".join(traceback.format_exception(error)), 1


def _lost(what: str) -> str:
    return (
        f"error: {what}: it was killed, perhaps for want of memory, or its machine is down. All processes end; "
        "continue from the newest checkpoint with --resume"
    )


class _Peers:
    """Heartbeats between the processes of a run, through the key-value store of their rendezvous.

    Every few seconds each process increments its own counter and reads its neighbor's. This also detects a process that
    was killed, stopped or cut off while the others wait for it in a GPU collective, which raises no error.

    Args:
        own: rank of this process.
        size: number of processes.
    """

    def __init__(self, own: int, size: int) -> None:
        # A separate connection, since the main thread may block in the other one; new keys after a restart by torchrun.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_connection = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self.store = dist.PrefixStore(f"peers {attempt}", own_connection)
        self.own, self.size, self.neighbor = own, size, (own + 1) % size
        self.keeps_the_store = own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # The neighbor's counter, whether any process has failed, and how often the store has answered.
        self.heard: tuple[bytes, bool, int] = b"", False, 0
        self.ending = threading.Lock()
        self.stopped = threading.Event()
        self.store.set(f"beat {own}", "0")
        # Two threads: the one that queries the store may block, the one that watches never does.
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
            # Count own beats, not seconds: a job that was suspended and resumed has lost nobody. A process that has not
            # started yet is not lost either; whoever waits for it has a timeout.
            heard = self.heard
            unanswered = heard[2] == last[2]
            silent = unanswered or heard[0] == last[0] != b""
            # The two threads may beat at the same moment, so a single answer can seem to be missing.
            answers = answers + (not unanswered) if silent else 0
            last, missed = heard, missed + 1 if silent else 0
            if last[1]:
                self.end_all("", EXIT_LOST_PROCESS)
            if missed >= BEATS_UNTIL_LOST:
                # The store belongs to process 0, or to torchrun's agent on its machine.
                lost = 0 if answers < missed / 2 else self.neighbor
                silence = f"process {lost} has been silent for {missed * BEAT_SECONDS:.0f} seconds"
                self.end_all(_lost(silence), EXIT_LOST_PROCESS)

    def _fails_first(self) -> bool:
        """Return whether this process is the first to fail, as far as known: the store itself may have failed."""
        answers: list[int] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answers.append(self.store.add("failures", 1))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(BEAT_SECONDS)
        return answers in ([], [1])

    def end_all(self, message: str, code: int) -> NoReturn:
        """Exit at once, and make the others exit within a beat; the first process to fail prints why.

        This skips the orderly exit, which would wait for the collectives that the others are in.
        """
        self.ending.acquire()  # never released, so only one thread ends the process
        if self._fails_first() and message:
            print(message.rstrip("\n"), file=sys.__stderr__, flush=True)
        if self.keeps_the_store:
            self.stopped.wait(2 * BEAT_SECONDS)  # the store ends with this process; let the others read it first
        logging.shutdown()
        os._exit(code)

    def stop(self) -> None:
        """Stop the heartbeats: all processes are done."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(BEAT_SECONDS)
        with contextlib.suppress(RuntimeError):
            self.store.add("done", 1)
            while self.keeps_the_store and self.store.add("done", 0) < self.size:
                time.sleep(0.01)  # others may still be querying the store
