r"""Lose one of two processes, again and again, and check that nothing is lost.

Each try trains a tiny model in two processes (gloo, float64, 12 steps, a checkpoint every 2 steps, two probes), breaks
it at a random moment, resumes it in one process or in two, and compares the end with that of an uninterrupted run of
one process: weights, optimizer, scores and metrics agree to 1e-9. The time is how long the other process lived on.

commands:
  python -m tests.robustness.rank_faults --repeat 20 --json ranks.json
  python -m tests.robustness.rank_faults --only silent --repeat 3
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train_crossnet_con as pretraining
from engine import launch
from engine.checkpoint import load_checkpoint
from engine.task import Run
from tests.robustness.faults import parse_args
from tests.support.pairs import write_demo_set, write_pairs
from tests.support.several import exit_codes, output_of, run_together, start_together
from tests.support.small_run import arguments
from tests.test_distributed import assert_same_runs, float64_runs
from train_crossnet_con import Pretraining
from utils.cli import EXIT_TERMINATED, EXIT_USER_ERROR, run, write_json
from utils.errors import UserError

BEAT_SECONDS, BEATS_UNTIL_LOST = launch.BEAT_SECONDS, launch.BEATS_UNTIL_LOST
STEPS = 12
SETTINGS = ("--epochs", 6, "--eval_every", 3, "--save_every", 2)


class Place:
    """Data, an uninterrupted run, and folders for others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "data"
        write_pairs(self.root, 16)
        write_demo_set(self.root)
        run_together(lambda: self.train(1, folder / "whole"), folder / "logs", 1)

    def train(self, processes: int, out: Path, *more: str) -> None:
        """Run one of the processes of a run."""
        pretraining.main(arguments(self.root, out, *SETTINGS, "--batch_size", 8 // processes, *more))

    def broken(self, act: Callable[[], None], rng: random.Random) -> tuple[list[int | None], int, float]:
        """Train in two processes, one of which does ``act`` somewhere in a step.

        Returns:
            The exit codes, the victim's rank, and the seconds from ``act`` to the other's end.
        """
        victim, step, method = (
            rng.randrange(2),
            rng.randrange(STEPS - 1),
            rng.choice(("step", "optimizer_step", "count_bad_samples")),
        )
        out, moment = self.folder / "try", self.folder / "moment"
        shutil.rmtree(out, ignore_errors=True)

        def main() -> None:
            owner = Pretraining if method == "count_bad_samples" else Run
            original = getattr(owner, method)

            def harmed(this: Pretraining | Run, *args: object) -> object:
                progress = this.progress if owner is Run else args[-1]
                if progress.step == step and launch.rank() == victim:
                    moment.write_text(str(time.time()))
                    act()
                return original(this, *args)

            setattr(owner, method, harmed)
            self.train(2, out)

        processes = start_together(main, out / "logs")
        (other,) = exit_codes([processes[1 - victim]])
        lived_on = time.time() - float(moment.read_text())
        os.kill(processes[victim].pid, signal.SIGCONT)  # a stopped process learns that the others are gone
        codes = exit_codes(processes)
        self.text = output_of(out / "logs")
        assert "Traceback" not in self.text, self.text
        return codes, victim, lived_on

    def finish(self, rng: random.Random) -> None:
        """Resume in one process or in two, and compare the end."""
        processes = rng.randint(1, 2)
        run_together(lambda: self.train(processes, self.folder / "try", "--resume"), self.folder / "logs", processes)
        assert_same_runs(self.folder / "try" / "crossnet", self.folder / "whole" / "crossnet")


def killed(place: Place, rng: random.Random) -> float:
    """SIGKILL of one of two processes."""
    codes, victim, lived_on = place.broken(lambda: os.kill(os.getpid(), signal.SIGKILL), rng)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == launch.EXIT_LOST_PROCESS, place.text
    assert len(re.findall("error: .* --resume", place.text)) == 1, place.text
    place.finish(rng)
    return lived_on


def silent(place: Place, rng: random.Random) -> float:
    """SIGSTOP of one of two processes: its connections stay open, but nothing comes."""
    codes, victim, lived_on = place.broken(lambda: os.kill(os.getpid(), signal.SIGSTOP), rng)
    assert codes == [launch.EXIT_LOST_PROCESS] * 2, place.text
    assert f"process {victim} has been silent for {BEATS_UNTIL_LOST * BEAT_SECONDS:.0f} seconds" in place.text, (
        place.text
    )
    place.finish(rng)
    return lived_on


def terminated(place: Place, rng: random.Random) -> float:
    """SIGTERM to one of two processes: both stop after the same step."""
    codes, _, lived_on = place.broken(lambda: os.kill(os.getpid(), signal.SIGTERM), rng)
    assert codes == [EXIT_TERMINATED] * 2 and place.text.count("stopped by SIGTERM") == 1, place.text
    step = int(re.findall(r"stopped by SIGTERM at step (\d+)", place.text)[0])
    assert load_checkpoint(place.folder / "try" / "crossnet" / "last.pth")["progress"]["step"] == step
    place.finish(rng)
    return lived_on


def failed(place: Place, rng: random.Random) -> float:
    """Raise an error in one of two processes, such as a file that it cannot read."""

    def fail() -> None:
        raise UserError("this file is broken")

    codes, victim, lived_on = place.broken(fail, rng)
    assert codes[victim] == EXIT_USER_ERROR and codes[1 - victim] == launch.EXIT_LOST_PROCESS, place.text
    assert place.text.count("error:") == 1 and "this file is broken" in place.text, place.text
    place.finish(rng)
    return lived_on


FAULTS = {fault.__name__: fault for fault in (killed, silent, terminated, failed)}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Try every fault; return how often, and the longest and the mean time that the other process lived on."""
    args = parse_args(argv, command="rank_faults", description=__doc__, faults=FAULTS, repeat=5)
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()
    result = {}
    with tempfile.TemporaryDirectory() as folder, float64_runs() as patch:
        patch.setattr(launch, "BEAT_SECONDS", BEAT_SECONDS)
        patch.setattr(launch, "BEATS_UNTIL_LOST", BEATS_UNTIL_LOST)
        place = Place(Path(folder))
        for name in args.only:
            times = []
            for number in range(args.repeat):
                times.append(FAULTS[name](place, random.Random(f"{name} {args.seed} {number}")))
            result[name] = {"tries": len(times), "longest": max(times), "mean": sum(times) / len(times)}
            print(f"{name}: {len(times)} tries, nothing lost; the other process ended after ", end="")
            print(f"{result[name]['mean']:.1f} s, at most {max(times):.1f} s", flush=True)
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
