r"""Few-shot classification with frozen features: n-way, m-shot, a linear SVM per episode, mean and deviation over runs.

An episode has n classes, m labeled clouds of each (the support) and other clouds of the same classes to classify (the
queries). Features are standardized by the support, then a linear SVM with C = 1 is fitted. Two protocols:
  released  support and queries from the training split, 20 queries per class, as in the usual scripts
  test      support from the training split, queries from the test split, so that no scored cloud was in training
Run i depends only on --seed and i, so that every encoder gets the same episodes.

Examples:
  python downstream/classification/few_shot.py --dataset modelnet40 --model_path checkpoints/crossnet/last.pth
  python downstream/classification/few_shot.py --dataset scanobjectnn --model_path a.pth b.pth --ways 5 --shots 10
  python downstream/classification/few_shot.py --data_root data/demo --dataset demo --model_path a.pth --protocol test \
      --ways 5 --shots 5 --queries 4                                                   # its classes are small
  python downstream/classification/few_shot.py --dataset modelnet40 --random_init --calibrate_bn --protocol test
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
from sklearn.preprocessing import StandardScaler
from torch import nn

from datasets.hdf5 import LabeledClouds
from downstream.classification.eval_inputs import EvaluationConfig, candidates, data_record, features_of, open_splits
from downstream.features import check_neighbors
from downstream.svm import linear_svm, mean_and_std
from utils.cli import flag, log_to_screen, positive_int, run, write_json
from utils.errors import UserError
from utils.progress import progress
from utils.reproducible import provenance

PROTOCOLS = ("released", "test")


@dataclass(kw_only=True)
class FewShotConfig(EvaluationConfig):
    """Settings of this script.

    Raises:
        UserError: they do not fit together.
    """

    num_points: int | None = flag(
        group="data", type=positive_int, metavar="N", help="points per cloud, the first N rows (default: all)"
    )
    protocol: list[str] = flag(
        [*PROTOCOLS], group="episodes", nargs="+", choices=PROTOCOLS, help="protocols to score, described at the top"
    )
    ways: list[int] = flag([5, 10], type=positive_int, nargs="+", metavar="N", help="classes per episode")
    shots: list[int] = flag([10, 20], type=positive_int, nargs="+", metavar="M", help="labels per class")
    queries: int = flag(20, type=positive_int, metavar="Q", help="clouds to classify per class")
    runs: int = flag(10, type=positive_int, metavar="R", help="episodes per setting")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.ways) < 2:
            raise UserError("--ways 1: one class needs no classifier; use 2 or more")

    def episodes(self) -> list[tuple[str, int, int]]:
        """Return every combination of protocol, classes and labels per class."""
        return list(itertools.product(self.protocol, self.ways, self.shots))


class Episode(NamedTuple):
    """Rows of one episode; the protocol determines the split of the queries."""

    support: np.ndarray  # (ways * shots,) of the training split
    queries: np.ndarray  # (ways * queries,)


def draw_episode(
    train_labels: np.ndarray,
    query_labels: np.ndarray | None,
    *,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    number: int,
) -> Episode:
    """Draw one episode.

    Args:
        train_labels: (n,) classes of the training split.
        query_labels: (m,) classes of the queries' split; None draws the queries from the training split, disjoint from
            the support.
        ways: number of classes.
        shots: labeled clouds per class.
        queries: clouds to classify per class.
        seed: of all episodes.
        number: of this episode.

    Raises:
        UserError: fewer than ``ways`` classes have enough clouds.
    """
    generator = np.random.default_rng([seed, number])
    own = query_labels is None
    count = {label: int(np.sum(train_labels == label)) for label in np.unique(train_labels)}
    needed = shots + queries if own else shots
    other = None if own else {label: int(np.sum(query_labels == label)) for label in count}
    fitting = [label for label in count if count[label] >= needed and (own or other[label] >= queries)]
    if len(fitting) < ways:
        raise UserError(
            f"{ways}-way {shots}-shot with {queries} queries a class: only {len(fitting)} of {len(count)} classes have "
            f"{needed} training clouds" + ("" if own else f" and {queries} test clouds") + "; lower --ways, --shots or "
            "--queries"
        )
    support, asked = [], []
    for label in generator.choice(fitting, ways, replace=False):
        rows = generator.permutation(np.flatnonzero(train_labels == label))
        support.append(rows[:shots])
        pool = rows[shots:] if own else generator.permutation(np.flatnonzero(query_labels == label))
        asked.append(pool[:queries])
    return Episode(np.concatenate(support), np.concatenate(asked))


def few_shot_accuracies(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    protocol: str,
    ways: int,
    shots: int,
    queries: int = 20,
    runs: int = 10,
    seed: int = 1,
) -> list[float]:
    """Return the accuracy of every run in percent, from features (n, D) and classes (n,) of both splits.

    Raises:
        UserError: too few classes have enough clouds.
    """
    query_x, query_y = (train_x, train_y) if protocol == "released" else (test_x, test_y)
    accuracies = []
    for number in progress(range(runs), text=f"{ways} ways, {shots} shots", unit="episodes", leave=False):
        support, asked = draw_episode(
            train_y,
            None if protocol == "released" else test_y,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            number=number,
        )
        scaler = StandardScaler().fit(train_x[support].astype(np.float64))
        fit_x, asked_x = scaler.transform(train_x[support]), scaler.transform(query_x[asked])
        accuracies.append(linear_svm(fit_x, train_y[support], asked_x, query_y[asked], c_values=(1.0,)).accuracy)
    return accuracies


def score(config: FewShotConfig, encoder: nn.Module, train: LabeledClouds, test: LabeledClouds) -> dict[str, Any]:
    """Return the results of one encoder: protocol -> setting, such as ``5w10s`` -> mean, std and accuracies."""
    parts = [train] if config.protocol == ["released"] else [train, test]
    features = features_of(encoder, config, {f"{part.split} features": part.points for part in parts}, train=train)
    results: dict[str, Any] = {protocol: {} for protocol in config.protocol}
    for protocol, ways, shots in config.episodes():
        accuracies = few_shot_accuracies(
            *(features[0], train.labels, features[-1], parts[-1].labels),
            protocol=protocol,
            ways=ways,
            shots=shots,
            queries=config.queries,
            runs=config.runs,
            seed=config.seed,
        )
        mean, std = mean_and_std(accuracies)
        results[protocol][f"{ways}w{shots}s"] = {"mean": mean, "std": std, "accuracies": accuracies}
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score every encoder and return the metrics that ``--json`` writes.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = FewShotConfig.from_flags(FewShotConfig.parser().parse_args(argv))
    log_to_screen()
    train, test = open_splits(config.dataset, config.data_root, variant=config.variant, num_points=config.num_points)
    for protocol, ways, shots in config.episodes():  # fail before computing any features
        labels = None if protocol == "released" else test.labels
        draw_episode(train.labels, labels, ways=ways, shots=shots, queries=config.queries, seed=config.seed, number=0)
    found = candidates(config)
    for candidate in found:
        check_neighbors(candidate.encoder, train.points.shape[1], name=candidate.name)
    records = []
    for candidate in found:
        results = score(config, candidate.encoder, train, test)
        records.append({**candidate.record(), "results": results})
        for protocol, settings in results.items():
            shown = ", ".join(f"{name} {value['mean']:.1f} +- {value['std']:.1f}" for name, value in settings.items())
            print(f"{candidate.name}, protocol {protocol}: {shown}", flush=True)
    where = {"released": "training", "test": "test"}
    for protocol in config.protocol:
        print(
            f"protocol {protocol}: percent of {config.queries} queries a class of the {where[protocol]} split; "
            f"mean and standard deviation over {config.runs} runs"
        )
    metrics = {
        "task": "few-shot classification",
        **data_record(config.dataset, (train, test)),
        "num_points": train.points.shape[1],
        "queries": config.queries,
        "number_of_runs": config.runs,
        "seed": config.seed,
        "calibrate_bn": config.calibrate_bn,
        "encoders": records,
        **provenance(),
    }
    write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    run(main)
