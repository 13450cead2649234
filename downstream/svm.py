"""Linear SVM on frozen features, from one Gram matrix.

A linear kernel needs only inner products of features. One matrix product computes them all, and every fit
(cross-validation folds, values of C) uses blocks of that matrix. Prediction uses one weight vector per pair of classes
instead of all support vectors. The results equal those of ``sklearn.svm.SVC(kernel="linear")``, several times faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from utils.progress import progress

RELEASED_C = 0.01


class SVMResult(NamedTuple):
    """Result of :func:`linear_svm`; accuracies in percent."""

    accuracy: float  # on the test split, at the chosen C
    c: float  # the chosen C
    predictions: np.ndarray  # (n_test,) labels predicted at the chosen C
    test_accuracy: Mapping[float, float]  # by C; for information only, not used to choose C
    cv_accuracy: Mapping[float, float]  # by C, on the training split; empty if there is only one C


class FewLabelResult(NamedTuple):
    """Result of :func:`few_label_svm`; accuracies in percent."""

    mean: float
    std: float  # sample standard deviation over the draws, 0 for one draw
    accuracies: tuple[float, ...]  # one per draw
    short_classes: Mapping[int, int]  # label -> training samples, for classes with fewer than ``shots``


def _fit_svm(gram: np.ndarray, labels: np.ndarray, c: float) -> SVC:
    """Fit on the inner products (n, n) of the training samples."""
    with warnings.catch_warnings():
        # With one sample per class, scikit-learn suspects regression targets.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        return SVC(kernel="precomputed", C=c).fit(gram, labels)


def _predict(machine: SVC, train_x: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    """Predict labels of (m, D) samples by the votes of all pairs of classes, with one weight vector per pair.

    ``machine.predict`` would need the inner products of all test and training samples.
    """
    classes = len(machine.classes_)
    ends = np.cumsum([0, *machine.n_support_])
    members = [slice(*ends[i : i + 2]) for i in range(classes)]
    # shares[i]: (classes - 1, D); row r is the contribution of class i to its pair with the r-th other class.
    shares = [machine.dual_coef_[:, part] @ train_x[machine.support_[part]] for part in members]
    pairs = list(combinations(range(classes), 2))
    weights = np.stack([shares[i][j - 1] + shares[j][i] for i, j in pairs])  # (pairs, D)
    decisions = test_x @ weights.T + machine.intercept_  # (m, pairs)
    if classes == 2:  # scikit-learn flips the sign of binary problems
        decisions = -decisions
    first, second = np.array(pairs).T
    winners = np.where(decisions > 0, first, second) + classes * np.arange(len(test_x))[:, None]  # (m, pairs)
    votes = np.bincount(winners.ravel(), minlength=classes * len(test_x)).reshape(-1, classes)
    return machine.classes_[votes.argmax(1)]


def _accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    return 100.0 * float(np.mean(predicted == truth))


def _check_shapes(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> None:
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != (len(x),):
            raise ValueError(f"{name} features must be (n, D) with (n,) labels, got {x.shape} and {y.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} features are not finite")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"training features have {train_x.shape[1]} columns, test features {test_x.shape[1]}")
    check_labels(train_y)


def check_labels(labels: np.ndarray, *, c_values: Sequence[float] = (RELEASED_C,), folds: int = 5) -> None:
    """Check, before any features are computed, that :func:`linear_svm` can use the labels of a training split.

    Args:
        labels: (n,) classes.
        c_values: as for :func:`linear_svm`.
        folds: as for :func:`linear_svm`.

    Raises:
        ValueError: there is one class, or cross-validation is needed and no class has two samples.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("a classifier needs training samples of at least two classes")
    if len(set(c_values)) > 1:
        _number_of_folds(labels, folds)


def _number_of_folds(labels: np.ndarray, folds: int) -> int:
    folds = min(folds, int(np.unique(labels, return_counts=True)[1].max()))
    if folds < 2:
        raise ValueError("cross-validation needs at least two folds and a class with two samples; give one value of C")
    return folds


def cross_validate(
    x: np.ndarray, gram: np.ndarray, labels: np.ndarray, *, c_values: Sequence[float], folds: int = 5, seed: int = 0
) -> dict[float, float]:
    """Return the accuracy of each C in stratified cross-validation on the training split.

    Args:
        x: (n, D) training features, float64.
        gram: (n, n) their inner products.
        labels: (n,) classes.
        c_values: the values to compare, on the same folds.
        folds: number of folds, at most the size of the largest class.
        seed: of the shuffle before the split into folds.

    Returns:
        Accuracy in percent over all held-out samples, by C.

    Raises:
        ValueError: no class has two samples.
    """
    folds = _number_of_folds(labels, folds)
    correct = dict.fromkeys(c_values, 0)
    # Each fold is a block of the Gram matrix, so the splitter only needs the number of samples.
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    split = splitter.split(np.zeros(len(labels)), labels)
    for fit, held in progress(split, text="cross-validation", unit="folds", total=folds, leave=False):
        fit_gram = gram[np.ix_(fit, fit)]
        for c in correct:
            predicted = _predict(_fit_svm(fit_gram, labels[fit], c), x[fit], x[held])
            correct[c] += int(np.sum(predicted == labels[held]))
    return {c: 100.0 * count / len(labels) for c, count in correct.items()}


