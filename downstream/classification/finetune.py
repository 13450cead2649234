"""Fine-tune an encoder with a classifier on labelled clouds: supervised, with all labels or a few per cent of them.

The encoder comes from pretraining (--pretrain_path) or starts from scratch; the head starts fresh. A part of the
*labelled training* clouds is held out to choose the best epoch; it and the last epoch are scored on the test split.
With --label_fraction both parts come out of that share of the labels, at least one cloud of every class to train on.

Examples:
  python downstream/classification/finetune.py --dataset modelnet40 --pretrain_path pre.pth --exp_name mn40
  python downstream/classification/finetune.py --dataset scanobjectnn --variant PB_T50_RS --exp_name scratch
  python downstream/classification/finetune.py --pretrain_path pre.pth --label_fraction 0.01 0.05 0.1 0.2 --exp_name few
  python downstream/classification/finetune.py --eval --model_path checkpoints/mn40/best.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from datasets.hdf5 import LabeledClouds
from datasets.transforms import fine_tuning_augmentation
from downstream.classification.eval_inputs import add_data_arguments, open_splits
from downstream.features import check_neighbors
from downstream.finetuning import (
    FineTuning,
    Scores,
    add_training_arguments,
    check_training_arguments,
    choose_labeled,
    hold_out,
    reported_entry,
    run_folders,
    scores_of,
    start_model,
)
from downstream.metrics import confusion_matrix, semantic_scores
from engine.device import resolve_device
from engine.launch import launch
from engine.load_model import fine_tuned_from_checkpoint
from models.task_heads import Classification
from utils.cli import HelpFormatter, log_to_screen, write_json
from utils.collectives import is_main
from utils.errors import CheckpointError, DataError, UserError
from utils.released_flags import add_percent_train
from utils.reproducible import git_commit, versions

RELEASED_K = Classification.released_k


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script; docs/fidelity.md says which defaults are not the released ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, task=Classification, exp_name="finetune", k=RELEASED_K, use_sgd=True)
    add_data_arguments(parser, batch=False)
    g = parser.add_argument_group("labels")
    add_percent_train(g)
    g.add_argument(
        "--label_fraction",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="F",
        help="share of the training labels to use, at least one per class; several values are one run each, in "
        "sub-folders of the run folder",
    )
    g.add_argument(
        "--holdout",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the labels in use that choose the best epoch; no class gives its last one; 0 holds out none",
    )
    return parser


class Clouds(Dataset):
    """Clouds whose classes are numbered from 0 among those that the training split has.

    Args:
        clouds: one split.
        labels: the training split's labels, sorted, each once.

    Raises:
        DataError: a cloud of a class that the training split does not have.
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


def score(args: argparse.Namespace, model: nn.Module, clouds: Clouds, chosen: np.ndarray | None = None) -> Scores:
    """Overall accuracy and mean accuracy of the classes, in percent."""
    predicted = [
        scores.argmax(1).cpu().numpy()
        for scores, _ in scores_of(
            model,
            clouds,
            batch_size=args.test_batch_size,
            device=resolve_device(args.device),
            workers=args.workers,
            chosen=chosen,
        )
    ]
    truth = clouds.targets if chosen is None else clouds.targets[chosen]
    counts = confusion_matrix(truth, np.concatenate(predicted), len(clouds.class_names))
    scores = semantic_scores(counts, clouds.class_names)
    return {
        "overall_accuracy": scores.overall_accuracy,
        "mean_class_accuracy": scores.mean_accuracy,
        "class_accuracy": scores.as_dict()["class_accuracy"],
    }


