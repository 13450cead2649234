"""The loop that pretraining and fine-tuning share: epochs, logging, checkpoints, exact resume within an epoch."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.sampler import ResumableSampler
from engine.checkpoint import checkpoint_errors, save_checkpoint
from engine.data_workers import data_loader
from engine.faults import batches, postponed, stop_workers, worker_gone
from engine.optim import grad_scaler, load_optimizer
from engine.resume import FREE_ON_RESUME, Progress
from engine.run_folder import RunFolder, WandbMirror
from models.ops.backend import agree_on_kernels
from models.ops.batch_norm import SyncBatchNorm
from utils.cli import EXIT_TERMINATED
from utils.collectives import (
    all_reduce_sum,
    any_rank,
    broadcast_from_rank0,
    broadcast_tensors,
    is_main,
    main_only,
    rank,
    world_size,
    wrap_ddp,
)
from utils.errors import CheckpointError, UserError
from utils.reproducible import (
    deterministic,
    git_commit,
    random_states,
    restore_random_states,
    versions,
)

logger = logging.getLogger("crossnet")


class TrainingLoop(ABC):
    """One run, in one process or in several. Subclasses set what is trained, on what, and say what a step is.

    Several processes hold the same weights and take their own share of every batch; only the main one writes.

    Args:
        args: the parsed command line; see ``utils.cli.add_run_arguments`` and ``add_optimisation_arguments``.
        folder: the run folder.
        device: where to train.

    Attributes:
        kind: written into checkpoints; a run continues only from its own kind.
        loss_names: what ``step`` returns, in order; the first is the one that is minimised.
        free_on_resume: settings that may change between a run and its continuation.
        collate: turns samples into a batch; None takes PyTorch's.
        model, dataset, sampler, optimizer: set by the subclass before ``train``.
        network: what ``step`` calls, the model with its gradients averaged over the processes, by ``wrap_distributed``.
    """

    kind: str
    loss_names: tuple[str, ...] = ("loss",)
    free_on_resume: Collection[str] = FREE_ON_RESUME
    collate: Callable | None = None
    model: nn.Module
    network: nn.Module
    dataset: Dataset
    sampler: ResumableSampler
    optimizer: torch.optim.Optimizer

    def __init__(self, args: argparse.Namespace, folder: RunFolder, device: torch.device) -> None:
        self.args, self.folder, self.device = args, folder, device
        agree_on_kernels(device)
        self.scaler = grad_scaler(device, args.amp)
        self.progress = Progress()
        self.stop_requested = False  # SIGTERM has come

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.args.epochs * len(self.sampler)

    # What subclasses say.

    @abstractmethod
    def step(self, batch: Any) -> torch.Tensor:
        """One optimiser step; returns the losses, detached, on the device."""

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """The checkpoint's part that is the model."""

    @abstractmethod
    def load_weights(self, payload: Mapping[str, Any], path: Path) -> None:
        """Load what ``weights`` gave."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Which samples are trained on, in which order."""

    def count_bad_samples(self, batch: Any) -> None:  # noqa: B027 - most have nothing to look at
        """Called for every batch before its step."""

    def evaluate(self) -> dict[str, float]:
        """Scores after an epoch; saves ``best.pth`` where they are the best so far."""
        return {}

    # What is common.

    def wrap_distributed(self, model: nn.Module) -> nn.Module:
        """Make a model one over all processes: batch statistics, and the gradients of the module that is returned."""
        if world_size() > 1 and not self.args.no_sync_bn:
            SyncBatchNorm.convert(model)
        return wrap_ddp(model)

    def sampler_of(self, size: int, batch: int, *, parts: int = 1, keep_rest: bool = False) -> ResumableSampler:
        """Batches for this process, of ``batch`` samples for each process and each part of a step.

        ``keep_rest`` keeps the incomplete last batch, of two samples or more for each batch norm.
        """
        world = world_size()
        smallest = max(world, 2) if not self.args.no_sync_bn else 2 * world
        return ResumableSampler(
            size,
            global_batch=batch * world * parts,
            seed=self.args.seed,
            rank=rank(),
            world=world,
            parts=parts,
            smallest=smallest if keep_rest else None,
        )

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """Backward pass and optimiser step, with loss scaling where it is on."""
        self.scaler.scale(loss).backward()
        self.optimizer_step()

    def optimizer_step(self) -> None:
        """Optimiser step with the gradients there are."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def loader(self) -> DataLoader:
        """Batches of the sampler's epoch, from its start on."""
        workers = self.args.workers
        return data_loader(
            self.dataset,
            batch_sampler=self.sampler,
            collate=self.collate,
            workers=workers,
            device=self.device,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers > 0 else None,
        )

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM ends the run after the step at hand; a killed data worker is an error that says so."""

        def stop(*_: object) -> None:
            self.stop_requested = True

        listens = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, stop) if listens else None
        try:
            yield
        except RuntimeError as error:
            # PyTorch raises this at any moment, from its handler of SIGCHLD.
            if not str(error).startswith("DataLoader worker"):
                raise
            raise worker_gone(error) from error
        finally:
            if listens:
                signal.signal(signal.SIGTERM, before)

    def exit_on_sigterm(self) -> NoReturn:
        """End the process: SIGTERM has come to one of the processes, and everything is saved.

        Raises:
            SystemExit: with the exit code of a process that SIGTERM ended.
        """
        last = self.folder / "last.pth"
        logger.warning("stopped by SIGTERM at step %d; go on from %s with --resume", self.progress.step, last)
        raise SystemExit(EXIT_TERMINATED)

    def train(self) -> dict[str, Any]:
        """Train to the last epoch; returns its record."""
        loader = self.loader()
        with self.signals(), deterministic(self.args.deterministic):
            try:
                return self.train_all_epochs(loader)
            finally:
                stop_workers(loader)

    def train_all_epochs(self, loader: DataLoader) -> dict[str, Any]:
        """See ``train``."""
        args, progress = self.args, self.progress
        mirror = args.wandb if is_main() else "disabled"
        tracker = WandbMirror(mirror, name=args.exp_name, folder=self.folder.path, config=vars(args))
        record: dict[str, Any] = {}
        hidden = not (is_main() and sys.stderr.isatty())
        bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", disable=hidden)
        while progress.epoch < args.epochs:
            record = self.train_one_epoch(loader, bar)
            if args.no_sync_bn:
                broadcast_tensors(self.model.buffers())
            if args.eval_every and (progress.epoch % args.eval_every == 0 or progress.epoch == args.epochs):
                record.update(self.evaluate())
            self.folder.append_metrics(record)
            self.save("last.pth")
            shown = "  ".join(f"{key} {value:.4g}" for key, value in record.items())
            logger.info(shown)
            tracker.log(record, step=progress.step)
            if any_rank(self.stop_requested) and progress.epoch < args.epochs:
                self.exit_on_sigterm()  # at once: whoever sent SIGTERM waits only so long
            self.folder.draw_curves()
        bar.close()
        tracker.finish()
        return record or broadcast_from_rank0(lambda: next(reversed(list(self.folder.metrics())), {}))

    def train_one_epoch(self, loader: DataLoader, bar: tqdm) -> dict[str, Any]:
        """The rest of the current epoch; returns its record for ``metrics.jsonl``."""
        args, progress, sampler = self.args, self.progress, self.sampler
        self.model.train()
        sampler.epoch, sampler.start = progress.epoch, progress.samples // sampler.global_batch
        pending: list[torch.Tensor] = []
        last = time.perf_counter()
        for batch in batches(loader):
            progress.waited += time.perf_counter() - last
            self.count_bad_samples(batch)
            pending.append(self.step(batch))
            progress.step += 1
            progress.samples += sampler.global_batch
            done = progress.samples // sampler.global_batch == len(sampler)
            due = args.save_every and progress.step % args.save_every == 0
            stop = any_rank(self.stop_requested)
            losses = self.flush_losses(pending) if due or done or stop or len(pending) == args.log_every else None
            progress.seconds += time.perf_counter() - last
            if losses:
                self.log_progress(bar, losses)
            if stop or (due and not done):
                self.save("last.pth")
            if stop:
                self.exit_on_sigterm()
            bar.update()
            last = time.perf_counter()  # saving is no training and no waiting for data
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            **{name: total / len(sampler) for name, total in zip(self.loss_names, progress.sums, strict=True)},
            "lr": self.optimizer.param_groups[0]["lr"],
            "shapes_per_s": progress.speed,
            "data_wait": progress.waiting,
        }
        progress.next_epoch()
        return record

    def flush_losses(self, pending: list[torch.Tensor]) -> list[float]:
        """Fetch the pending losses, the only wait for the device; stop if one is not finite.

        Returns:
            The mean of each, over the processes too.
        """
        losses = (all_reduce_sum(torch.stack(pending)) / world_size()).cpu()
        first = self.progress.step - len(pending)
        pending.clear()
        bad = (~losses.isfinite().all(1)).nonzero()
        if len(bad):
            raise self.not_finite("the loss is", first + int(bad[0]) + 1)
        # One after another, so that the sum does not depend on how often the losses are looked at.
        for step in losses.double().tolist():
            sums = self.progress.sums or [0.0] * len(step)
            self.progress.sums = [a + b for a, b in zip(sums, step, strict=True)]
        return losses.mean(0).tolist()

    def not_finite(self, what: str, step: int) -> UserError:
        """The error for a run that went astray."""
        return UserError(
            f"{what} not finite at step {step} (epoch {self.progress.epoch + 1}); {self.folder / 'last.pth'} is from "
            "before it, if it exists. Try a lower --lr, --amp bf16 or off, or look for broken clouds with "
            "python -m data.check_data"
        )

    def log_progress(self, bar: tqdm, losses: list[float]) -> None:
        """Progress: on the bar where somebody looks, as lines elsewhere."""
        progress = self.progress
        rate = self.optimizer.param_groups[0]["lr"]
        bar.set_description(f"epoch {progress.epoch + 1}/{self.args.epochs}")
        bar.set_postfix_str(
            f"loss {losses[0]:.3f}, lr {rate:.1e}, {progress.speed:.1f} shapes/s, "
            f"{progress.waiting:.0%} waiting for data"
        )
        if bar.disable:
            left = (self.total_steps - progress.step) * self.sampler.global_batch / progress.speed
            shown = " ".join(f"{n.removeprefix('loss_')} {v:.4f}" for n, v in zip(self.loss_names, losses, strict=True))
            logger.info(
                "epoch %d/%d step %d/%d %s lr %.2e %.1f shapes/s data wait %.0f%% left %s",
                *(progress.epoch + 1, self.args.epochs, progress.step, self.total_steps, shown, rate, progress.speed),
                *(100 * progress.waiting, tqdm.format_interval(left)),
            )

    @main_only
    def save(self, name: str) -> None:
        """Write a checkpoint into the run folder; never one with weights that are not finite."""
        floats = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in floats]).all():
            raise self.not_finite("some weights are", self.progress.step)
        payload = {
            "kind": self.kind,
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "global_batch": self.sampler.global_batch,
            "shapes": self.fingerprint(),
            "random": random_states(),
            **self.provenance(),
        }
        with postponed(signal.SIGCHLD):
            save_checkpoint(
                self.folder / name, payload, keep=self.folder / "previous.pth" if name == "last.pth" else None
            )

    def provenance(self) -> dict[str, Any]:
        """What a result depends on besides the data."""
        return {
            "arguments": vars(self.args),
            "processes": world_size(),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def changes_since(self, payload: Mapping[str, Any]) -> list[str]:
        """What is set otherwise than in a checkpoint's run, of what changes the result."""
        before, now = payload["arguments"], vars(self.args)
        names = sorted(key for key in now if key not in self.free_on_resume and before.get(key, now[key]) != now[key])
        changes = [f"--{key} {before[key]} there, {now[key]} here" for key in names]
        there, here, batch = payload.get("processes", 1), world_size(), payload["global_batch"]
        own, rest = divmod(batch, here * self.sampler.parts)
        if batch != self.sampler.global_batch:
            changes.append(
                f"--batch_size {before['batch_size']} in {there} process(es) there, "
                f"{self.args.batch_size} in {here} here, a global batch of {self.sampler.global_batch}, not {batch}: "
                + (f"{here} processes cannot share it" if rest else f"--batch_size {own} fits")
            )
        if self.args.no_sync_bn and there != here:
            changes.append(f"--no_sync_bn in {there} process(es) there, {here} here")
        return changes

    def resume(self, resume: str | None) -> bool:
        """Take up a run where its checkpoint stands.

        Args:
            resume: see ``RunFolder.to_resume``.

        Returns:
            Whether there is one.

        Raises:
            CheckpointError: one that cannot be read, of another kind, other settings, or other data.
        """
        found = self.folder.to_resume(resume)
        if found is None:
            return False
        path, payload = found
        with checkpoint_errors(path):
            self.load_state(payload, path)
        # In a new folder, or after the file was lost, the next score is the best there is.
        if not broadcast_from_rank0(self.folder.has_best):
            self.progress.best, self.progress.best_epoch = Progress.best, Progress.best_epoch
        self.folder.cut_metrics(self.progress.epoch)
        logger.info("resumed %s: %d epochs and %d steps done", path, self.progress.epoch, self.progress.step)
        return True

    def load_state(self, payload: Mapping[str, Any], path: Path) -> None:
        """See ``resume``."""
        if payload.get("kind") != self.kind or "optimizer" not in payload:
            kind = self.kind.removeprefix("crossnet-")
            raise CheckpointError(f"{path} is no {kind} checkpoint: --resume needs a last.pth of this script")
        changes = ", ".join(self.changes_since(payload))
        if changes:
            raise CheckpointError(
                f"{path} was trained with other settings ({changes}): repeat them, or start a new run"
            )
        if payload["shapes"] != self.fingerprint():
            raise CheckpointError(f"{path} was trained on other shapes than {self.args.data_root} holds")
        self.load_weights(payload, path)
        load_optimizer(self.optimizer, payload["optimizer"])
        self.scaler.load_state_dict(payload["scaler"])
        restore_random_states(payload["random"])
        self.progress = Progress(**payload["progress"])
