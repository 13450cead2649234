"""Linear-SVM probe of the encoder during pretraining."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn

from datasets.registry import open_classification_set
from downstream.features import extract_features
from downstream.svm import linear_svm
from utils.collectives import broadcast_from_rank0, gather_to_rank0, rank, world_size
from utils.errors import DataError

HOLDOUT = 0.2  # share of the training clouds for ``val_accuracy``


class LinearProbe:
    """Linear SVM on frozen features, with part of the training labels held out to choose a checkpoint.

    Args:
        dataset: one of ``datasets.registry.CLASSIFICATION_SETS``.
        data_root: folder of the data set.
        num_points: points per cloud.
        c: C of the SVM.
        batch_size: clouds per forward pass.

    Raises:
        DataError: the data set is missing or wrong.
        UserError: its clouds have fewer than ``num_points`` points.
    """

    def __init__(
        self, dataset: str, data_root: str, *, num_points: int = 1024, c: float = 0.01, batch_size: int = 32
    ) -> None:
        self.dataset, self.c, self.batch_size = dataset, c, batch_size
        self.train = open_classification_set(dataset, data_root, "train", num_points=num_points)
        self.test = open_classification_set(dataset, data_root, "test", num_points=num_points)
        rows, labels = np.arange(len(self.train)), self.train.labels
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise DataError(f"{self.train.files[0]} holds clouds of one class only; the SVM needs at least two")
        # Keep every class in both parts if there are enough clouds.
        held = math.ceil(HOLDOUT * len(rows))
        stratify = labels if counts.min() > 1 and len(classes) <= min(held, len(rows) - held) else None
        # Fixed seed: every run and every epoch holds out the same clouds.
        self.fit, self.held_out = train_test_split(rows, test_size=HOLDOUT, random_state=0, stratify=stratify)

    def __call__(self, encoder: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Score the encoder: each rank extracts features of its share of the clouds, rank 0 fits the SVM.

        Returns:
            ``<dataset>_val_accuracy`` (held-out training clouds) and ``<dataset>_test_accuracy`` in percent.
        """
        train, test = (self.features(encoder, part.points, device) for part in (self.train, self.test))
        return broadcast_from_rank0(lambda: self.score(train, test))

    def features(self, encoder: nn.Module, points: np.ndarray, device: torch.device) -> np.ndarray:
        """Return features (n, D) of clouds (n, N, 3) on rank 0; empty on the other ranks."""
        own, rows = np.array_split(points, world_size())[rank()], np.empty((0, encoder.feature_dim), np.float32)
        if len(own):
            text = f"probe {self.dataset}"
            rows = extract_features(encoder, own, batch_size=self.batch_size, device=device, text=text)
        return np.concatenate([*gather_to_rank0(rows), rows[:0]])

    def score(self, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
        """Return the accuracies in percent, given the features of both splits."""
        labels, fit, held_out = self.train.labels, self.fit, self.held_out
        val = linear_svm(train[fit], labels[fit], train[held_out], labels[held_out], c_values=(self.c,))
        full = linear_svm(train, labels, test, self.test.labels, c_values=(self.c,))
        return {f"{self.dataset}_val_accuracy": val.accuracy, f"{self.dataset}_test_accuracy": full.accuracy}
