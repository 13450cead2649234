"""The run folder (settings, metrics, log, curves) and the optional mirror to Weights & Biases."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import logging.handlers
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import load_checkpoint
from utils.cli import check_writable, log_to_screen, write_json
from utils.collectives import broadcast_from_rank0, is_main, main_only
from utils.errors import CheckpointError, DamagedCheckpointError, UserError, warn_on_failure
from utils.files import replacing, writing
from utils.locks import lock

logger = logging.getLogger("crossnet")
REPLACED = ".replaced"  # suffix of an earlier run's files until the first step of the run that replaces it
LOG_BYTES = 20_000_000  # about two million steps
CHECKPOINTS = ("last.pth", "previous.pth", "best.pth")
RUN_FILES = (*CHECKPOINTS, "config.json", "metrics.jsonl", "run.log", "curves.png", "result.json")
LOCK = ".lock"
KEPT = "step_*.pth"  # checkpoints of --keep_every


class _RunLog(logging.handlers.RotatingFileHandler):
    """``run.log``, moved to ``run.log.1`` when full; a full disk costs lines, not the run."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.warned:
            print(f"warning: cannot write {self.baseFilename}: {error.strerror or error}", file=sys.stderr)
            self.warned = True


class RunFolder:
    """Folder ``<output_dir>/<exp_name>`` of one run. An earlier run's files are untouched until ``write_config``.

    Only rank 0 reads and writes it.

    Args:
        path: the folder.
        overwrite: replace an earlier run.
        resume: ``auto`` continues from this folder's checkpoint, a path from that checkpoint.

    Raises:
        UserError: the folder holds a run that is neither resumed nor overwritten, another process trains there, or it
            cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: str | None = None) -> None:
        self.path = Path(path)
        self._replaced: list[str] = []
        self._damaged: list[Path] = []
        self.unlock: Callable[[], Any] = lambda: None  # called when the run ends
        if is_main():
            self._check(overwrite, resume)

    def _check(self, overwrite: bool, resume: str | None) -> None:
        present = [name for name in RUN_FILES if (self.path / name).exists()]
        present += sorted(path.name for path in self.path.glob(KEPT))
        continues = resume == "auto" or (resume is not None and Path(resume).resolve().parent == self.path.resolve())
        self._replaced = [] if continues else present
        if present and not (overwrite or continues):
            if resume and not Path(resume).is_file():
                raise UserError(f"--resume {resume}: the file does not exist; without a path it takes the run's newest")
            raise UserError(
                f"{self.path} holds an earlier run ({', '.join(present)}): continue it with --resume, replace it with "
                "--overwrite, or choose another --exp_name"
            )
        check_writable(self.path)
        use = f"trains in {self.path}: wait until it ends, stop it, or choose another --exp_name"
        self.unlock = weakref.finalize(self, lock(self.path / LOCK, use))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def to_resume(self, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint that ``--resume`` selects, with its content.

        Args:
            resume: None, ``auto`` (this run's newest intact checkpoint, if any) or a path.

        Raises:
            CheckpointError: the requested file cannot be read, or all of this run's are damaged.
        """
        if resume is None:
            return None
        return broadcast_from_rank0(self._newest if resume == "auto" else lambda: self._named(Path(resume)))

    def _named(self, path: Path) -> tuple[Path, dict[str, Any]]:
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpointError as error:
            raise CheckpointError(f"{error}; --resume without a path takes the run's newest intact one") from error

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
            logger.warning("continuing from %s, the newest intact one", found[0])
        elif self._damaged:
            names = ", ".join(path.name for path in self._damaged)
            verb = "is" if len(self._damaged) == 1 else "are"
            raise CheckpointError(
                f"{self.path} has no intact checkpoint: {names} {verb} damaged; start over with --overwrite"
            )
        elif found is None:
            logger.info("%s does not exist yet: starting from the beginning", self / "last.pth")
            self.cut_metrics(0)
        return found

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint of this run; files that it is about to replace do not count."""
        return any((self / name).exists() for name in CHECKPOINTS)

    def has_best(self) -> bool:
        """Return whether ``best.pth`` exists and is not known to be damaged."""
        best = self / "best.pth"
        return best.exists() and best not in self._damaged

    def start_log(self) -> None:
        """Log to the terminal and, from ``write_config`` on, to ``run.log``; close the log of an earlier run."""
        log_to_screen()
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        if is_main():
            logger.addHandler(logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1))

    @main_only
    def write_config(self, config: Mapping[str, Any]) -> None:
        """Claim the folder: set aside files to be overwritten, write ``config.json``, open ``run.log``.

        Call it once settings and data are known to be valid.
        """
        for name in self._replaced:
            os.replace(self / name, self / f"{name}{REPLACED}")
        for path in self._damaged:
            os.replace(path, path.with_name(path.name + ".damaged"))
        for leftover in self.path.glob("*.tmp"):  # left by a run that was killed while writing
            leftover.unlink()
        write_json(self / "config.json", config)
        to_file = _RunLog(self / "run.log", encoding="utf-8", maxBytes=LOG_BYTES, backupCount=1)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for early in [handler for handler in logger.handlers if isinstance(handler, logging.handlers.MemoryHandler)]:
            early.setTarget(to_file)
            early.close()  # flushes the lines logged so far
            logger.removeHandler(early)
        logger.addHandler(to_file)

    @main_only
    def keep_start(self) -> None:
        """Delete the files that this run replaces; called after its first step."""
        for path in self.path.glob(f"*{REPLACED}"):
            path.unlink()

    @main_only
    def discard_start(self) -> None:
        """Undo ``write_config`` after a start that failed, leaving the folder as it was.

        Does nothing if there is a checkpoint or metrics: then the run had started earlier.
        """
        if self.has_checkpoint() or (self / "metrics.jsonl").exists():
            return
        for handler in [handler for handler in logger.handlers if isinstance(handler, _RunLog)]:
            logger.removeHandler(handler)
            handler.close()
        for name in ("config.json", "run.log"):
            (self / name).unlink(missing_ok=True)
        for path in self.path.glob(f"*{REPLACED}"):
            os.replace(path, path.with_name(path.name.removesuffix(REPLACED)))
        self.unlock()
        with contextlib.suppress(OSError):
            self.path.rmdir()  # only if it is empty

    @main_only
    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        path = self / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of ``metrics.jsonl``, without a last line truncated by a crash."""
        path = self / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    @main_only
    def cut_metrics(self, epoch: int) -> None:
        """Keep the records of the first ``epoch`` epochs, if any; later ones are about to be trained again."""
        if not (self / "metrics.jsonl").exists():
            return  # an empty file would look like an earlier run if the start fails
        kept = [record for record in self.metrics() if record["epoch"] <= epoch]
        with replacing(self / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    @main_only
    def draw_curves(self) -> None:
        """Draw ``curves.png`` from ``metrics.jsonl``: losses, learning rate, and any scores."""
        records = list(self.metrics())
        if records:
            with warn_on_failure(str(self / "curves.png")):
                self._draw(records)
            # Matplotlib figures are reference cycles; without an explicit gc.collect() a run leaks 5 MB per epoch.
            gc.collect()

    def _draw(self, records: list[dict[str, Any]]) -> None:
        from utils.pictures import Figure, save_figure

        names = {key for record in records for key in record}
        panels = [("loss", ["loss", "loss_intra", "loss_cross"]), ("learning rate", ["lr"])]
        more = {
            "loss on held-out pairs": [name for name in names if "val_loss" in name],
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
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axis.grid(alpha=0.3)
            if len(keys) > 1 or "%" in title:
                axis.legend(fontsize=8)
        save_figure(figure, self / "curves.png", dpi=120)


def _steps(payload: Mapping[str, Any]) -> int:
    """Return the steps done at a checkpoint, -1 if it does not say."""
    progress = payload.get("progress")
    steps = progress.get("step") if isinstance(progress, Mapping) else None
    return steps if isinstance(steps, int) else -1


class WandbMirror:
    """Mirror of the metrics to Weights & Biases; does nothing when disabled.

    Args:
        mode: ``disabled``, ``offline`` or ``online``.
        name: name of the run.
        folder: folder for wandb's files.
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
        except Exception as error:  # wandb's exception types cannot be named before the import
            raise UserError(f"wandb cannot start ({error}); --wandb disabled or offline needs no account") from error

    def log(self, record: Mapping[str, Any], *, step: int) -> None:
        """Send one record."""
        if self._run is not None:
            self._run.log(dict(record), step=step)

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
