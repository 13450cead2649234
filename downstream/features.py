"""Frozen features of labelled clouds: the sets and their readers, running the encoder, batch-norm calibration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from datasets.hdf5 import SPLITS, LabelledClouds
from datasets.modelnet import (
    DEMO_FOLDER,
    MODELNET10_LABELS,
    MODELNET_FOLDER,
    DemoShapes,
    ModelNet10,
    ModelNet40,
    find_hdf5_folder,
    listed_files,
)
from datasets.scanobjectnn import ScanObjectNN, candidate_files
from utils.errors import DataError, UserError

CLASSIFICATION_SETS = ("modelnet40", "modelnet10", "scanobjectnn", "demo")


def open_classification_set(
    name: str, root: str | Path, split: str, *, variant: str = "OBJ_BG", num_points: int | None = None
) -> LabelledClouds:
    """Open one split of a classification set by its command-line name.

    Args:
        name: one of ``CLASSIFICATION_SETS``.
        root: folder that holds the set.
        split: ``"train"`` or ``"test"``.
        variant: of ScanObjectNN; the other sets have none.
        num_points: keep the first rows of every cloud; None keeps all.

    Raises:
        ValueError: unknown name.
        DataError: a file is missing or wrong.
        UserError: ``num_points`` is larger than the clouds, or unknown variant.
    """
    if name == "scanobjectnn":
        return ScanObjectNN(root, split, variant=variant, num_points=num_points)
    readers = {"modelnet40": ModelNet40, "modelnet10": ModelNet10, "demo": DemoShapes}
    if name not in readers:
        raise ValueError(f"classification set must be one of {CLASSIFICATION_SETS}, got {name!r}")
    return readers[name](root, split, num_points=num_points)


def find_datasets(data_root: str | Path) -> list[str]:
    """Return the names of the classification sets whose files lie in ``data_root``, in the order of the table.

    Places are looked at here, contents when a set is opened; only files in ModelNet40's layout that hold nothing but
    ModelNet10's classes are told apart: they count as ``modelnet10`` alone. ScanObjectNN counts in the variant OBJ_BG.
    """

    def complete(folder_name: str) -> Path | None:
        folder = find_hdf5_folder(data_root, folder_name)
        try:
            return folder if folder is not None and all(listed_files(folder, split) for split in SPLITS) else None
        except DataError:
            return None

    found = []
    if complete(MODELNET_FOLDER):
        try:
            labels = np.unique(ModelNet40(data_root, "test", num_points=1).labels)
        except UserError:
            labels = np.array([])  # a damaged file is reported by whoever opens the set
        if not np.isin(labels, MODELNET10_LABELS).all() or not len(labels):
            found.append("modelnet40")
        found.append("modelnet10")
    if all(any(file.is_file() for file in candidate_files(data_root, split, "OBJ_BG")) for split in SPLITS):
        found.append("scanobjectnn")
    if (Path(data_root) / DEMO_FOLDER).is_dir() and complete(DEMO_FOLDER):
        found.append("demo")
    return found


def check_neighbours(encoder: nn.Module, points: int, *, name: str = "the encoder") -> None:
    """Stop where an encoder looks for more neighbours than a cloud has points.

    Raises:
        UserError: see above.
    """
    k = getattr(encoder, "k", 0)
    if k > points:
        raise UserError(f"{name}: k = {k} neighbours in clouds of {points} points; choose --k or --num_points to fit")


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _batches(
    points: np.ndarray, batch_size: int, device: torch.device, dtype: torch.dtype, *, smallest: int = 1
) -> Iterator[torch.Tensor]:
    """Yield (B, 3, N) batches of nearly equal size, at most ``batch_size`` unless one would fall below ``smallest``."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for part in np.array_split(points, min(-(-len(points) // batch_size), len(points) // smallest)):
        yield torch.from_numpy(np.ascontiguousarray(part)).to(device, dtype).transpose(1, 2)


def _place(
    encoder: nn.Module, points: np.ndarray, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    """Move the encoder, return where it is and in which precision."""
    if points.ndim != 3 or not len(points):
        raise ValueError(f"points must be (n, N, C) with n > 0, got {points.shape}")
    parameter = next(encoder.parameters())
    if device is not None:
        encoder.to(device)
        parameter = next(encoder.parameters())
    return parameter.device, parameter.dtype


def _bar(total: int, progress: bool | None, text: str) -> tqdm:
    """Progress bar; ``None`` shows it when standard error is a terminal."""
    hidden = not sys.stderr.isatty() if progress is None else not progress
    return tqdm(total=total, desc=text, unit="clouds", disable=hidden, leave=False)


def extract_features(
    encoder: nn.Module,
    points: np.ndarray,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    text: str = "features",
) -> np.ndarray:
    """Run a frozen encoder over clouds and return its pooled features, those before any projection head.

    Clouds enter as they are stored; whatever centring there is, the encoder does. Gradients are off, batch norm uses
    its running statistics, and the encoder's training mode is as before afterwards.

    Args:
        encoder: maps (B, 3, N) to something with ``pooled`` (B, D).
        points: (n, N, 3).
        batch_size: clouds per forward pass; it changes speed and memory, not the features.
        device: where to run, the encoder is moved there; None leaves it where it is.
        progress: True or False shows or hides the bar, None shows it on a terminal.
        text: the bar's title.

    Returns:
        (n, D) float32.

    Raises:
        UserError: a feature is not finite.
        ValueError: no clouds, or a batch size below 1.
    """
    device, dtype = _place(encoder, points, device)
    features = []
    with frozen(encoder), _bar(len(points), progress, text) as bar:
        for batch in _batches(points, batch_size, device, dtype):
            features.append(encoder(batch).pooled.float().cpu().numpy())
            bar.update(len(batch))
    result = np.concatenate(features)
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise UserError(
            f"the encoder gives features that are not finite for {len(bad)} of {len(result)} clouds; "
            "its weights or batch-norm statistics are damaged"
        )
    return result


def calibrate_batch_norm(
    encoder: nn.Module,
    points: np.ndarray,
    *,
    max_clouds: int = 512,
    batch_size: int = 32,
    seed: int = 1,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> int:
    """Set an encoder's batch-norm statistics from unlabelled clouds, in one pass; no weight changes.

    A randomly initialised network still has mean 0 and variance 1 in every batch norm, which squashes its features: as
    a baseline it is unfair. Each statistic becomes the plain average over the batches. Dropout stays off.

    Args:
        encoder: changed in place: running statistics and the count of batches, nothing else.
        points: (n, N, 3) training clouds.
        max_clouds: use at most this many, drawn without replacement.
        batch_size: clouds whose statistics are taken together; a batch of one is avoided.
        seed: of the draw and order.
        device: where to run; None leaves the encoder where it is.
        progress: as in :func:`extract_features`.

    Returns:
        The number of clouds used; 0 when the encoder has no batch norm and is left alone.

    Raises:
        ValueError: fewer than two clouds (a batch of one has no statistics).
    """
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    chosen = np.random.default_rng(seed).permutation(len(points))[:max_clouds]
    if len(chosen) < 2:
        raise ValueError(f"batch statistics need at least two clouds, got {len(chosen)}")
    device, dtype = _place(encoder, points, device)
    momenta = [norm.momentum for norm in norms]
    try:
        with frozen(encoder), _bar(len(chosen), progress, "batch-norm statistics") as bar:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in _batches(points[chosen], batch_size, device, dtype, smallest=2):
                encoder(batch)
                bar.update(len(batch))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(chosen)
