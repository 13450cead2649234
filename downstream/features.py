"""Extract frozen features of labeled clouds, and calibrate batch norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from models.base import pooled_features
from utils.errors import UserError
from utils.progress import progress as report


def check_neighbors(encoder: nn.Module, points: int, *, name: str = "the encoder") -> None:
    """Check that a cloud has at least as many points as the encoder has neighbors.

    Raises:
        UserError: it has fewer.
    """
    k = getattr(encoder, "k", 0)
    if k > points:
        raise UserError(
            f"{name}: k = {k} neighbors in clouds of {points} points; use more points (--num_points) or a smaller k"
        )


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the mode of every module on exit."""
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
    """Yield (B, N, C) batches of nearly equal size, at most ``batch_size`` unless one would fall below ``smallest``."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for part in np.array_split(points, min(-(-len(points) // batch_size), len(points) // smallest)):
        yield torch.from_numpy(np.ascontiguousarray(part)).to(device, dtype)


def _move_encoder(
    encoder: nn.Module, points: np.ndarray, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    """Move the encoder and return its device and dtype."""
    if points.ndim != 3 or not len(points):
        raise ValueError(f"points must be (n, N, C) with n > 0, got {points.shape}")
    parameter = next(encoder.parameters())
    if device is not None:
        encoder.to(device)
        parameter = next(encoder.parameters())
    return parameter.device, parameter.dtype


def _bar(total: int, progress: bool, text: str) -> tqdm:
    """Return a progress bar, hidden unless ``progress``."""
    return report(total=total, text=text, unit="clouds", leave=False, hidden=not progress)


def extract_features(
    encoder: nn.Module,
    points: np.ndarray,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = True,
    text: str = "features",
) -> np.ndarray:
    """Run a frozen encoder over clouds and return its pooled features, before any projection head.

    Clouds are used as stored; only the encoder may center them. Gradients are off, batch norm uses its running
    statistics, and the encoder's training mode is restored.

    Args:
        encoder: maps (B, C, N) to ``PointFeatures``.
        points: (n, N, C).
        batch_size: clouds per forward pass; affects speed and memory, not the features.
        device: the encoder is moved there; None leaves it where it is.
        progress: whether to show a bar.
        text: title of the bar.

    Returns:
        (n, D) float32.

    Raises:
        UserError: a feature is not finite.
        ValueError: there are no clouds, or the batch size is below 1.
    """
    device, dtype = _move_encoder(encoder, points, device)
    features = []
    with evaluating(encoder), _bar(len(points), progress, text) as bar:
        for batch in _batches(points, batch_size, device, dtype):
            features.append(pooled_features(encoder, batch).float().cpu().numpy())  # (B, D)
            bar.update(len(batch))
    result = np.concatenate(features)
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise UserError(
            f"the encoder gives features that are not finite for {len(bad)} of {len(result)} clouds; "
            "its weights or batch-norm statistics are damaged: use another checkpoint"
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
    progress: bool = True,
) -> int:
    """Set an encoder's batch-norm statistics from unlabeled clouds in one pass, without changing weights.

    A randomly initialized network has mean 0 and variance 1 in every batch norm, which squashes its features and makes
    it an unfair baseline. Each statistic becomes the plain average over the batches. Dropout stays off.

    Args:
        encoder: modified in place: only running statistics and the number of batches.
        points: (n, N, 3) training clouds.
        max_clouds: use at most this many, drawn without replacement.
        batch_size: clouds per batch of statistics; a batch of one is avoided.
        seed: of the draw and order.
        device: the encoder is moved there; None leaves it where it is.
        progress: whether to show a bar.

    Returns:
        The number of clouds used; 0 if the encoder has no batch norm.

    Raises:
        ValueError: there are fewer than two clouds (a batch of one has no variance).
    """
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    chosen = np.random.default_rng(seed).permutation(len(points))[:max_clouds]
    if len(chosen) < 2:
        raise ValueError(f"batch statistics need at least two clouds, got {len(chosen)}")
    device, dtype = _move_encoder(encoder, points, device)
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(encoder), _bar(len(chosen), progress, "batch-norm statistics") as bar:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in _batches(points[chosen], batch_size, device, dtype, smallest=2):
                pooled_features(encoder, batch)
                bar.update(len(batch))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(chosen)