def linear_svm(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    c_values: Sequence[float] = (RELEASED_C,),
    folds: int = 5,
    seed: int = 0,
) -> SVMResult:
    """Fit a linear SVM (one against one) on frozen features and score it.

    Of several ``c_values``, use the one with the best cross-validation accuracy on the *training* split, the smallest
    on ties. The test split does not affect the choice.

    Args:
        train_x: (n, D) features, used without scaling.
        train_y: (n,) labels.
        test_x: (m, D) features.
        test_y: (m,) labels.
        c_values: candidates for C.
        folds: folds of the cross-validation.
        seed: of the folds.

    Raises:
        ValueError: shapes do not fit, features are not finite, a C is not positive, or there are too few samples.
    """
    _check_shapes(train_x, train_y, test_x, test_y)
    c_values = sorted(set(map(float, c_values)))
    if not c_values or c_values[0] <= 0:
        raise ValueError(f"C must be positive, got {c_values}")
    # Without double precision the results would differ from SVC's; 9,840 x 9,840 takes 0.8 GB.
    train_x, test_x = (np.ascontiguousarray(x, dtype=np.float64) for x in (train_x, test_x))
    gram = train_x @ train_x.T  # (n, n)
    cv = cross_validate(train_x, gram, train_y, c_values=c_values, folds=folds, seed=seed) if len(c_values) > 1 else {}
    fits = progress(c_values, text="SVM", unit="values of C", leave=False)
    predictions = {c: _predict(_fit_svm(gram, train_y, c), train_x, test_x) for c in fits}
    chosen = max(c_values, key=lambda c: cv.get(c, 0.0))
    scores = {c: _accuracy(predicted, test_y) for c, predicted in predictions.items()}
    return SVMResult(scores[chosen], chosen, predictions[chosen], scores, cv)


def draw_labels(labels: np.ndarray, shots: int, *, draw: int, seed: int) -> np.ndarray:
    """Draw positions of ``shots`` samples of every class (all if it has fewer), as a pure function of the arguments."""
    rng = np.random.default_rng([seed, shots, draw])
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.concatenate(drawn)


def few_label_svm(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    shots: int,
    draws: int = 20,
    seed: int = 0,
) -> FewLabelResult:
    """Fit linear SVMs on ``shots`` labels of every class, over several draws, and score them on the whole test split.

    Features are standardized by the mean and deviation of the draw and C is 1, as in common few-shot scripts. Draw i
    depends only on ``seed``, ``i`` and the labels, so that every encoder is scored on the same labels.

    Args:
        train_x: (n, D) features to draw from.
        train_y: (n,) labels.
        test_x: (m, D) features.
        test_y: (m,) labels.
        shots: samples of every class; classes with fewer use all (listed in ``short_classes``).
        draws: number of draws.
        seed: of the draws.

    Raises:
        ValueError: shapes do not fit, features are not finite, or ``shots`` or ``draws`` is below 1.
    """
    _check_shapes(train_x, train_y, test_x, test_y)
    if shots < 1 or draws < 1:
        raise ValueError(f"shots and draws must be at least 1, got {shots} and {draws}")
    test_x = np.asarray(test_x, dtype=np.float64)
    accuracies = []
    for draw in progress(range(draws), text=f"SVM, labels per class: {shots}", unit="draws", leave=False):
        chosen = draw_labels(train_y, shots, draw=draw, seed=seed)
        scaler = StandardScaler()
        support = scaler.fit_transform(train_x[chosen].astype(np.float64))
        machine = _fit_svm(support @ support.T, train_y[chosen], 1.0)
        predicted = machine.predict(
            scaler.transform(test_x) @ support.T
        )  # cheaper than _predict: fewer samples than pairs of classes
        accuracies.append(_accuracy(predicted, test_y))
    classes, sizes = np.unique(train_y, return_counts=True)
    short = {int(label): int(size) for label, size in zip(classes, sizes, strict=True) if size < shots}
    mean, std = mean_and_std(accuracies)
    return FewLabelResult(mean, std, tuple(accuracies), short)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and sample standard deviation (n - 1), 0 for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
