"""Run train_crossnet_con.py with an image network of a few thousand weights, in this process or in a separate one.

Checkpoints with two ResNets and Adam's moments take hundreds of megabytes, and tests of the loop do not depend on the
image network. ``python -m tests.support.small_run ARGUMENTS`` runs the script with that network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.reference.tiny_image_net import TinyImageNet
from engine.launch import launch
from engine.run_folder import RunFolder
from models.image import IMAGE_ENCODERS
from train_crossnet_con import main

SETTINGS = (
    "--device cpu --num_points 24 --k 4 --emb_dims 16 --image_model resnet18 --image_size 16 --batch_size 4 "
    "--workers 0 --eval_points 24 --log_every 1"
)


@contextlib.contextmanager
def small_runs(*, curves: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """Train with the tiny image network inside, by default without pictures of the curves (a second per epoch)."""
    with pytest.MonkeyPatch.context() as patch:
        make_runs_small(patch, curves=curves)
        yield patch


def make_runs_small(patch: pytest.MonkeyPatch, *, curves: bool = False) -> None:
    """Patch in the tiny image network and, unless ``curves``, leave out pictures of the curves."""
    patch.setitem(IMAGE_ENCODERS, "resnet18", TinyImageNet)
    if not curves:
        patch.setattr(RunFolder, "draw_curves", lambda self: None)


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a run with a fraction of a second per step; later flags override."""
    settings = SETTINGS.split()
    if any(str(word).startswith("pointnet") for word in more):
        del settings[settings.index("--k") : settings.index("--k") + 2]
    return [*settings, "--data_root", str(root), "--output_dir", str(out), *map(str, more)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with small_runs(curves=True):
        launch(main)
