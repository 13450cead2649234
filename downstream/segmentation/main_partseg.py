"""Fine-tune and score part segmentation on ShapeNetPart, or on your data set in its layout.

The encoder comes from pretraining (--pretrain_path) or starts from scratch; the head is always new. The best epoch is
selected on the validation split; the best and the last epoch are scored on the test split:
  instance mIoU  mean over shapes of the mean IoU over the parts of the shape's category
  class mIoU     mean over categories of their shapes' mean
  accuracy       correctly predicted points

Examples:
  python downstream/segmentation/main_partseg.py --pretrain_path checkpoints/crossnet_part/last.pth --exp_name part
  python downstream/segmentation/main_partseg.py --exp_name part_scratch --model pointnet_partseg
  python downstream/segmentation/main_partseg.py --pretrain_path pre.pth --exp_name few --label_fraction 0.01 0.05
  python downstream/segmentation/main_partseg.py --pretrain_path pre.pth --exp_name probe --freeze_encoder --head linear
  python downstream/segmentation/main_partseg.py --eval --model_path checkpoints/part/best.pth --votes 10
  python downstream/segmentation/main_partseg.py --class_choice airplane --exp_name airplane
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.shapenet_part import ShapeNetPart
from datasets.streams import SampleStreams, Stream
from datasets.transforms import RandomScaleAxes
from downstream.features import check_neighbors
from downstream.finetuning import (
    FineTuning,
    Scores,
    SegmentationConfig,
    check_training_arguments,
    choose_labeled,
    fine_tune,
    hold_out,
    inference_settings,
    k_flag,
    label_fraction_flag,
    labeled_points,
    labels_text,
    model_flag,
    reported_entry,
    run_folders,
    scores_of,
    start_model,
    warn_of_other_points,
    write_arrays,
)
from downstream.metrics import part_scores
from engine.device import resolve_device
from engine.launch import launch
from engine.load_model import fine_tuned_from_checkpoint
from engine.task import Run
from models.task_heads import PartSegmentation
from utils.cli import flag, log_to_screen, positive_int, write_json
from utils.collectives import is_main, main_only
from utils.errors import CheckpointError, UserError
from utils.files import has_data_files
from utils.released_flags import IN_FINE_TUNING, add_percent_train, add_released_flags
from utils.reproducible import provenance

DATASET_NAMES = ("shapenetpart", "shapenet_part", "shapenet")
VOTE_SCALES = (0.8, 1.25)


@dataclass(kw_only=True)
class PartConfig(SegmentationConfig):
    """Settings of this script."""

    model: str | None = model_flag(PartSegmentation)
    k: int | None = k_flag(PartSegmentation)
    num_points: int | None = flag(
        group="data", type=positive_int, metavar="N", help="points per shape, the first N rows (default: all; 2,048)"
    )
    class_choice: str | None = flag(metavar="NAME", help="train and test a model of this category only")
    class_test: list[str] | None = flag(
        nargs="+", metavar="NAME", help="score the test shapes of these categories only"
    )
    label_fraction: list[float] = label_fraction_flag(
        "data", "the labeled training and validation shapes to use, at least one per category"
    )
    votes: int = flag(
        1,
        group="testing",
        type=positive_int,
        metavar="V",
        help=f"predictions averaged per shape: of the shape itself and of V - 1 copies whose axes are scaled by "
        f"{VOTE_SCALES[0]} to {VOTE_SCALES[1]}",
    )
    within_category: bool = flag(
        False, help="predict only parts of the shape's category (default: of all categories, as released)"
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script; docs/fidelity.md lists defaults that differ from the release."""
    parser = PartConfig.parser()
    parser.set_defaults(exp_name="partseg")
    add_percent_train(parser)
    add_released_flags(parser, IN_FINE_TUNING, datasets=DATASET_NAMES)
    return parser


