"""The settings of a run, typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.cli import Settings
from utils.collectives import world_size
from utils.reproducible import provenance


@dataclass(kw_only=True)
class RunConfig(Settings):
    """Settings of the loop, its checkpoints and its optimizer; scripts add theirs.

    Attributes:
        flags: every flag of the script by name, as written to ``config.json`` and checkpoints.
        accumulate: batches per optimizer step, whose gradients are averaged.
    """

    flags: dict[str, Any]
    data_root: str
    device: str
    workers: int
    seed: int
    json: str | None
    exp_name: str
    output_dir: str
    resume: str | None
    overwrite: bool
    save_every: int
    log_every: int
    wandb: str
    no_sync_bn: bool
    deterministic: bool
    epochs: int
    batch_size: int
    test_batch_size: int
    lr: float
    use_sgd: bool
    momentum: float
    weight_decay: float
    amp: str
    eval_every: int
    select_on: str
    accumulate: int = 1

    def provenance(self) -> dict[str, Any]:
        """Return everything but the data that the run's results depend on."""
        return provenance(arguments=self.flags, processes=world_size())

    def resolve(self, **values: Any) -> None:
        """Replace requested values by those in use, in checkpoints too."""
        for name, value in values.items():
            setattr(self, name, value)
        self.flags.update(values)
