"""The settings of a run, typed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from utils.cli import CommonSettings, flag, non_negative_int, positive_int, run_name, workers_flag
from utils.collectives import world_size
from utils.reproducible import provenance


@dataclass(kw_only=True)
class RunConfig(CommonSettings):
    """Settings of the loop, its checkpoints and its optimizer; scripts add theirs.

    Attributes:
        flags: every flag of the script by name, as written to ``config.json`` and checkpoints.
        accumulate: batches per optimizer step, whose gradients are averaged.
        keep_every: steps between the ``step_<n>.pth`` that are kept, 0 for none.
    """

    flags: dict[str, Any]
    workers: int = workers_flag()
    exp_name: str = flag("crossnet", group="run", type=run_name, metavar="NAME", help="name of the run folder")
    output_dir: str = flag("checkpoints", metavar="DIR", help="parent of the run folders")
    resume: str | None = flag(
        exclusive="start",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="continue from the run's newest valid checkpoint (auto, or no value) or from PATH, also mid-epoch",
    )
    overwrite: bool = flag(False, exclusive="start", help="replace an existing run of this name")
    save_every: int = flag(
        500,
        type=non_negative_int,
        metavar="STEPS",
        help="also save every STEPS steps within an epoch; 0 saves only at its end",
    )
    log_every: int = flag(20, type=positive_int, metavar="STEPS", help="log every N steps")
    wandb: str = flag("disabled", choices=("disabled", "offline", "online"), help="mirror to Weights & Biases")
    no_sync_bn: bool = flag(
        False, help="under torchrun: batch-norm statistics per process instead of over the global batch"
    )
    deterministic: bool = flag(False, help="use deterministic algorithms where the GPU has them; slower")
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
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.deterministic:  # now: cuBLAS reads it when it starts, at the latest in the check of the kernels
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def provenance(self) -> dict[str, Any]:
        """Return everything but the data that the run's results depend on."""
        return provenance(arguments=self.flags, processes=world_size())

    def resolve(self, **values: Any) -> None:
        """Replace requested values by those in use, in checkpoints too."""
        for name, value in values.items():
            setattr(self, name, value)
        self.flags.update(values)
