"""Task (what to train, independent of the loop) and Run (the state of its training)."""

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

# Settings that may change when a run resumes, since they do not affect what it learns.
FREE_ON_RESUME = {
    *("data_root", "device", "workers", "json", "exp_name", "output_dir", "resume", "overwrite", "wandb", "log_every"),
    *("save_every", "keep_every", "test_batch_size", "deterministic"),
    "batch_size",  # per process; the global batch is checked instead
}


@dataclass
class Progress:
    """Progress of a run: all that a checkpoint stores besides weights, optimizer and random states."""

    epoch: int = 0  # completed epochs
    step: int = 0  # completed optimizer steps
    samples: int = 0  # samples consumed in the current epoch, over all processes
    seconds: float = 0.0  # spent on the current epoch
    waited: float = 0.0  # part of these seconds spent waiting for data
    sums: list[float] = field(default_factory=list)  # sum of each loss over the steps of the epoch
    best: float = -math.inf  # best score on the selection set
    best_epoch: int = 0  # epoch of the best score; 0 = none yet
    bad: int = 0  # unreadable samples so far
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
        """Fraction of the current epoch's time spent waiting for data."""
        return self.waited / self.seconds

    def next_epoch(self) -> None:
        """Count an epoch and reset its sums."""
        self.epoch += 1
        self.samples, self.seconds, self.waited, self.sums = 0, 0.0, 0.0, []


class Task(ABC):
    """Model, data set and the gradients of a batch.

    With several processes, each has the same weights and processes its share of every batch.

    Args:
        config: settings of the run.
        device: device to train on.

    Attributes:
        kind: written to checkpoints; a run resumes only from its own kind.
        loss_names: names of the losses from ``forward_backward``, in order; the first one is minimized.
        free_on_resume: settings that may change when a run resumes.
        own_settings: of settings that list the runs of a call, this run's value; a checkpoint fits if its list has it.
        added_settings: settings that checkpoints of earlier versions lack, with the values these versions implied.
        collate: makes a batch of samples; None means PyTorch's default.
        model, dataset, sampler: set by the subclass.
        network: the model wrapped by ``wrap_distributed``, which averages gradients over the processes.
    """

    kind: str
    loss_names: tuple[str, ...] = ("loss",)
    free_on_resume: Collection[str] = FREE_ON_RESUME
    own_settings: Mapping[str, Any] = MappingProxyType({})
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
        """Return advice on how to train further from a checkpoint, for a message."""
        return "a new run with another --exp_name can have any --epochs"

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.config.epochs * len(self.sampler)

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""

    @abstractmethod
    def forward_backward(
        self, part: Any, progress: Progress, *, scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Accumulate the gradients of a part in the parameters.

        Args:
            part: a batch, or one of ``parts``.
            progress: progress of the run; randomness depends only on its epoch and on the samples.
            scale: loss scaling to apply before the backward pass.

        Returns:
            The losses in the order of ``loss_names``, detached, on the device.
        """

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """Return the checkpoint entries of the model."""

    @abstractmethod
    def load_weights(self, payload: Mapping[str, Any], path: Path) -> None:
        """Load the entries that ``weights`` returned."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that identifies the training samples and their order."""

    def parts(self, batch: Any) -> Iterator[tuple[Any, bool]]:
        """Yield the parts of a step, each with whether it is the last."""
        yield batch, True

    def selection(self, flags: Mapping[str, Any]) -> Any:
        """Return the flags that define the score behind ``best.pth``; only scores of one definition compare."""
        return flags.get("select_on")

    def count_bad_samples(self, batch: Any, progress: Progress) -> None:  # noqa: B027 - most have none
        """Count unreadable samples of a batch, before its step."""

    def kept_weights(self) -> dict[str, Any]:
        """Return the entries of ``step_<n>.pth``."""
        return self.weights()

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Return cheap scores after every epoch, and the one that selects ``best.pth``, or None."""
        return {}, None

    def evaluate(self) -> tuple[dict[str, float], float | None]:
        """Return scores every ``eval_every`` epochs, and the one that selects ``best.pth``, or None."""
        return {}, None

    def wrap_distributed(self, model: nn.Module) -> nn.Module:
        """Synchronize batch statistics over all processes, and wrap the model so that gradients are averaged."""
        if world_size() > 1 and not self.config.no_sync_bn:
            SyncBatchNorm.convert(model)
        return wrap_ddp(model)

    def sampler_of(self, size: int, batch: int, *, parts: int = 1, keep_rest: bool = False) -> ResumableSampler:
        """Return a sampler for this process, with ``batch`` samples per process and part of a step.

        ``keep_rest`` keeps the incomplete last batch, if it has at least two samples for each batch norm.
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
    """Training state of a task: run folder, optimizer, loss scaler and progress.

    Args:
        task: the task to train.
        folder: the run folder; only the main process writes to it.
    """

    def __init__(self, task: Task, folder: RunFolder) -> None:
        self.task, self.config, self.folder = task, task.config, folder
        self.optimizer = build_optimizer(task.model, task.config)
        self.scaler = grad_scaler(task.device, task.config.amp)
        self.progress = Progress()

    def step(self, batch: Any) -> torch.Tensor:
        """Run one optimizer step on a batch of the loader; return the losses, on the device."""
        task, losses = self.task, []
        set_learning_rate(self.optimizer, task.learning_rate(self.progress.step))
        for part, last in task.parts(batch):
            with sync_gradients_if(task.network, last):
                losses.append(task.forward_backward(part, self.progress, scale=self.scaler.scale))
        self.optimizer_step()
        return torch.stack(losses).mean(0)

    def optimizer_step(self) -> None:
        """Apply the accumulated gradients and reset them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, what: str, step: int) -> UserError:
        """Return the error for a loss or weight that is not finite."""
        return UserError(
            f"{what} not finite at step {step} (epoch {self.progress.epoch + 1}); {self.folder / 'last.pth'} is from "
            "before it, if it exists. Try a lower --lr, --amp bf16 or off, or look for broken clouds with "
            "python -m data.check_data"
        )
