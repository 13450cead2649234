"""Fine-tune an encoder with a classifier on labeled clouds, with all labels or a few percent of them.

The encoder comes from pretraining (--pretrain_path) or starts from scratch; the head is always new. Part of the
*labeled training* clouds is held out to select the best epoch; the best and the last epoch are scored on the test
split. With --label_fraction both parts come from that share of the labels, with at least one training cloud per class.

Examples:
  python downstream/classification/finetune.py --dataset modelnet40 --pretrain_path pre.pth --exp_name mn40
  python downstream/classification/finetune.py --dataset scanobjectnn --variant PB_T50_RS --exp_name scratch
  python downstream/classification/finetune.py --pretrain_path pre.pth --label_fraction 0.01 0.05 0.1 0.2 --exp_name few
  python downstream/classification/finetune.py --eval --model_path checkpoints/mn40/best.pth
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from datasets.hdf5 import LabeledClouds
from datasets.scanobjectnn import resolve_variant
from datasets.transforms import fine_tuning_augmentation
from downstream.classification.eval_inputs import CloudSettings, data_record, data_title, open_splits
from downstream.features import check_neighbors
from downstream.finetuning import (
    FineTuneConfig,
    FineTuning,
    Scores,
    check_training_arguments,
    choose_labeled,
    fine_tune,
    hold_out,
    inference_settings,
    k_flag,
    label_fraction_flag,
    model_flag,
    percent,
    reported_entry,
    run_folders,
    scores_of,
    start_model,
    warn_of_other_points,
)
from downstream.metrics import confusion_matrix, semantic_scores
from engine.device import resolve_device
from engine.launch import launch
from engine.load_model import fine_tuned_from_checkpoint
from engine.task import Run
from models.task_heads import Classification
from utils.cli import flag, fraction, log_to_screen, write_json
from utils.collectives import is_main
from utils.errors import CheckpointError, DataError
from utils.released_flags import IN_FINE_TUNING, add_percent_train, add_released_flags
from utils.reproducible import provenance


@dataclass(kw_only=True)
class ClassificationConfig(FineTuneConfig, CloudSettings):
    """Settings of this script."""

    model: str | None = model_flag(Classification)
    k: int | None = k_flag(Classification)
    label_fraction: list[float] = label_fraction_flag("labels", "the training labels to use, at least one per class")
    holdout: float = flag(
        0.1,
        type=fraction,
        metavar="F",
        help="share of the labels in use that is held out to select the best epoch; every class keeps at least one for "
        "training; 0 holds out none",
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script; docs/fidelity.md lists defaults that differ from the release."""
    parser = ClassificationConfig.parser()
    parser.set_defaults(exp_name="finetune", use_sgd=True)
    add_percent_train(parser)
    add_released_flags(parser, IN_FINE_TUNING)
    return parser


class Clouds(Dataset):
    """Clouds with classes numbered from 0 over the classes of the training split.

    Args:
        clouds: one split.
        labels: the training split's distinct labels, sorted.

    Raises:
        DataError: a cloud has a class that the training split lacks.
    """

    def __init__(self, clouds: LabeledClouds, labels: np.ndarray) -> None:
        foreign = clouds.labels[~np.isin(clouds.labels, labels)]
        if len(foreign):
            names = ", ".join(clouds.class_names[label] for label in np.unique(foreign))
            raise DataError(f"the {clouds.split} split has classes without training clouds: {names}")
        self.clouds, self.targets = clouds, np.searchsorted(labels, clouds.labels)
        self.class_names = [clouds.class_names[label] for label in labels]

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.clouds[index][0], int(self.targets[index])


def score(config: ClassificationConfig, model: nn.Module, clouds: Clouds, chosen: np.ndarray | None = None) -> Scores:
    """Return the overall accuracy, mean class accuracy and accuracy of every class, in percent."""
    passes = scores_of(model, clouds, chosen=chosen, **inference_settings(config))
    predicted = [scores.argmax(1).cpu().numpy() for scores, _ in passes]
    truth = clouds.targets if chosen is None else clouds.targets[chosen]
    counts = confusion_matrix(truth, np.concatenate(predicted), len(clouds.class_names))
    scores = semantic_scores(counts, clouds.class_names)
    return {
        "overall_accuracy": scores.overall_accuracy,
        "mean_class_accuracy": scores.mean_accuracy,
        "class_accuracy": scores.as_dict()["class_accuracy"],
    }


