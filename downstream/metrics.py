"""Score segmentations from histograms, in one pass over the labels.

All scores are in percent. ``benchmarks/reference/literal_metrics.py`` has the definitions as plain loops; both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datasets.shapenet_part import PartTaxonomy

_CHUNK_LABELS = 1 << 17  # larger chunks of labels fall out of the CPU's cache


def _labels(values: np.ndarray, name: str, limit: int) -> np.ndarray:
    """Return the values as an integer array after checking that all are in 0..limit-1."""
    values = np.asarray(values)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, but are {values.dtype}")
    # Viewed as unsigned, a negative number is large, so one comparison checks both ends.
    if values.size and values.view(f"u{values.itemsize}").max() >= limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}, but are in {values.min()}..{values.max()}")
    return values


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pairs of true and predicted labels; matrices of several batches may be added.

    Args:
        truth: integers in 0..num_classes-1, any shape.
        predicted: the same shape.
        num_classes: number of classes C.

    Returns:
        (C, C) int64; entry [t, p] counts labels that are t and were predicted as p.

    Raises:
        ValueError: shapes differ, or a label is out of range.
    """
    truth = _labels(truth, "true labels", num_classes)
    predicted = _labels(predicted, "predicted labels", num_classes)
    if truth.shape != predicted.shape:
        raise ValueError(f"{truth.shape} true labels and {predicted.shape} predicted ones do not match")
    pair = truth.astype(np.int64) * num_classes + predicted
    return np.bincount(pair.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class SemanticScores:
    """Scores of a semantic segmentation, in percent.

    Attributes:
        overall_accuracy: correctly predicted labels.
        mean_accuracy: mean of ``class_accuracy`` over the classes that occur in the truth.
        mean_iou: mean of ``class_iou`` over the classes that occur in truth or prediction.
        class_accuracy: (C,) float64, correctly predicted labels of each class; NaN if no label has the class.
        class_iou: (C,) float64, intersection over union; NaN if the class occurs neither in truth nor in prediction.
        class_names: (C,) names.
        absent: names of the classes that occur neither in truth nor in prediction, excluded from ``mean_iou``.
        unlabeled: names of the classes that no true label has, excluded from ``mean_accuracy``. If such a class was
            predicted, its IoU is 0 and counts in ``mean_iou``.
    """

    overall_accuracy: float
    mean_accuracy: float
    mean_iou: float
    class_accuracy: np.ndarray
    class_iou: np.ndarray
    class_names: tuple[str, ...]
    absent: tuple[str, ...]
    unlabeled: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return plain types for a JSON file; classes without a score are null."""
        return {
            "overall_accuracy": self.overall_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "mean_iou": self.mean_iou,
            "class_iou": _by_name(self.class_names, self.class_iou),
            "class_accuracy": _by_name(self.class_names, self.class_accuracy),
            "absent_classes": list(self.absent),
            "unlabelled_classes": list(self.unlabeled),
        }


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    return {name: float(v) if np.isfinite(v) else None for name, v in zip(names, values, strict=True)}


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return 100 * part / whole, NaN where whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, 100.0 * part / whole, np.nan)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN, or NaN if all are."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def semantic_scores(confusion: np.ndarray, class_names: Sequence[str] | None = None) -> SemanticScores:
    """Score a confusion matrix that pools the labels of all blocks or rooms, as is the rule for S3DIS.

    Args:
        confusion: (C, C), from :func:`confusion_matrix`.
        class_names: C names; None names them by number.

    Raises:
        ValueError: the matrix is not square, is empty, or the names do not fit.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix must be square, got {confusion.shape}")
    names = tuple(str(i) for i in range(len(confusion))) if class_names is None else tuple(class_names)
    if len(names) != len(confusion):
        raise ValueError(f"{len(names)} class names for a confusion matrix of {len(confusion)} classes")
    true, guessed, right = confusion.sum(1), confusion.sum(0), np.diagonal(confusion)
    if not true.sum():
        raise ValueError("the confusion matrix is empty")
    union = true + guessed - right
    accuracy, iou = _percent(right, true), _percent(right, union)
    return SemanticScores(
        overall_accuracy=float(100.0 * right.sum() / true.sum()),
        mean_accuracy=_mean(accuracy),
        mean_iou=_mean(iou),
        class_accuracy=accuracy,
        class_iou=iou,
        class_names=names,
        absent=tuple(names[i] for i in np.flatnonzero(union == 0)),
        unlabeled=tuple(names[i] for i in np.flatnonzero(true == 0)),
    )


@dataclass(frozen=True)
class PartScores:
    """Scores of a part segmentation, in percent.

    Attributes:
        instance_miou: mean of ``shape_iou`` over all shapes.
        class_miou: mean of ``category_miou`` over the categories that occur.
        accuracy: correctly predicted points.
        mean_part_accuracy: mean over the parts that occur of the share of their points predicted correctly.
        shape_iou: (n,) float64, mean IoU of each shape over its category's parts; a part in neither truth nor
            prediction counts as 100.
        category_miou: mean of ``shape_iou`` over the shapes of each category that occurs, by name.
        category_shapes: number of shapes of each category that occurs, by name.
        absent: names of the categories without a shape, excluded from all means.
    """

    instance_miou: float
    class_miou: float
    accuracy: float
    mean_part_accuracy: float
    shape_iou: np.ndarray
    category_miou: Mapping[str, float]
    category_shapes: Mapping[str, int]
    absent: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return plain types for a JSON file, without ``shape_iou``."""
        return {
            "instance_miou": self.instance_miou,
            "class_miou": self.class_miou,
            "accuracy": self.accuracy,
            "mean_part_accuracy": self.mean_part_accuracy,
            "category_miou": dict(self.category_miou),
            "category_shapes": dict(self.category_shapes),
            "absent_categories": list(self.absent),
        }


def _part_histogram(
    truth: np.ndarray, predicted: np.ndarray, starts: np.ndarray, parts: int, limit: int, known: np.ndarray | None
) -> np.ndarray:
    """Count the pairs of true and predicted parts of every shape, with parts numbered within the shape's category.

    Args:
        truth: (n, N) global part numbers.
        predicted: (n, N) global part numbers.
        starts: (n,) first part of each shape's category.
        parts: largest number of parts of a category, K.
        limit: number of parts of all categories.
        known: (n, N) bool, the points to count; None counts all.

    Returns:
        (n, K + 1, K + 1) int64; the last row and column count parts of other categories.
    """
    count, size = truth.shape
    width = parts + 1
    # A byte is enough for a local part number and a pair of them in all usual data sets; negative numbers wrap around
    # to large ones.
    small = np.uint8 if 2 * limit <= 256 and width**2 <= 256 else np.uint32
    first = starts.astype(small)[:, None]
    step = max(1, _CHUNK_LABELS // size)
    row = np.arange(step)[:, None] * width**2
    index = np.empty((step, size), dtype=np.int64)
    other = np.full((step, size), parts, dtype=small)  # as an array, because np.minimum with a scalar is far slower
    histogram = np.empty((count, width**2), dtype=np.int64)
    for begin in range(0, count, step):
        chunk = slice(begin, min(begin + step, count))
        rows = chunk.stop - begin
        local = []
        for labels, name in ((truth[chunk], "true parts"), (predicted[chunk], "predicted parts")):
            number = _labels(labels, name, limit).astype(small)
            number -= first[chunk]
            local.append(np.minimum(number, other[:rows], out=number))
        pair = local[0]
        pair *= small(width)
        pair += local[1]
        np.add(pair, row[:rows], out=index[:rows])
        counted = index[:rows].ravel() if known is None else index[:rows][known[chunk]]
        bins = np.bincount(counted, minlength=rows * width**2)
        histogram[chunk] = bins.reshape(rows, width**2)
    return histogram.reshape(count, width, width)


def part_scores(
    truth: np.ndarray,
    predicted: np.ndarray,
    categories: np.ndarray,
    taxonomy: PartTaxonomy,
    *,
    known: np.ndarray | None = None,
) -> PartScores:
    """Score a part segmentation by the rules of ShapeNetPart (Yi et al., SIGGRAPH Asia 2016).

    Args:
        truth: (n, N) global part numbers, each of the shape's category.
        predicted: (n, N) global part numbers; one of another category is wrong, but in no part's union.
        categories: (n,) category numbers.
        taxonomy: the categories and their parts.
        known: (n, N) bool, the points whose true part is known, which alone are scored; None scores all.

    Raises:
        ValueError: the arrays do not fit together, are empty, or a number is out of range.
    """
    truth, predicted, categories = np.asarray(truth), np.asarray(predicted), np.asarray(categories)
    if truth.ndim != 2 or truth.shape != predicted.shape or categories.shape != truth.shape[:1]:
        raise ValueError(
            f"expected (n, N) true and predicted parts and (n,) categories, got {truth.shape}, {predicted.shape} and "
            f"{categories.shape}"
        )
    if known is not None and known.shape != truth.shape:
        raise ValueError(f"{known.shape} known points do not fit {truth.shape} true parts")
    if truth.size == 0 or (known is not None and not known.any()):
        raise ValueError("no shapes to score")
    names = taxonomy.category_names
    categories = _labels(categories, "categories", len(names))
    counts, starts = np.asarray(taxonomy.part_counts), np.asarray(taxonomy.part_starts)
    parts = int(counts.max())
    histogram = _part_histogram(truth, predicted, starts[categories], parts, taxonomy.num_parts, known)
    true, guessed = histogram.sum(2)[:, :parts], histogram.sum(1)[:, :parts]  # (n, K)
    right = np.diagonal(histogram, axis1=1, axis2=2)[:, :parts]  # (n, K)
    own = np.arange(parts) < counts[categories][:, None]  # (n, K): the category has this part
    if histogram[:, parts].any() or true[~own].any():
        shape = int(np.flatnonzero(histogram[:, parts].any(1) | (true * ~own).any(1))[0])
        raise ValueError(f"shape {shape} has true parts that its category '{names[categories[shape]]}' does not have")
    union = true + guessed - right
    iou = np.where(union > 0, right / np.maximum(union, 1), 1.0)
    shape_iou = 100.0 * (iou * own).sum(1) / counts[categories]
    shapes = np.bincount(categories, minlength=len(names))
    miou = np.bincount(categories, weights=shape_iou, minlength=len(names)) / np.maximum(shapes, 1)
    part = (starts[categories][:, None] + np.arange(parts))[own]
    true_of_part = np.bincount(part, weights=true[own], minlength=taxonomy.num_parts)
    right_of_part = np.bincount(part, weights=right[own], minlength=taxonomy.num_parts)
    present = np.flatnonzero(shapes)
    return PartScores(
        instance_miou=float(shape_iou.mean()),
        class_miou=float(miou[present].mean()),
        accuracy=float(100.0 * (right * own).sum() / histogram.sum()),
        mean_part_accuracy=_mean(_percent(right_of_part, true_of_part)),
        shape_iou=shape_iou,
        category_miou={names[i]: float(miou[i]) for i in present},
        category_shapes={names[i]: int(shapes[i]) for i in present},
        absent=tuple(names[i] for i in np.flatnonzero(shapes == 0)),
    )