def train(args: argparse.Namespace, train_clouds: Clouds, test_clouds: Clouds) -> list[dict[str, Any]]:
    """Run the trainings of one call; returns a record for each."""
    sizes = {"num_classes": len(train_clouds.class_names)}
    points = train_clouds.clouds.points.shape[1]
    check_neighbors(start_model(args, Classification, k=RELEASED_K, sizes=sizes)[0].encoder, points)
    plans = []
    for fraction in dict.fromkeys(args.label_fraction):
        labeled = choose_labeled(train_clouds.targets, fraction, seed=args.seed)
        fit, held = labeled, labeled[:0]
        if args.select_on == "val" and args.holdout and args.eval_every:
            fit, held = (
                labeled[part] for part in hold_out(train_clouds.targets[labeled], args.holdout, seed=args.seed)
            )
        plans.append((fraction, fit, held))
    folders = run_folders(args, [f"label_{fraction:g}" for fraction, _, _ in plans])
    records = []
    for (fraction, fit, held), folder in zip(plans, folders, strict=True):
        model, report = start_model(args, Classification, k=RELEASED_K, sizes=sizes)

        def validate(net: nn.Module, held: np.ndarray = held) -> Scores:
            if args.select_on == "test":
                return score(args, net, test_clouds)
            return score(args, net, train_clouds, held)

        possible = args.eval_every and (len(held) or args.select_on == "test")
        tuning = FineTuning(
            args,
            folder,
            resolve_device(args.device),
            model=model,
            dataset=train_clouds,
            chosen=fit,
            validate=validate if possible else None,
            score="overall_accuracy",
            table={"class_names": train_clouds.class_names},
            identity=f"{args.dataset} {args.variant}, {points} points, labels {train_clouds.targets.tolist()}",
            augmentation=fine_tuning_augmentation(),
            per_batch=True,
        )
        result = tuning.run(lambda net: score(args, net, test_clouds), report)
        records.append(
            {
                "label_fraction": fraction,
                "labels_used": len(fit) + len(held),
                "folder": str(folder.path),
                "validation_samples": len(held),
                "pretrain_path": args.pretrain_path,
                **result,
            }
        )
    return records


def score_checkpoint(args: argparse.Namespace, test_clouds: Clouds) -> dict[str, Any]:
    """Score a finished model; returns its record.

    Raises:
        CheckpointError: the model knows other classes than the data.
    """
    model, payload = fine_tuned_from_checkpoint(args.model_path, Classification, model=args.model, k=args.k)
    names = payload.get("table", {}).get("class_names")
    if model.sizes["num_classes"] != len(test_clouds.class_names) or names not in (None, test_clouds.class_names):
        raise CheckpointError(
            f"{args.model_path} knows {model.sizes['num_classes']} classes"
            + (f" ({', '.join(names[:4])}, ...)" if names else "")
            + f", {args.dataset} has {len(test_clouds.class_names)} ({', '.join(test_clouds.class_names[:4])}, ...)"
        )
    check_neighbors(model.encoder, test_clouds.clouds.points.shape[1])
    return {"model_path": args.model_path, "test": score(args, model.to(resolve_device(args.device)), test_clouds)}


def result_line(scores: Scores) -> str:
    """The scores as text."""
    return f"overall accuracy {scores['overall_accuracy']:.2f}, mean of classes {scores['mean_class_accuracy']:.2f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and score, or only score; returns what ``--json`` writes.

    Raises:
        UserError: a wrong setting, file or checkpoint.
    """
    args = build_parser().parse_args(argv)
    log_to_screen()
    check_training_arguments(args)
    if not 0 <= args.holdout < 1:
        raise UserError(f"--holdout {args.holdout:g}: expected 0 or more and less than 1")
    splits = open_splits(args)
    train_clouds, test_clouds = (Clouds(split, np.unique(splits[0].labels)) for split in splits)
    name = args.dataset + (f" {args.variant}" if args.dataset == "scanobjectnn" else "")
    if args.eval:
        records = [score_checkpoint(args, test_clouds)]
        print(f"\n{name}, test split, {args.model_path}: {result_line(records[0]['test'])}")
    else:
        records = train(args, train_clouds, test_clouds)
        for record in records:
            how, entry = reported_entry(record)
            last = record["last"]
            print(
                f"\n{name}, test split, {record['label_fraction']:.0%} of the labels ({record['labels_used']}): "
                f"{how} (epoch {entry['epoch']}): {result_line(entry['test'])}\n"
                f"  last (epoch {last['epoch']}): {result_line(last['test'])}"
            )
    metrics = {
        "task": Classification.kind,
        "dataset": args.dataset,
        "variant": args.variant if args.dataset == "scanobjectnn" else None,
        "data": {part.split: part.origin() for part in splits},
        "num_points": train_clouds.clouds.points.shape[1],
        "seed": args.seed,
        "runs": records,
        "versions": versions(),
        "commit": git_commit(),
    }
    if is_main():
        write_json(args.json, metrics)
    return metrics


if __name__ == "__main__":
    launch(main)
