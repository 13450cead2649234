"""Score pretrained point encoders with a linear SVM on their frozen features.

Each encoder runs once over the training and test clouds. Its features, before any projection head, are then scored in
three ways:
  linear SVM     fitted on all training labels, accuracy on the test split; the usual headline number, in a narrow range
  few labels     the same from 1, 5, 10, ... labels per class; separates encoders much better
  retrieval mAP  no training: every test cloud retrieves others of its class by cosine similarity
Several checkpoints, or several seeds of a random encoder, are one run each; mean and deviation are over runs.

Examples:
  python downstream/classification/main.py --dataset modelnet40 --model_path checkpoints/crossnet/last.pth
  python downstream/classification/main.py --dataset scanobjectnn --variant PB_T50_RS --model_path a.pth b.pth c.pth
  python downstream/classification/main.py --dataset modelnet10 --random_init --calibrate_bn --seeds 1 2 3
  python downstream/classification/main.py --dataset modelnet40 --model_path published.pth --model dgcnn_cls --k 20
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
from torch import nn

from datasets.hdf5 import LabeledClouds
from downstream.classification.eval_inputs import (
    EvaluationConfig,
    candidates,
    data_record,
    data_title,
    features_of,
    open_splits,
)
from downstream.features import check_neighbors
from downstream.figures import PICTURE_TYPES, check_output_path, draw_confusion_matrix, draw_retrieval
from downstream.retrieval import average_precisions
from downstream.svm import RELEASED_C, check_labels, few_label_svm, linear_svm, mean_and_std
from utils.cli import flag, log_to_screen, positive_float, positive_int, run, write_json
from utils.errors import DataError, UserError, warn_on_failure
from utils.released_flags import IN_LINEAR_SVM, add_released_flags
from utils.reproducible import provenance


@dataclass(kw_only=True)
class SVMConfig(EvaluationConfig):
    """Settings of this script.

    Raises:
        UserError: they do not fit together, or an output cannot be written.
    """

    svm_c: list[float] = flag(
        [RELEASED_C],
        group="linear SVM",
        type=positive_float,
        nargs="+",
        metavar="C",
        help="C of the SVM; several values: use the best in cross-validation on the training split",
    )
    cv_folds: int = flag(5, type=int, metavar="F", help="folds of that cross-validation, 2 or more")
    shots: list[int] = flag(
        [1, 5, 10, 20],
        type=positive_int,
        nargs="*",
        metavar="S",
        help="few-label SVM from S labels per class (features standardized, C = 1); no value turns it off",
    )
    shot_draws: int = flag(20, type=positive_int, metavar="D", help="draws per number of labels")
    confusion_matrix: str | None = flag(
        group="pictures", metavar="FILE", help="draw the confusion matrix over all runs (.png, .pdf)"
    )
    retrieval_sheet: str | None = flag(
        metavar="FILE", help="draw test clouds of the first run with their nearest neighbors (.png, .pdf)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cv_folds < 2:
            raise UserError(f"--cv_folds {self.cv_folds}: cross-validation needs at least 2 folds")
        for path in filter(None, (self.confusion_matrix, self.retrieval_sheet)):
            check_output_path(path, PICTURE_TYPES)


class Scores(NamedTuple):
    """Result of :func:`evaluate`."""

    record: dict[str, Any]  # goes into the JSON
    predictions: np.ndarray  # (n_test,) labels at the chosen C
    test_features: np.ndarray  # (n_test, D)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script."""
    parser = SVMConfig.parser()
    add_released_flags(parser, IN_LINEAR_SVM)
    return parser


