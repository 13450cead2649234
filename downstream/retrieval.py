"""Retrieval by cosine similarity, without training: objects of the same class, and the partner of a pair."""

from __future__ import annotations

import numpy as np

TOP = (1, 5, 10)  # k of R@k


def unit_features(features: np.ndarray) -> np.ndarray:
    """Center (n, D) features on their mean and scale every row to length 1, in double precision.

    Rows equal to the mean become zero; otherwise rounding errors would give them a direction.
    """
    x = np.asarray(features, dtype=np.float64)
    return unit_rows(x - x.mean(axis=0), zero=1e-12 * np.abs(x).max())


def unit_rows(x: np.ndarray, *, zero: float = 0.0) -> np.ndarray:
    """Scale every row of (n, D) to length 1, in double precision; rows no longer than ``zero`` become zero."""
    x = np.asarray(x, dtype=np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > zero)


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


def match_ranks(queries: np.ndarray, gallery: np.ndarray, *, block: int = 512) -> np.ndarray:
    """Return the rank of each query's partner among the whole gallery, by cosine similarity; 1 is the best.

    Of items as similar as the partner, half count as better, so that embeddings that say nothing give the mean rank of
    chance, (n + 1) / 2, regardless of the order of the items.

    Args:
        queries: (n, D); they are not centered.
        gallery: (n, D); item i is the partner of query i.
        block: queries per pass; memory is about 8 x block x n bytes.

    Returns:
        (n,) float64.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    if np.ndim(queries) != 2 or np.shape(queries) != np.shape(gallery):
        raise ValueError(f"expected two arrays (n, D), got {np.shape(queries)} and {np.shape(gallery)}")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ValueError("embeddings are not finite")
    queries, gallery = unit_rows(queries), unit_rows(gallery)
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), block):
        rows = np.arange(start, min(start + block, len(queries)))
        similarity = queries[rows] @ gallery.T  # (block, n)
        ahead = similarity - similarity[np.arange(len(rows)), rows][:, None]
        # Without a tolerance, rounding errors would give equal embeddings an order.
        ranks[rows] = 1 + (ahead > 1e-12).sum(1) + ((np.abs(ahead) <= 1e-12).sum(1) - 1) / 2
    return ranks


def recall_scores(ranks: np.ndarray) -> dict[str, float]:
    """Return R@k in percent, the share of queries whose partner is among the first k, and the median of ranks (n,)."""
    scores = {f"recall_at_{k}": 100.0 * float(np.mean(ranks <= k)) for k in TOP}
    return {**scores, "median_rank": float(np.median(ranks))}


def chance_scores(count: int) -> dict[str, float]:
    """Return what :func:`recall_scores` gives on average for a gallery of ``count`` items in random order."""
    scores = {f"recall_at_{k}": 100.0 * min(k / count, 1.0) for k in TOP}
    return {**scores, "median_rank": (count + 1) / 2}
