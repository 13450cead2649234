"""Where a run stands, and what may differ between it and its continuation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

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
    best: float = -1.0  # best score on the selection set
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