@contextlib.contextmanager
def data_errors(dataset: str) -> Iterator[None]:
    """Turn the errors of the scores, which know no data set, into a :class:`DataError` that names it."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{dataset} cannot be scored: {error}") from error


def evaluate(encoder: nn.Module, train: LabeledClouds, test: LabeledClouds, config: SVMConfig) -> Scores:
    """Score one encoder in all three ways, in percent.

    Raises:
        UserError: the encoder gives features that are not finite.
        DataError: the labels do not allow an SVM or retrieval.
    """
    start = time.perf_counter()
    clouds = {f"{part.split} features": part.points for part in (train, test)}
    train_x, test_x = features_of(encoder, config, clouds, train=train)
    extracted = time.perf_counter()
    sets = (train_x, train.labels, test_x, test.labels)
    with data_errors(config.dataset):
        svm = linear_svm(*sets, c_values=config.svm_c, folds=config.cv_folds, seed=config.seed)
        shots = {
            s: few_label_svm(*sets, shots=s, draws=config.shot_draws, seed=config.seed)
            for s in sorted(set(config.shots))
        }
        precisions = average_precisions(test_x, test.labels)
    left_out = int(np.isnan(precisions).sum())
    right = svm.predictions == test.labels
    record = {
        "test_accuracy": svm.accuracy,
        "mean_class_accuracy": 100 * float(np.mean([right[test.labels == c].mean() for c in np.unique(test.labels)])),
        "svm_c": svm.c,
        "test_accuracy_by_c": {f"{c:g}": value for c, value in svm.test_accuracy.items()},
        "cv_accuracy_by_c": {f"{c:g}": value for c, value in svm.cv_accuracy.items()},
        "shots": {str(s): [result.mean, result.std] for s, result in shots.items()},
        "shots_accuracies": {str(s): list(result.accuracies) for s, result in shots.items()},
        "short_classes": {
            str(s): {train.class_names[label]: size for label, size in result.short_classes.items()}
            for s, result in shots.items()
            if result.short_classes
        },
        "retrieval_map": 100 * float(np.nanmean(precisions)) if left_out < len(precisions) else None,
        "retrieval_queries_left_out": left_out,
        "feature_dim": int(train_x.shape[1]),
        "seconds_features": round(extracted - start, 2),
        "seconds_scores": round(time.perf_counter() - extracted, 2),
    }
    return Scores(record, svm.predictions, test_x)


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean and sample standard deviation over runs (0 for a single run).

    ``shots`` holds [mean, deviation] of the runs' means or, for a single run, over its draws, as is usually reported.
    ``shots_std_over`` says which.
    """
    accuracy, accuracy_std = mean_and_std([record["test_accuracy"] for record in records])
    c_values = [record["svm_c"] for record in records]
    maps = [record["retrieval_map"] for record in records]
    retrieval, retrieval_std = (None, None) if None in maps else mean_and_std(maps)
    single = len(records) == 1
    shots = {
        s: records[0]["shots"][s] if single else list(mean_and_std([record["shots"][s][0] for record in records]))
        for s in records[0]["shots"]
    }
    return {
        "test_accuracy_mean": accuracy,
        "test_accuracy_std": accuracy_std,
        "svm_c": c_values[0] if len(set(c_values)) == 1 else c_values,
        "shots": shots,
        "shots_std_over": "draws" if single else "runs",
        "retrieval_map": retrieval,
        "retrieval_map_std": retrieval_std,
        "number_of_runs": len(records),
    }


def _spread(mean: float, std: float) -> str:
    return f"{mean:.1f} +- {std:.1f}"


