"""Retrieve objects of the same class by cosine similarity of frozen features, without training."""

from __future__ import annotations

import numpy as np


def unit_features(features: np.ndarray) -> np.ndarray:
    """Center (n, D) features on their mean and scale every row to length 1, in double precision.

    Rows equal to the mean become zero; otherwise rounding errors would give them a direction.
    """
    x = np.asarray(features, dtype=np.float64)
    rounding = 1e-12 * np.abs(x).max()
    x = x - x.mean(axis=0)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > rounding)


def nearest(features: np.ndarray, queries: np.ndarray, top: int) -> np.ndarray:
    """Return the (q, top) positions of the nearest other items of each query, best first (cosine, centered)."""
    x = unit_features(features)
    similarity = x[queries] @ x.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, : min(top, len(x) - 1)]


def average_precisions(features: np.ndarray, labels: np.ndarray, *, block: int = 512) -> np.ndarray:
    """Return the average precision of every item as a query against all others.

    Items of equal similarity count as one step, as in ``sklearn.metrics.average_precision_score``, so that
    uninformative features score the share of the class, regardless of the order of the items.

    Args:
        features: (n, D); they are centered here.
        labels: (n,) classes.
        block: queries per pass; memory is about 40 x block x n bytes.

    Returns:
        (n,) values in 0..1; NaN if no other item has the query's class.

    Raises:
        ValueError: shapes do not fit, there are fewer than two items, or features are not finite.
    """
    labels = np.asarray(labels)
    if np.ndim(features) != 2 or labels.shape != (len(features),) or len(features) < 2:
        shapes = f"{np.shape(features)} and {labels.shape}"
        raise ValueError(f"features must be (n, D) with (n,) labels and n > 1, got {shapes}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite")
    x = unit_features(features)
    count = len(x)
    rank = np.arange(1, count)
    result = np.full(count, np.nan)
    for start in range(0, count, block):
        rows = np.arange(start, min(start + block, count))
        similarity = x[rows] @ x.T  # (block, n)
        similarity[np.arange(len(rows)), rows] = -np.inf  # the query itself sorts last and is dropped
        order = np.argsort(-similarity, axis=1)[:, :-1]  # (block, n - 1)
        similarity = np.take_along_axis(similarity, order, axis=1)
        relevant = labels[order] == labels[rows][:, None]
        # last: 0-based position of the last item with the same similarity, (block, n - 1)
        ends = np.empty(similarity.shape, dtype=bool)
        ends[:, -1] = True
        ends[:, :-1] = similarity[:, 1:] != similarity[:, :-1]
        last = np.where(ends, rank - 1, count)
        last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
        hits = np.take_along_axis(np.cumsum(relevant, axis=1), last, axis=1)
        total = relevant.sum(axis=1)
        precision = np.where(relevant, hits / (last + 1), 0.0).sum(axis=1)
        np.divide(precision, total, out=result[rows[0] : rows[-1] + 1], where=total > 0)
    return result


def retrieval_map(features: np.ndarray, labels: np.ndarray, *, block: int = 512) -> float:
    """Mean average precision in percent: every item queries all others of the given set.

    Queries without another item of their class are excluded (NaN in :func:`average_precisions`).

    Raises:
        ValueError: as for :func:`average_precisions`, or no class has two members.
    """
    values = average_precisions(features, labels, block=block)
    if np.isnan(values).all():
        raise ValueError("no class has two members, so nothing can be retrieved")
    return 100.0 * float(np.nanmean(values))