class Parts(Dataset):
    """Shapes with parts numbered like the model's: from 0 within a chosen category, otherwise over all categories."""

    def __init__(self, shapes: ShapeNetPart) -> None:
        self.shapes = shapes
        taxonomy = shapes.taxonomy
        whole = range(taxonomy.num_parts)
        self.numbers = whole if shapes.category is None else taxonomy.parts_of(shapes.category)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        points, category, parts = self.shapes[index]
        return points, category, parts - self.numbers.start

    def table(self) -> dict[str, Any]:
        """Return categories and parts in plain types, for a checkpoint."""
        taxonomy = self.shapes.taxonomy
        return {
            "category_names": list(taxonomy.category_names),
            "part_counts": list(taxonomy.part_counts),
            "part_names": list(taxonomy.part_names),
            "class_choice": None if self.shapes.category is None else taxonomy.category_names[self.shapes.category],
        }

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the head."""
        return {"num_categories": len(self.shapes.taxonomy.category_names), "num_parts": len(self.numbers)}


def predict_parts(
    model: nn.Module,
    parts: Parts,
    *,
    device: torch.device,
    batch_size: int,
    chosen: np.ndarray | None = None,
    workers: int = 0,
    votes: int = 1,
    within_category: bool = False,
    seed: int = 1,
) -> np.ndarray:
    """Predict the part of every point of the chosen shapes; None means all.

    With ``votes`` above 1 the predictions are averaged over the shape and ``votes`` - 1 scaled copies.

    Returns:
        (n, N) int64 part numbers over all categories.
    """
    taxonomy, scale = parts.shapes.taxonomy, RandomScaleAxes(*VOTE_SCALES)
    owner = np.repeat(np.arange(len(taxonomy.part_counts)), taxonomy.part_counts)
    owner = torch.from_numpy(owner[parts.numbers.start : parts.numbers.stop]).to(device)

    def scaled(points: Tensor, index: Tensor, vote: int) -> Tensor:
        return scale(points, SampleStreams(seed=seed, epoch=vote, index=index, purpose=Stream.VOTES))

    predicted = []
    for scores, batch in scores_of(
        model,
        parts,
        batch_size=batch_size,
        device=device,
        workers=workers,
        chosen=chosen,
        copies=[partial(scaled, vote=vote) for vote in range(1, votes)],
        inputs=2,
    ):
        if within_category:
            foreign = owner[None] != batch[1].to(device)[:, None]  # (B, P)
            scores = scores.masked_fill(foreign[:, :, None], float("-inf"))
        predicted.append(scores.argmax(1).cpu())
    return parts.numbers.start + torch.cat(predicted).numpy()


class PartTask:
    """The data of one call, and how it is scored; ``class_choice`` None means a model of all categories."""

    def __init__(self, config: PartConfig, class_choice: str | None) -> None:
        self.config, self.device = config, resolve_device(config.device)
        if class_choice is not None and not class_choice.strip():
            raise UserError("--class_choice is empty: name a category, or leave the flag out for all")
        self.class_choice = class_choice
        self.test = self.open("test")
        names = config.class_test or []
        numbers = [self.test.shapes.taxonomy.category_number(name) for name in names]
        self.tested = np.arange(len(self.test))
        if numbers:
            self.tested = np.flatnonzero(np.isin(self.test.shapes.categories, numbers))
        if not len(self.tested):
            raise UserError(f"--class_test {' '.join(names)}: the test shapes have none of these categories")

    def open(self, split: str) -> Parts:
        """Read one split."""
        config = self.config
        shapes = ShapeNetPart(config.data_root, split, num_points=config.num_points, class_choice=self.class_choice)
        return Parts(shapes)

    def predict(self, model: nn.Module, parts: Parts, chosen: np.ndarray, *, votes: int = 1) -> np.ndarray:
        """Predict the parts (n, N) of some shapes."""
        more = {
            "within_category": self.config.within_category,
            "seed": self.config.seed,
            **inference_settings(self.config),
        }
        return predict_parts(model, parts, chosen=chosen, votes=votes, **more)

    def validate(self, model: nn.Module, parts: Parts, chosen: np.ndarray) -> Scores:
        """Score a model on some shapes by the labels that the run may use."""
        config, known = self.config, None
        if config.select_on == "val" and config.point_label_fraction < 1:
            share = {"fraction": config.point_label_fraction, "seed": config.seed}
            known = np.stack([labeled_points(parts.shapes.parts[i], **share, index=int(i)) for i in chosen])
        return self.scores(parts, chosen, self.predict(model, parts, chosen), known=known)

    @staticmethod
    def scores(parts: Parts, chosen: np.ndarray, predicted: np.ndarray, *, known: np.ndarray | None = None) -> Scores:
        """Score the predicted parts (n, N) of some shapes; ``known`` as for :func:`downstream.metrics.part_scores`."""
        shapes, numbers = parts.shapes, parts.shapes.categories[chosen]
        return part_scores(shapes.parts[chosen], predicted, numbers, shapes.taxonomy, known=known).as_dict()

    def score_test(self, model: nn.Module) -> Scores:
        """Return the scores on the test shapes, with the settings of the command line."""
        predicted = self.predict(model, self.test, self.tested, votes=self.config.votes)
        if self.config.save_predictions:
            self.save(predicted)
        return self.scores(self.test, self.tested, predicted)

    @main_only
    def save(self, predicted: np.ndarray) -> None:
        """Write predicted and true parts (n, N) of the tested shapes, and what is needed to score them."""
        shapes, taxonomy = self.test.shapes, self.test.shapes.taxonomy
        write_arrays(
            self.config.save_predictions,
            {
                "predicted": predicted.astype(np.int16),
                "truth": shapes.parts[self.tested].astype(np.int16),
                "category": shapes.categories[self.tested].astype(np.int16),
                "shape": self.tested,
                "category_names": list(taxonomy.category_names),
                "part_starts": list(taxonomy.part_starts),
                "part_counts": list(taxonomy.part_counts),
            },
        )

    def splits(self) -> tuple[Parts, np.ndarray, Parts | None, np.ndarray]:
        """Return the training shapes, which of them to use, the shapes to select the best epoch, and which of those."""
        if self.config.select_on == "test":
            train = self.open("trainval")
            return train, np.arange(len(train)), self.test, np.arange(len(self.test))
        train = self.open("train")
        folder = train.shapes.folder
        if has_data_files(folder, "*val*") or has_data_files(folder / "train_test_split", "*val*"):
            val = self.open("val")
            return train, np.arange(len(train)), val, np.arange(len(val))
        fit, held = hold_out(train.shapes.categories, 0.1, seed=self.config.seed)
        return train, fit, train, held


def limited(parts: Parts, chosen: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the chosen shapes whose labels a run may use."""
    if fraction == 1:
        return chosen
    return chosen[choose_labeled(parts.shapes.categories[chosen], fraction, seed=seed)]


