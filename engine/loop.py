"""The training loop of pretraining and fine-tuning."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.faults import Stop, batches, data_workers, exit_after_sigterm, log_interrupt, stop_on_sigterm
from engine.resume import keep, save
from engine.run_folder import WandbMirror
from engine.task import Run
from utils.collectives import all_reduce_sum, any_rank, broadcast_from_rank0, broadcast_tensors, is_main, world_size
from utils.reproducible import deterministic

logger = logging.getLogger("crossnet")


def train(run: Run) -> dict[str, Any]:
    """Train to the last epoch; return its record.

    Raises:
        SystemExit: one of the processes received SIGTERM; everything is saved.
        UserError: a loss or a weight is not finite, or a data worker died.
    """
    first = run.progress.step
    try:
        return train_all_epochs(run)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            log_interrupt(run)
        if run.progress.step == first:
            run.folder.discard_start()
        raise
    finally:
        run.folder.unlock()


def train_all_epochs(run: Run) -> dict[str, Any]:
    """Train to the last epoch; the part of ``train`` that may fail."""
    task, config, progress = run.task, run.config, run.progress
    meter, record = Meter(run), {}
    with stop_on_sigterm() as stop, deterministic(config.deterministic), data_workers(task) as loader:
        while progress.epoch < config.epochs:
            train_epoch(run, loader, meter, stop)
            record = meter.end_epoch()
            if config.no_sync_bn:
                broadcast_tensors(task.model.buffers())
            record |= evaluate(run)
            run.folder.append_metrics(record)
            save(run, "last.pth")
            meter.log_epoch(record)
            if any_rank(stop.requested) and progress.epoch < config.epochs:
                exit_after_sigterm(run)  # now: schedulers send SIGKILL soon after SIGTERM
            run.folder.draw_curves()
    meter.close()
    if not record and not (run.folder / "last.pth").exists():
        save(run, "last.pth")  # resumed a finished run from best.pth, since last.pth was damaged
    return record or broadcast_from_rank0(lambda: next(reversed(list(run.folder.metrics())), {}))


def train_epoch(run: Run, loader: DataLoader, meter: Meter, stop: Stop) -> None:
    """Train the rest of the current epoch, with checkpoints every ``save_every`` and ``keep_every`` steps."""
    task, config, progress, sampler = run.task, run.config, run.progress, run.task.sampler
    task.model.train()
    sampler.epoch, sampler.start = progress.epoch, progress.samples // sampler.global_batch
    for batch in meter.timed(loader):
        task.count_bad_samples(batch, progress)
        losses = run.step(batch)
        if progress.samples == 0:
            run.folder.keep_start()
        progress.step += 1
        progress.samples += sampler.global_batch
        ends = progress.samples // sampler.global_batch == len(sampler)
        save_now = config.save_every and progress.step % config.save_every == 0
        stops = any_rank(stop.requested)
        meter.add(losses, flush=save_now or ends or stops)
        if config.keep_every and progress.step % config.keep_every == 0:
            keep(run)
        if stops or (save_now and not ends):
            save(run, "last.pth")
        if stops:
            exit_after_sigterm(run)


def evaluate(run: Run) -> dict[str, float]:
    """Score the task as far as it is due; keep the weights as ``best.pth`` if they are the best so far."""
    task, config, progress, record = run.task, run.config, run.progress, {}
    due = config.eval_every and (progress.epoch % config.eval_every == 0 or progress.epoch == config.epochs)
    for evaluation in (task.validate, task.evaluate) if due else (task.validate,):
        scores, score = evaluation()
        record |= scores
        if score is not None and score > progress.best:
            progress.best, progress.best_epoch = score, progress.epoch
            save(run, "best.pth")
    return record


class Meter:
    """Losses, times and the log of a run; losses stay on the device until they are flushed."""

    def __init__(self, run: Run) -> None:
        self.run, self.pending, self.last = run, [], 0.0
        config = run.config
        mirror = config.wandb if is_main() else "disabled"
        self.tracker = WandbMirror(mirror, name=config.exp_name, folder=run.folder.path, config=config.flags)
        hidden = not (is_main() and sys.stderr.isatty())
        self.bar = tqdm(total=run.task.total_steps, initial=run.progress.step, unit="step", disable=hidden)

    def timed(self, loader: DataLoader) -> Iterator[Any]:
        """Yield batches; the time until each arrives counts as waiting."""
        self.last = time.perf_counter()
        for batch in batches(loader):
            self.run.progress.waited += time.perf_counter() - self.last
            yield batch
            self.bar.update()
            self.last = time.perf_counter()  # saving counts neither as training nor as waiting

    def add(self, losses: torch.Tensor, *, flush: bool) -> None:
        """Add a step's losses; flush and log every ``log_every`` steps, or on request."""
        progress = self.run.progress
        self.pending.append(losses)
        fetched = self.flush() if flush or len(self.pending) == self.run.config.log_every else None
        progress.seconds += time.perf_counter() - self.last
        if fetched:
            self.log_progress(fetched)

    def flush(self) -> list[float]:
        """Fetch the pending losses: the only device synchronization of the loop.

        Returns:
            The mean of each loss, over the processes too.

        Raises:
            UserError: a loss is not finite.
        """
        progress = self.run.progress
        losses = (all_reduce_sum(torch.stack(self.pending)) / world_size()).cpu()
        first = progress.step - len(self.pending)
        self.pending.clear()
        bad = (~losses.isfinite().all(1)).nonzero()
        if len(bad):
            raise self.run.not_finite("the loss is", first + int(bad[0]) + 1)
        # Sequentially, so that the sum does not depend on how often losses are fetched.
        for step in losses.double().tolist():
            sums = progress.sums or [0.0] * len(step)
            progress.sums = [a + b for a, b in zip(sums, step, strict=True)]
        return losses.mean(0).tolist()

    def end_epoch(self) -> dict[str, Any]:
        """Finish an epoch; return its record for ``metrics.jsonl``."""
        task, progress = self.run.task, self.run.progress
        steps = len(task.sampler)
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            **{name: total / steps for name, total in zip(task.loss_names, progress.sums, strict=True)},
            "lr": self.run.optimizer.param_groups[0]["lr"],
            "shapes_per_s": progress.speed,
            "data_wait": progress.waiting,
        }
        progress.next_epoch()
        return record

    def log_progress(self, losses: list[float]) -> None:
        """Show the losses on the progress bar, or as log lines outside a terminal."""
        task, progress, epochs = self.run.task, self.run.progress, self.run.config.epochs
        rate = self.run.optimizer.param_groups[0]["lr"]
        self.bar.set_description(f"epoch {progress.epoch + 1}/{epochs}")
        self.bar.set_postfix_str(
            f"loss {losses[0]:.3f}, lr {rate:.1e}, {progress.speed:.1f} shapes/s, "
            f"{progress.waiting:.0%} waiting for data"
        )
        if self.bar.disable:
            left = (task.total_steps - progress.step) * task.sampler.global_batch / progress.speed
            shown = " ".join(f"{n.removeprefix('loss_')} {v:.4f}" for n, v in zip(task.loss_names, losses, strict=True))
            logger.info(
                "epoch %d/%d step %d/%d %s lr %.2e %.1f shapes/s data wait %.0f%% left %s",
                *(progress.epoch + 1, epochs, progress.step, task.total_steps, shown, rate, progress.speed),
                *(100 * progress.waiting, tqdm.format_interval(left)),
            )

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Log an epoch's record and mirror it."""
        logger.info("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
        self.tracker.log(record, step=self.run.progress.step)

    def close(self) -> None:
        """Close the progress bar and the mirror."""
        self.bar.close()
        self.tracker.finish()
