"""What a run is made of: a task, which never calls the loop, and what changes from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from datasets.sampler import ResumableSampler
from engine.config import RunConfig
from engine.optim import build_optimizer, grad_scaler, set_learning_rate
from engine.run_folder import RunFolder
from models.ops.backend import agree_on_kernels
from models.ops.batch_norm import SyncBatchNorm
from utils.collectives import rank, sync_gradients_if, world_size, wrap_ddp
from utils.errors import UserError

# Settings that may differ between a run and its continuation: they change nothing that is learned.
FREE_ON_RESUME = {
    *("data_root", "device", "workers", "json", "exp_name", "output_dir", "resume", "overwrite", "wandb", "log_every"),
    *("save_every", "test_batch_size", "deterministic"),
    "batch_size",  # per process: what counts is the global batch
}


@dataclass
class Progress:
    """Where a run stands; everything that a checkpoint needs besides weights and optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps done
    samples: int = 0  # samples consumed in the current epoch, over all processes
    seconds: float = 0.0  # spent on the current epoch
    waited: float = 0.0  # of which waiting for data
    sums: list[float] = field(default_factory=list)  # each loss over the epoch's steps
    best: float = -math.inf  # best score on the selection set
    best_epoch: int = 0  # and the epoch it is of; 0 = none yet
    bad: int = 0  # unreadable samples met so far
    read: int = 0  # samples read so far

    def __post_init__(self) -> None:
        kinds = {"int": int, "float": (int, float), "list[float]": list}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, kinds[entry.type]) or (entry.type == "int" and value < 0):
                raise ValueError(f"{entry.name} = {value!r}")

    @property
    def speed(self) -> float:
        """Samples per second in the current epoch."""
        return self.samples / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the current epoch's time spent waiting for data."""
        return self.waited / self.seconds

    def next_epoch(self) -> None:
        """Count an epoch and start the sums again."""
        self.epoch += 1
        self.samples, self.seconds, self.waited, self.sums = 0, 0.0, 0.0, []


class Task(ABC):
    """What is trained, on what, and what the gradients of a batch are.

    Several processes hold the same weights and take their own share of every batch.

    Args:
        config: settings of the run.
        device: where to train.

    Attributes:
        kind: written into checkpoints; a run continues only from its own kind.
        loss_names: what ``forward_backward`` returns, in order; the first is the one that is minimized.
        free_on_resume: settings that may change between a run and its continuation.
        added_settings: settings that checkpoints of earlier versions lack, with what these versions did.
        collate: turns samples into a batch; None takes PyTorch's.
        model, dataset, sampler: set by the subclass.
        network: the model as ``wrap_distributed`` returns it, whose gradients are averaged over the processes.
    """

    kind: str
    loss_names: tuple[str, ...] = ("loss",)
    free_on_resume: Collection[str] = FREE_ON_RESUME
    added_settings: Mapping[str, Any] = MappingProxyType({})
    collate: Callable | None = None
    model: nn.Module
    network: nn.Module
    dataset: Dataset
    sampler: ResumableSampler

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        agree_on_kernels(device)

    def fresh_start(self, path: Path) -> str:
        """Return advice for training on from the weights in a checkpoint, for a message."""
        return "a new run with another --exp_name can have any --epochs"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * len(self.sampler)

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Rate of a step, counted from 0."""

    @abstractmethod
    def forward_backward(
        self, part: Any, progress: Progress, *, scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Add a part's gradients to the parameters'.

        Args:
            part: a batch, or one of ``parts``.
            progress: where the run is; everything random follows from its epoch and the samples.
            scale: loss scaling, to be applied to the loss before its backward pass.

        Returns:
            The losses in the order of ``loss_names``, detached, on the device.
        """

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """The checkpoint's part that is the model."""

    @abstractmethod
    def load_weights(self, payload: Mapping[str, Any], path: Path) -> None:
        """Load what ``weights`` gave."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Which samples are trained on, in which order."""

    def parts(self, batch: Any) -> Iterator[tuple[Any, bool]]:
        """The parts of a step, each with whether it is the last one."""
        yield batch, True

    def count_bad_samples(self, batch: Any, progress: Progress) -> None:  # noqa: B027 - most have none
        """Called for every batch before its step."""

    def after_step(self) -> None:  # noqa: B027 - most have none
        """Called after every optimizer step."""

    def averaged_weights(self) -> dict[str, Any] | None:
        """Return what ``weights`` would be with averaged weights in their place; None without an average."""
        return None

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Return the scores of every epoch, and the one that chooses ``best.pth``, or None. For what is cheap."""
        return {}, None

    def evaluate(self) -> tuple[dict[str, float], float | None]:
        """Scores every ``eval_every`` epochs, and the one that chooses ``best.pth``; None where nothing was scored."""
        return {}, None

    def wrap_distributed(self, model: nn.Module) -> nn.Module:
        """Make a model one over all processes: batch statistics, and the gradients of the module that is returned."""
        if world_size() > 1 and not self.config.no_sync_bn:
            SyncBatchNorm.convert(model)
        return wrap_ddp(model)

    def sampler_of(self, size: int, batch: int, *, parts: int = 1, keep_rest: bool = False) -> ResumableSampler:
        """Batches for this process, of ``batch`` samples for each process and each part of a step.

        ``keep_rest`` keeps the incomplete last batch, of two samples or more for each batch norm.
        """
        world = world_size()
        smallest = max(world, 2) if not self.config.no_sync_bn else 2 * world
        return ResumableSampler(
            size,
            global_batch=batch * world * parts,
            seed=self.config.seed,
            rank=rank(),
            world=world,
            parts=parts,
            smallest=smallest if keep_rest else None,
        )


class Run:
    """A task in training: its folder, and all that changes from step to step beside the weights.

    Args:
        task: what is trained.
        folder: the run folder; only the main process writes to it.
    """

    def __init__(self, task: Task, folder: RunFolder) -> None:
        self.task, self.config, self.folder = task, task.config, folder
        self.optimizer = build_optimizer(task.model, task.config)
        self.scaler = grad_scaler(task.device, task.config.amp)
        self.progress = Progress()

    def step(self, batch: Any) -> torch.Tensor:
        """One optimizer step on a batch of the loader; returns the losses, on the device."""
        task, losses = self.task, []
        set_learning_rate(self.optimizer, task.learning_rate(self.progress.step))
        for part, last in task.parts(batch):
            with sync_gradients_if(task.network, last):
                losses.append(task.forward_backward(part, self.progress, scale=self.scaler.scale))
        self.optimizer_step()
        return torch.stack(losses).mean(0)

    def optimizer_step(self) -> None:
        """Optimizer step with the gradients there are."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()

    def not_finite(self, what: str, step: int) -> UserError:
        """The error for a run that went astray."""
        return UserError(
            f"{what} not finite at step {step} (epoch {self.progress.epoch + 1}); {self.folder / 'last.pth'} is from "
            "before it, if it exists. Try a lower --lr, --amp bf16 or off, or look for broken clouds with "
            "python -m data.check_data"
        )