def train(config: PartConfig) -> list[dict[str, Any]]:
    """Run the trainings of one call and return a record for each."""
    task = PartTask(config, config.class_choice)
    parts, fit, held_parts, held = task.splits()
    fractions = list(dict.fromkeys(config.label_fraction))
    chosen = [limited(parts, fit, fraction, config.seed) for fraction in fractions]
    if config.select_on == "val":
        validated = [limited(held_parts, held, f, config.seed) if len(held) else held for f in fractions]
    else:
        validated = [held] * len(fractions)
    check_neighbors(start_model(config, PartSegmentation, sizes=parts.sizes())[0].encoder, points_of(parts))
    folders = run_folders(config, [f"label_{fraction:g}" for fraction in fractions])
    records = []
    for fraction, rows, val_rows, folder in zip(fractions, chosen, validated, folders, strict=True):
        model, report = start_model(config, PartSegmentation, sizes=parts.sizes())

        def validate(net: nn.Module, rows: np.ndarray = val_rows) -> Scores:
            return task.validate(net, held_parts, rows)

        tuning = FineTuning(
            config,
            model=model,
            dataset=parts,
            chosen=rows,
            validate=validate if len(val_rows) and config.eval_every else None,
            score="instance_miou",
            table=parts.table(),
            identity=f"{len(parts)} shapes, labels {int(parts.shapes.parts.sum())}, {points_of(parts)} points",
            own_settings={"label_fraction": fraction},
        )
        result = fine_tune(Run(tuning, folder), task.score_test, [repr(parts.shapes), *report])
        records.append(
            {
                "label_fraction": fraction,
                "point_label_fraction": config.point_label_fraction,
                "folder": str(folder.path),
                "validation_samples": len(val_rows),
                "pretrain_path": config.pretrain_path,
                **result,
            }
        )
    return records


