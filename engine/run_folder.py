"""The run folder: settings, metrics, log, curves; and the optional mirror to Weights & Biases."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import load_checkpoint
from utils.cli import check_writable, log_to_screen, write_json
from utils.collectives import broadcast_from_rank0, is_main, main_only
from utils.errors import CheckpointError, DamagedCheckpointError, UserError, warn_on_failure

logger = logging.getLogger("crossnet")
REPLACED = ".replaced"  # ending of files of an earlier run until the first step of the one that replaces it is done
LOG_BYTES = 20_000_000  # some million steps
CHECKPOINTS = ("last.pth", "previous.pth", "best.pth")
RUN_FILES = (*CHECKPOINTS, "config.json", "metrics.jsonl", "run.log", "curves.png", "result.json")


class _RunLog(logging.handlers.RotatingFileHandler):
    """``run.log``, moved to ``run.log.1`` when it is full; on a full disk lines are lost, not the run."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            print(f"warning: cannot write {self.baseFilename}: {error.strerror or error}", file=sys.stderr)
            self.told = True


class RunFolder:
    """Folder ``<output_dir>/<exp_name>`` of one run. What an earlier run left stays as it is until ``write_config``.

    Of several processes only the main one looks at it and writes to it.

    Args:
        path: the folder.
        overwrite: let this run take an earlier one's place.
        resume: go on from ``auto``, this folder's checkpoint, or from the checkpoint of that path.

    Raises:
        UserError: it holds a run that is neither to be overwritten nor the one to go on with, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: str | None = None) -> None:
        self.path = Path(path)
        self._replaced: list[str] = []
        self._damaged: list[Path] = []
        if is_main():
            self._look(overwrite, resume)

    def _look(self, overwrite: bool, resume: str | None) -> None:
        there = [name for name in RUN_FILES if (self.path / name).exists()]
        goes_on = resume == "auto" or (resume is not None and Path(resume).resolve().parent == self.path.resolve())
        self._replaced = [] if goes_on else there
        if there and not (overwrite or goes_on):
            if resume and not Path(resume).is_file():
                raise UserError(f"--resume {resume}: there is no such file; without a path it takes the run's newest")
            raise UserError(
                f"{self.path} holds an earlier run ({', '.join(there)}): go on with --resume, replace it with "
                "--overwrite, or choose another --exp_name"
            )
        check_writable(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def to_resume(self, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        """Checkpoint that ``--resume`` means, and its content.

        Args:
            resume: None, ``auto`` (this run's newest one that is whole, if there is any) or a path.

        Raises:
            CheckpointError: the one asked for cannot be read, or all of this run are damaged.
        """
        if resume is None:
            return None
        return broadcast_from_rank0(self._newest if resume == "auto" else lambda: self._named(Path(resume)))

    def _named(self, path: Path) -> tuple[Path, dict[str, Any]]:
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpointError as error:
            raise CheckpointError(f"{error}; --resume without a path takes the run's newest whole one") from error

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        found = None
        for path in (self / name for name in CHECKPOINTS):
            if not path.exists() or (found and found[0].name == "last.pth"):
                continue
            try:
                payload = load_checkpoint(path)
            except DamagedCheckpointError as error:
                logger.warning("%s", error)
                self._damaged.append(path)
                continue
            if found is None or _steps(payload) > _steps(found[1]):
                found = path, payload
        if found and self._damaged:
            logger.warning("going on from %s, the newest that is whole", found[0])
        elif self._damaged:
            names = ", ".join(path.name for path in self._damaged)
            verb = "is" if len(self._damaged) == 1 else "are"
            raise CheckpointError(
                f"{self.path} has no whole checkpoint: {names} {verb} damaged; begin with --overwrite"
            )
        elif found is None:
            logger.info("%s does not exist yet: starting from the beginning", self / "last.pth")
            if (self / "metrics.jsonl").exists():
                self.cut_metrics(0)
        return found

    def has_best(self) -> bool:
        """Whether there is a ``best.pth`` that is not known to be damaged."""
        best = self / "best.pth"
        return best.exists() and best not in self._damaged

    def start_log(self) -> None:
        """Send the log to the screen and, from ``write_config`` on, to ``run.log``; an earlier run's file is closed."""
        log_to_screen()
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        if is_main():
            logger.addHandler(logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1))

    @main_only
    def write_config(self, config: Mapping[str, Any]) -> None:
        """Take the folder over: set aside what is to be overwritten, write ``config.json``, open ``run.log``.

        Called when nothing in the settings or the data can stop the run any more.
        """
        for name in self._replaced:
            os.replace(self / name, self / f"{name}{REPLACED}")
        for path in self._damaged:
            os.replace(path, path.with_name(path.name + ".damaged"))
        for leftover in self.path.glob("*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        write_json(self / "config.json", config)
        to_file = _RunLog(self / "run.log", encoding="utf-8", maxBytes=LOG_BYTES, backupCount=1)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for early in [handler for handler in logger.handlers if isinstance(handler, logging.handlers.MemoryHandler)]:
            early.setTarget(to_file)
            early.close()  # hands on what was logged so far
            logger.removeHandler(early)
        logger.addHandler(to_file)

    @main_only
    def keep_start(self) -> None:
        """Remove what the run replaces, for good; called when its first step is done."""
        for path in self.path.glob(f"*{REPLACED}"):
            path.unlink()

    @main_only
    def discard_start(self) -> None:
        """Undo ``write_config`` after a start that failed: the folder is as it was, and can be started in again.

        Does nothing where a checkpoint or metrics lie: ``write_config`` did not begin that run.
        """
        if any((self / name).exists() for name in (*CHECKPOINTS, "metrics.jsonl")):
            return
        for handler in [handler for handler in logger.handlers if isinstance(handler, _RunLog)]:
            logger.removeHandler(handler)
            handler.close()
        for name in ("config.json", "run.log"):
            (self / name).unlink(missing_ok=True)
        for path in self.path.glob(f"*{REPLACED}"):
            os.replace(path, path.with_name(path.name.removesuffix(REPLACED)))
        with contextlib.suppress(OSError):
            self.path.rmdir()  # if there is nothing else in it

    @main_only
    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``."""
        try:
            with open(self / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self / 'metrics.jsonl'}: {error.strerror or error}") from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Records of ``metrics.jsonl``; a last line cut off by a crash is left out."""
        path = self / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    @main_only
    def cut_metrics(self, epoch: int) -> None:
        """Keep the records of the first ``epoch`` epochs: the rest is about to be trained again."""
        kept = [record for record in self.metrics() if record["epoch"] <= epoch]
        temporary = self / "metrics.jsonl.tmp"
        try:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, self / "metrics.jsonl")
        except OSError as error:
            raise UserError(f"cannot write {self / 'metrics.jsonl'}: {error.strerror or error}") from error

    @main_only
    def draw_curves(self) -> None:
        """Draw ``curves.png`` from ``metrics.jsonl``: losses, learning rate, and whatever scores there are."""
        records = list(self.metrics())
        if records:
            with warn_on_failure(str(self / "curves.png")):
                self._draw(records)
            # Matplotlib figures are reference cycles; without an explicit gc.collect() a run leaks 5 MB per epoch.
            gc.collect()

    def _draw(self, records: list[dict[str, Any]]) -> None:
        """See ``draw_curves``."""
        from utils.pictures import Figure, save_figure

        names = {key for record in records for key in record}
        panels = [("loss", ["loss", "loss_intra", "loss_cross"]), ("learning rate", ["lr"])]
        more = {
            "loss on held-out pairs": [name for name in names if name.startswith("val_loss")],
            "held-out views": [name for name in names if name.endswith(("alignment", "uniformity"))],
            "scores (%)": [name for name in names if name.endswith(("accuracy", "iou", "r1"))],
        }
        panels += [(title, sorted(keys)) for title, keys in more.items() if keys]
        figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
        for axis, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for key in keys:
                points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker=".", label=key.replace("_", " "))
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if len(keys) > 1 or "%" in title:
                axis.legend(fontsize=8)
        save_figure(figure, self / "curves.png", dpi=120)


def _steps(payload: Mapping[str, Any]) -> int:
    """Steps done at a checkpoint; -1 where it does not say."""
    progress = payload.get("progress")
    steps = progress.get("step") if isinstance(progress, Mapping) else None
    return steps if isinstance(steps, int) else -1


class WandbMirror:
    """Mirror of the metrics to Weights & Biases; does nothing when disabled.

    Args:
        mode: ``disabled``, ``offline`` or ``online``.
        name: of the run.
        folder: where wandb keeps its files.
        config: settings to show.

    Raises:
        UserError: wandb is not installed or refuses to start.
    """

    def __init__(self, mode: str, *, name: str, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self._run = None
        if mode == "disabled":
            return
        try:
            import wandb

            self._run = wandb.init(project="crossnet", name=name, dir=str(folder), config=dict(config), mode=mode)
        except Exception as error:  # wandb raises its own kinds, which need the import to be named
            raise UserError(f"wandb cannot start ({error}); --wandb disabled or offline needs no account") from error

    def log(self, record: Mapping[str, Any], *, step: int) -> None:
        """Send one record."""
        if self._run is not None:
            self._run.log(dict(record), step=step)

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