def _one_decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def result_table(metrics: dict[str, Any]) -> str:
    """Format the metrics as a table: one line per run and, for several runs, their mean and deviation."""
    runs, shots = metrics["runs"], list(metrics["shots"])
    rows = [["run", "SVM", "C", *(f"{s} label{'s' if s != '1' else ''}" for s in shots), "mAP"]]
    for record in runs:
        few = [_spread(*record["shots"][s]) for s in shots]
        rows.append(
            [record["name"], f"{record['test_accuracy']:.1f}", f"{record['svm_c']:g}", *few]
            + [_one_decimal(record["retrieval_map"])]
        )
    if len(runs) > 1:
        few = [_spread(*metrics["shots"][s]) for s in shots]
        accuracy = _spread(metrics["test_accuracy_mean"], metrics["test_accuracy_std"])
        retrieval = metrics["retrieval_map"]
        rows.append(
            [f"mean over {len(runs)} runs", accuracy, "", *few]
            + ["-" if retrieval is None else _spread(retrieval, metrics["retrieval_map_std"])]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def notes(metrics: dict[str, Any]) -> list[str]:
    """Return explanations of the table."""
    lines = ["percent of the test split; mAP: cosine retrieval within the test split"]
    if metrics["shots"]:
        draws = metrics["shot_draws"]
        lines.append(f"+- in a run's few-label columns: standard deviation over {draws} draws of the labels")
    if metrics["number_of_runs"] == 1:
        lines.append("one run, so no deviation over runs; it takes several encoders (--model_path or --seeds)")
    else:
        lines.append("+- in the last line: standard deviation over runs")
    for record in metrics["runs"]:
        if record["cv_accuracy_by_c"]:
            tried = ", ".join(
                f"C {c}: {value:.1f} (test {record['test_accuracy_by_c'][c]:.1f})"
                for c, value in record["cv_accuracy_by_c"].items()
            )
            lines.append(f"{record['name']}: chosen by cross-validation on the training split; {tried}")
    first = metrics["runs"][0]
    for s, classes in first["short_classes"].items():
        names = ", ".join(f"{name} ({size})" for name, size in classes.items())
        lines.append(f"{s} labels: classes with fewer training clouds use all of them: {names}")
    if first["retrieval_queries_left_out"]:
        count = first["retrieval_queries_left_out"]
        lines.append(f"retrieval: {count} queries are excluded because no other test cloud has their class")
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score every encoder and return the metrics that ``--json`` writes.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = SVMConfig.from_flags(build_parser().parse_args(argv))
    log_to_screen()
    about = provenance()  # now, because the repository may change during the run
    train, test = open_splits(config.dataset, config.data_root, variant=config.variant, num_points=config.num_points)
    with data_errors(config.dataset):
        check_labels(train.labels, c_values=config.svm_c, folds=config.cv_folds)
    if len(foreign := np.setdiff1d(test.labels, train.labels)):
        names = ", ".join(test.class_names[label] for label in foreign)
        print(
            f"note: {np.isin(test.labels, foreign).sum()} test clouds count as errors of the SVM, because no training "
            f"cloud has their class: {names}"
        )
    found = candidates(config)
    for candidate in found:
        check_neighbors(candidate.encoder, config.num_points, name=candidate.name)
    if config.random_init and not config.calibrate_bn:
        print(
            "note: an untrained encoder without --calibrate_bn is not a fair baseline: its batch norms lack statistics"
        )
    if config.model_path and config.calibrate_bn:
        print("warning: --calibrate_bn replaces the batch-norm statistics that the checkpoints were trained with")

    records, predictions, first_features = [], [], None
    for candidate in found:
        scores = evaluate(candidate.encoder, train, test, config)
        records.append({**candidate.record(), **scores.record})
        predictions.append(scores.predictions)
        first_features = scores.test_features if first_features is None else first_features
        seconds = scores.record["seconds_features"], scores.record["seconds_scores"]
        print(
            f"{candidate.name}: SVM {scores.record['test_accuracy']:.1f} percent "
            f"({seconds[0]:.0f} s features, {seconds[1]:.0f} s scores)",
            flush=True,
        )

    metrics = {
        **data_record(config.dataset, (train, test)),
        "train_clouds": len(train),
        "test_clouds": len(test),
        "classes": len(np.unique(train.labels)),
        "num_points": config.num_points,
        **summarize(records),
        "seed": config.seed,
        "cv_folds": config.cv_folds,
        "shot_draws": config.shot_draws,
        "calibrate_bn": config.calibrate_bn,
        "calibration_clouds": min(config.calibration_clouds, len(train)) if config.calibrate_bn else None,
        "files": {part.split: [str(file) for file in part.files] for part in (train, test)},
        "runs": records,
        **about,
    }
    print("\n" + result_table(metrics) + "\n")
    print("\n".join(notes(metrics)))
    name = data_title(config.dataset, test)
    if config.confusion_matrix:
        spread = f", {len(found)} runs together" if len(found) > 1 else ""
        title = f"{name}: linear SVM, {metrics['test_accuracy_mean']:.1f} percent{spread}"
        truth = np.tile(test.labels, len(found))
        with warn_on_failure(f"--confusion_matrix {config.confusion_matrix}"):
            draw_confusion_matrix(
                truth, np.concatenate(predictions), test.class_names, config.confusion_matrix, title=title
            )
    if config.retrieval_sheet:
        with warn_on_failure(f"--retrieval_sheet {config.retrieval_sheet}"):
            draw_retrieval(test.points, first_features, test.labels, test.class_names, config.retrieval_sheet)
    write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    run(main)