def points_of(parts: Parts) -> int:
    """Return the number of points per shape."""
    return parts.shapes.points.shape[1]


def check_fits(path: str, model: nn.Module, payload: Mapping[str, Any], parts: Parts) -> None:
    """Check that a model has the categories and parts of the data.

    Args:
        path: of the checkpoint, for the message.
        model: a part segmentation model.
        payload: its checkpoint; empty for published weights.
        parts: the data.

    Raises:
        CheckpointError: the model has others.
    """
    own, sizes = parts.sizes(), {key: model.sizes[key] for key in ("num_categories", "num_parts")}
    # Parts may be renamed, but their number and categories must be the same.
    here, there = ({**table, "part_names": None} for table in (parts.table(), payload.get("table", parts.table())))
    if own != sizes or here != there:
        raise CheckpointError(
            f"{path} knows {sizes['num_parts']} parts of {sizes['num_categories']} categories, the data set in "
            f"{parts.shapes.folder} has {own['num_parts']} parts of {own['num_categories']}"
            + ("" if own != sizes else ", and their names or counts differ")
        )


def score_checkpoint(config: PartConfig) -> dict[str, Any]:
    """Score a finished model and return its record.

    Raises:
        CheckpointError: the model has other categories or parts than the data.
    """
    model, payload = fine_tuned_from_checkpoint(config.model_path, PartSegmentation, model=config.model, k=config.k)
    table = payload.get("table", {})
    choice = config.class_choice or table.get("class_choice")
    if "class_choice" in table and table["class_choice"] != choice:
        raise CheckpointError(
            f"{config.model_path} is a model of all categories; --class_choice {choice} needs one trained on it alone "
            f"(--class_test {choice} scores this model on that category)"
            if table["class_choice"] is None
            else f"{config.model_path} is a model of the category {table['class_choice']}, not of {choice}"
        )
    task = PartTask(config, choice)
    check_fits(config.model_path, model, payload, task.test)
    check_neighbors(model.encoder, points_of(task.test))
    warn_of_other_points(config.model_path, payload, points_of(task.test))
    return {
        "model_path": config.model_path,
        "encoder": payload["encoder"] if payload else None,
        "test": task.score_test(model.to(task.device)),
    }


def result_table(scores: Scores) -> str:
    """Format the scores, one line per category."""
    rows = [("", "shapes", "mIoU")]
    for name, value in scores["category_miou"].items():
        rows.append((name, str(scores["category_shapes"][name]), f"{value:.1f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name.ljust(width)}  {shapes.rjust(6)}  {value.rjust(5)}" for name, shapes, value in rows]
    if scores["absent_categories"]:
        lines.append(f"  without test shapes, in no mean: {', '.join(scores['absent_categories'])}")
    means = ", ".join(
        f"{text} {scores[key]:.2f}"
        for key, text in (
            ("instance_miou", "instance mIoU"),
            ("class_miou", "class mIoU"),
            ("accuracy", "accuracy"),
            ("mean_part_accuracy", "mean accuracy of parts"),
        )
    )
    return "\n".join([*lines, f"  {means}"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and score, or only score, and return the metrics that ``--json`` writes.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = PartConfig.from_flags(build_parser().parse_args(argv))
    log_to_screen()
    check_training_arguments(config)
    rule = "parts of the shape's category" if config.within_category else "all parts of the model"
    protocol = f"test split; the prediction is among {rule}; {config.votes} vote{'s' if config.votes > 1 else ''}"
    if config.eval:
        records = [score_checkpoint(config)]
        print(f"\n{config.model_path} ({protocol})\n{result_table(records[0]['test'])}")
    else:
        records = train(config)
        for record in records:
            how, entry = reported_entry(record)
            labels = labels_text(config, record["label_fraction"])
            print(f"\nlabels {labels}: {how} (epoch {entry['epoch']}; {protocol})\n{result_table(entry['test'])}")
            last = record["last"]
            print(f"  last (epoch {last['epoch']}): instance mIoU {last['test']['instance_miou']:.2f}")
    metrics = {
        "task": PartSegmentation.kind,
        "protocol": protocol,
        "seed": config.seed,
        "runs": records,
        **provenance(),
    }
    if is_main():
        write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    launch(main)
