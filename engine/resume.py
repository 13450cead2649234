"""Save a run, and resume it within an epoch, bit for bit as if it had not been stopped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import checkpoint_errors, save_checkpoint
from engine.faults import postponed
from engine.optim import load_optimizer
from engine.task import Progress, Run, Task
from utils.collectives import broadcast_from_rank0, main_only, world_size
from utils.errors import CheckpointError
from utils.reproducible import random_states, restore_random_states

logger = logging.getLogger("crossnet")
SIGCHLD = getattr(signal, "SIGCHLD", None)  # None on Windows, where no signal tells that a data worker died


@main_only
def save(run: Run, name: str) -> None:
    """Write a checkpoint into the run folder, unless a weight is not finite.

    Raises:
        UserError: a weight is not finite, or the file cannot be written.
    """
    task = run.task
    check_weights(run)
    payload = {
        "kind": task.kind,
        **task.weights(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
        "global_batch": task.sampler.global_batch,
        "shapes": task.fingerprint(),
        "random": random_states(),
        **run.config.provenance(),
    }
    with postponed(SIGCHLD):
        save_checkpoint(run.folder / name, payload, keep=run.folder / "previous.pth" if name == "last.pth" else None)


@main_only
def keep(run: Run) -> None:
    """Write ``step_<n>.pth``, the weights that later evaluation needs; a run does not resume from it.

    Raises:
        UserError: as in ``save``.
    """
    check_weights(run)
    payload = {
        "kind": run.task.kind,
        **run.task.kept_weights(),
        "progress": asdict(run.progress),
        **run.config.provenance(),
    }
    with postponed(SIGCHLD):
        save_checkpoint(run.folder / f"step_{run.progress.step}.pth", payload)


def check_weights(run: Run) -> None:
    """Check that every weight is finite.

    Raises:
        UserError: one is not.
    """
    floats = [value for value in run.task.model.state_dict().values() if value.is_floating_point()]
    if not torch.stack([value.isfinite().all() for value in floats]).all():
        raise run.not_finite("some weights are", run.progress.step)


def changes_since(run: Run, payload: Mapping[str, Any], *, same_samples: bool) -> list[str]:
    """Describe the settings that change the result and differ from those of a checkpoint's run.

    Args:
        run: the run that resumes.
        payload: the checkpoint.
        same_samples: whether both have the same training samples; the size of a small set limits the batch.
    """
    before, now, sampler, own = payload["arguments"], run.config.flags, run.task.sampler, run.task.own_settings
    free = set(run.task.free_on_resume)
    if can_extend(run, payload):
        free.add("epochs")
    before = {**run.task.added_settings, **before}
    names = sorted(key for key in now if key not in free and before.get(key, now[key]) != now[key])
    names = [key for key in names if key not in own or own[key] not in before[key]]
    changes = [f"--{key} {before[key]} there, {now[key]} here" for key in names]
    there, here, batch = payload.get("processes", 1), world_size(), payload["global_batch"]
    each, rest = divmod(batch, here * sampler.parts)
    if same_samples and batch != sampler.global_batch:
        changes.append(
            f"--batch_size {before['batch_size']} in {there} process(es) there, "
            f"{run.config.batch_size} in {here} here, a global batch of {sampler.global_batch}, not {batch}: "
            + (f"{here} processes cannot share it" if rest else f"--batch_size {each} fits")
        )
    if run.config.no_sync_bn and there != here:
        changes.append(f"--no_sync_bn in {there} process(es) there, {here} here")
    return changes


def can_extend(run: Run, payload: Mapping[str, Any]) -> bool:
    """Return whether more epochs merely extend the checkpoint's run: its steps so far keep their learning rates."""
    task, before = run.task, payload["arguments"]["epochs"]
    return before < task.config.epochs and keeps_rates(task, before, done=Progress(**payload["progress"]).step)


def keeps_rates(task: Task, epochs: int, *, done: int) -> bool:
    """Return whether the first ``done`` steps would have the same learning rates in a run of ``epochs`` epochs."""
    steps = range(0, done, max(1, done // 1000))
    rates, config = [task.learning_rate(step) for step in steps], task.config
    task.config = replace(config, epochs=epochs)
    try:
        return rates == [task.learning_rate(step) for step in steps]
    finally:
        task.config = config


def resume(run: Run) -> bool:
    """Continue a run from the checkpoint that ``config.resume`` selects (``RunFolder.to_resume``).

    Returns:
        Whether there was one.

    Raises:
        CheckpointError: it cannot be read, or is of another kind, other settings or other data.
    """
    found = run.folder.to_resume(run.config.resume)
    if found is None:
        return False
    path, payload = found
    with checkpoint_errors(path):
        load_state(run, payload, path)
    # best.pth is missing (new folder, lost file) or was chosen by another score: the next score becomes the best.
    now = run.config.flags
    other = run.task.selection({**now, **payload["arguments"]}) != run.task.selection(now)
    if not broadcast_from_rank0(run.folder.has_best) or other:
        run.progress.best, run.progress.best_epoch = Progress.best, Progress.best_epoch
    run.folder.cut_metrics(run.progress.epoch)
    logger.info("resumed %s: %d epochs and %d steps done", path, run.progress.epoch, run.progress.step)
    if run.progress.epoch >= run.config.epochs:
        logger.info("nothing is left to train: all %d epochs are done; %s", run.config.epochs, train_further(run, path))
    return True


def train_further(run: Run, path: Path) -> str:
    """Return advice on how to train a finished run further, for a message."""
    if keeps_rates(run.task, run.config.epochs + 1, done=run.progress.step):
        return "a higher --epochs continues the run"
    return "this run cannot be extended, because its learning rate follows from --epochs; " + run.task.fresh_start(path)


def load_state(run: Run, payload: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint's weights, optimizer, random states and progress into a run.

    Raises:
        CheckpointError: as in ``resume``.
    """
    task = run.task
    if payload.get("kind") != task.kind or "optimizer" not in payload:
        kind = task.kind.removeprefix("crossnet-")
        raise CheckpointError(f"{path} is not a {kind} checkpoint: --resume needs a last.pth of this script")
    same_samples = payload["shapes"] == task.fingerprint()
    changes = changes_since(run, payload, same_samples=same_samples)
    if changes:
        text = f"{path} was trained with other settings ({', '.join(changes)}): repeat them, or start a new run"
        if any(change.startswith("--epochs ") for change in changes):
            text += (
                ". A run cannot be shortened, nor extended where its learning rate follows from --epochs; "
                f"{task.fresh_start(path)}"
            )
        raise CheckpointError(text)
    if not same_samples:
        raise CheckpointError(f"{path} was trained on other shapes than {run.config.data_root} holds")
    task.load_weights(payload, path)
    load_optimizer(run.optimizer, payload["optimizer"])
    run.scaler.load_state_dict(payload["scaler"])
    restore_random_states(payload["random"])
    run.progress = Progress(**payload["progress"])