def train(config: ClassificationConfig, train_clouds: Clouds, test_clouds: Clouds) -> list[dict[str, Any]]:
    """Run the trainings of one call and return a record for each."""
    sizes = {"num_classes": len(train_clouds.class_names)}
    points = train_clouds.clouds.points.shape[1]
    check_neighbors(start_model(config, Classification, sizes=sizes)[0].encoder, points)
    plans = []
    for share in dict.fromkeys(config.label_fraction):
        labeled = choose_labeled(train_clouds.targets, share, seed=config.seed)
        fit, held = labeled, labeled[:0]
        if config.select_on == "val" and config.holdout and config.eval_every:
            fit, held = (
                labeled[part] for part in hold_out(train_clouds.targets[labeled], config.holdout, seed=config.seed)
            )
        plans.append((share, fit, held))
    folders = run_folders(config, [f"label_{share:g}" for share, _, _ in plans])
    records = []
    for (share, fit, held), folder in zip(plans, folders, strict=True):
        model, report = start_model(config, Classification, sizes=sizes)

        def validate(net: nn.Module, held: np.ndarray = held) -> Scores:
            if config.select_on == "test":
                return score(config, net, test_clouds)
            return score(config, net, train_clouds, held)

        possible = config.eval_every and (len(held) or config.select_on == "test")
        task = FineTuning(
            config,
            model=model,
            dataset=train_clouds,
            chosen=fit,
            validate=validate if possible else None,
            score="overall_accuracy",
            table={"class_names": train_clouds.class_names},
            identity=f"{config.dataset} {config.variant}, {points} points, labels {train_clouds.targets.tolist()}",
            augmentation=fine_tuning_augmentation(),
            per_batch=True,
            own_settings={"label_fraction": share},
        )
        result = fine_tune(Run(task, folder), lambda net: score(config, net, test_clouds), report)
        records.append(
            {
                "label_fraction": share,
                "labels_used": len(fit) + len(held),
                "folder": str(folder.path),
                "validation_samples": len(held),
                "pretrain_path": config.pretrain_path,
                **result,
            }
        )
    return records


def score_checkpoint(config: ClassificationConfig, test_clouds: Clouds) -> dict[str, Any]:
    """Score a finished model and return its record.

    Raises:
        CheckpointError: the model has other classes than the data.
    """
    model, payload = fine_tuned_from_checkpoint(config.model_path, Classification, model=config.model, k=config.k)
    names = payload.get("table", {}).get("class_names")
    if model.sizes["num_classes"] != len(test_clouds.class_names) or names not in (None, test_clouds.class_names):
        raise CheckpointError(
            f"{config.model_path} knows {model.sizes['num_classes']} classes"
            + (f" ({', '.join(names[:4])}, ...)" if names else "")
            + f", {config.dataset} has {len(test_clouds.class_names)} ({', '.join(test_clouds.class_names[:4])}, ...)"
        )
    points = test_clouds.clouds.points.shape[1]
    check_neighbors(model.encoder, points)
    warn_of_other_points(config.model_path, payload, points)
    return {
        "model_path": config.model_path,
        "test": score(config, model.to(resolve_device(config.device)), test_clouds),
    }


def result_line(scores: Scores) -> str:
    """Format the scores as one line."""
    return f"overall accuracy {scores['overall_accuracy']:.2f}, mean of classes {scores['mean_class_accuracy']:.2f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and score, or only score, and return the metrics that ``--json`` writes.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = ClassificationConfig.from_flags(build_parser().parse_args(argv))
    log_to_screen()
    check_training_arguments(config)
    if config.dataset == "scanobjectnn":
        config.resolve(variant=resolve_variant(config.variant))
    splits = open_splits(config.dataset, config.data_root, variant=config.variant, num_points=config.num_points)
    train_clouds, test_clouds = (Clouds(split, np.unique(splits[0].labels)) for split in splits)
    name = data_title(config.dataset, splits[1])
    if config.eval:
        records = [score_checkpoint(config, test_clouds)]
        print(f"\n{name}, test split, {config.model_path}: {result_line(records[0]['test'])}")
    else:
        records = train(config, train_clouds, test_clouds)
        for record in records:
            how, entry = reported_entry(record)
            last = record["last"]
            print(
                f"\n{name}, test split, {percent(record['label_fraction'])} of the labels ({record['labels_used']}): "
                f"{how} (epoch {entry['epoch']}): {result_line(entry['test'])}\n"
                f"  last (epoch {last['epoch']}): {result_line(last['test'])}"
            )
    metrics = {
        "task": Classification.kind,
        **data_record(config.dataset, splits),
        "num_points": train_clouds.clouds.points.shape[1],
        "seed": config.seed,
        "runs": records,
        **provenance(),
    }
    if is_main():
        write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    launch(main)
