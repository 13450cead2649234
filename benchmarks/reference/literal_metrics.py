"""The definitions of the segmentation scores as plain loops, to compare downstream/metrics.py with."""

import numpy as np


def confusion(truth, predicted, num_classes):
    """Count pairs of labels, one point after another."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for t, p in zip(np.ravel(truth).tolist(), np.ravel(predicted).tolist(), strict=True):
        counts[t][p] += 1
    return np.array(counts)


def semantic(truth, predicted, num_classes):
    """(overall accuracy, {class: accuracy}, {class: IoU}) in percent; classes without a score are not in the tables."""
    truth, predicted = np.ravel(truth), np.ravel(predicted)
    accuracy, iou = {}, {}
    for c in range(num_classes):
        both = np.sum((truth == c) & (predicted == c))
        either = np.sum((truth == c) | (predicted == c))
        if np.sum(truth == c) > 0:
            accuracy[c] = 100 * both / np.sum(truth == c)
        if either > 0:
            iou[c] = 100 * both / either
    return 100 * np.mean(truth == predicted), accuracy, iou


def shape_ious_by_point(truth, predicted, categories, taxonomy):
    """IoU of every shape in percent, counting one point after another."""
    result = []
    for shape, category in enumerate(categories):
        parts = taxonomy.parts_of(category)
        both, either = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
        for t, p in zip(truth[shape], predicted[shape], strict=True):
            for part in parts:
                if t == part and p == part:
                    both[part] += 1
                if t == part or p == part:
                    either[part] += 1
        ious = [1.0 if either[part] == 0 else both[part] / either[part] for part in parts]
        result.append(100 * sum(ious) / len(ious))
    return np.array(result)


def shape_ious_by_mask(truth, predicted, categories, taxonomy):
    """IoU of every shape in percent, with NumPy masks per shape and part, as the field's evaluation scripts do it."""
    result = []
    for shape, category in enumerate(categories):
        ious = []
        for part in taxonomy.parts_of(category):
            both = np.sum(np.logical_and(truth[shape] == part, predicted[shape] == part))
            either = np.sum(np.logical_or(truth[shape] == part, predicted[shape] == part))
            ious.append(1.0 if either == 0 else both / float(either))
        result.append(100 * np.mean(ious))
    return np.array(result)
