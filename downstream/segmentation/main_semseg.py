"""Fine-tune and score semantic segmentation on S3DIS.

The encoder comes from pretraining (--pretrain_path) or starts from scratch; the head is always new. One area is for
testing, the others for training; some of their rooms are held out to select the best epoch. Two protocols, named with
every number:
  blocks  the training-style blocks of the tested area, overlapping and with random points, as in the released code
  rooms   every point of every room, each predicted at least once, as other methods report. It needs the room-wise test
          blocks made by python -m datasets.s3dis_prepare.
--test_area all is the six-fold cross-validation in one call; with --resume it continues where it stopped.

Examples:
  python downstream/segmentation/main_semseg.py --pretrain_path pre.pth --test_area 5 --exp_name area5
  python downstream/segmentation/main_semseg.py --pretrain_path pre.pth --test_area all --exp_name six --protocol both
  python downstream/segmentation/main_semseg.py --pretrain_path pre.pth --test_area 5 --train_area 1 --exp_name one_area
  python downstream/segmentation/main_semseg.py --pretrain_path pre.pth --exp_name probe --freeze_encoder --head linear
  python downstream/segmentation/main_semseg.py --pretrain_path pre.pth --exp_name few --label_fraction 0.05 0.2
  python downstream/segmentation/main_semseg.py --eval --model_path checkpoints/area5/best.pth --protocol rooms
  python downstream/segmentation/main_semseg.py --eval --in_channels 9 --model_path published.pth --test_area 6
  python downstream/segmentation/main_semseg.py --eval --test_area all --model_path checkpoints/six
  python downstream/segmentation/main_semseg.py --eval --test_area all --model_path 'published/model_{area}.t7'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from datasets.s3dis import AREAS, CLASS_NAMES, S3DIS, S3DISRooms, split_rooms
from downstream.features import check_neighbors
from downstream.figures import PICTURE_TYPES, check_output_path, draw_confusion_counts
from downstream.finetuning import (
    IGNORED,
    FewPointLabels,
    FineTuning,
    Scores,
    SegmentationConfig,
    check_training_arguments,
    choose_labeled,
    fine_tune,
    inference_settings,
    k_flag,
    label_fraction_flag,
    labels_text,
    model_flag,
    reported_entry,
    run_folders,
    scores_of,
    start_model,
    warn_of_other_points,
    write_arrays,
)
from downstream.metrics import confusion_matrix, semantic_scores
from engine.device import resolve_device
from engine.launch import launch
from engine.load_model import fine_tuned_from_checkpoint
from engine.task import Run
from models.task_heads import SemanticSegmentation
from utils.cli import flag, log_to_screen, positive_int, write_json
from utils.collectives import is_main, main_only
from utils.errors import CheckpointError, DataError, UserError, warn_on_failure
from utils.released_flags import IN_FINE_TUNING, add_released_flags
from utils.reproducible import provenance

PROTOCOLS = ("blocks", "rooms")
SIZES = {"num_classes": len(CLASS_NAMES)}
ALL, AREA = "all", "{area}"
# Fixed: every run and every seed holds out the same rooms.
HOLD_OUT = {"fraction": 0.1, "seed": 1}


def area_list(text: str) -> list[int]:
    """Parse areas such as ``1`` or ``1,2,3`` (argparse type)."""
    areas = [int(part) for part in text.split(",") if part.strip()]
    for area in areas:
        if area not in AREAS:
            raise argparse.ArgumentTypeError(f"{area} is not an area of S3DIS; choose from 1 to 6")
    return areas


def test_areas(text: str) -> list[int]:
    """Parse one area, or ``all`` (argparse type)."""
    areas = list(AREAS) if text == ALL else area_list(text)
    if len(areas) not in (1, len(AREAS)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one area, 1 to 6, or all")
    return areas


@dataclass(kw_only=True)
class SemanticConfig(SegmentationConfig):
    """Settings of this script."""

    model: str | None = model_flag(SemanticSegmentation)
    k: int | None = k_flag(SemanticSegmentation)
    model_path: str | None = flag(
        group="evaluation only",
        metavar="FILE",
        help="with --eval: checkpoint of this script, or a published state dict; one per area: a folder, or a pattern "
        "such as 'model_{area}.t7'",
    )
    test_area: list[int] = flag(
        "5", group="data", type=test_areas, metavar="1..6|all", help="area to test on; all: each in turn"
    )
    train_area: list[list[int]] | None = flag(
        type=area_list,
        nargs="+",
        metavar="A",
        help="areas to train on, such as 1,2,3; the tested one is always left out (default: all others)",
    )
    in_channels: int | None = flag(
        type=int,
        choices=(3, 9),
        help="3: xyz, as released; 9: also color and the position in the room, from which the first graph is built "
        "(default: the checkpoint's; 3 from scratch)",
    )
    num_points: int | None = flag(
        type=positive_int, metavar="N", help="points per block, the first N rows (default: all; 4,096)"
    )
    label_fraction: list[float] = label_fraction_flag(
        "data", "the labeled training and validation rooms to use, at least one of each"
    )
    protocol: str = flag(
        "blocks", group="testing", choices=(*PROTOCOLS, "both"), help="protocol to score, described at the top"
    )
    confusion_matrix: str | None = flag(
        metavar="FILE",
        help="draw the confusion matrix of each protocol (.png, .pdf; default: confusion_<protocol>.png in the run "
        "folder, none with --eval), of six folds their sum; those of several runs are in their folders",
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script; docs/fidelity.md lists defaults that differ from the release."""
    parser = SemanticConfig.parser()
    parser.set_defaults(exp_name="semseg")
    parser.add_argument(
        "--model_root",
        dest="model_path",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="same as --model_path DIR: with --eval, one model per area (the run folder of six folds, or released "
        "model_1.t7 to model_6.t7; --model_path 'DIR/any_{area}.pth' for files with other names)",
    )
    add_released_flags(parser, IN_FINE_TUNING, datasets=("s3dis",))
    return parser


def protocols_of(config: SemanticConfig) -> list[str]:
    """Return the protocols selected by ``--protocol``."""
    return list(PROTOCOLS) if config.protocol == "both" else [config.protocol]


class AreaTest:
    """Test models on one area.

    Raises:
        DataError: a protocol's blocks are missing or wrong, or the area has no rooms.
    """

    def __init__(self, config: SemanticConfig, area: int, in_channels: int) -> None:
        self.config, self.area, self.device = config, area, resolve_device(config.device)
        wanted = protocols_of(config)
        self.blocks = self.rooms = None
        self.kept: dict[str, np.ndarray] | None = {} if config.save_predictions else None
        if "blocks" in wanted or config.select_on == "test":
            self.blocks = S3DIS(config.data_root, [area], in_channels=in_channels, num_points=config.num_points)
        if "rooms" in wanted:
            self.rooms = S3DISRooms(config.data_root, area, in_channels=in_channels)

    @property
    def block_sizes(self) -> list[int]:
        """Points of the blocks of each protocol."""
        return [*filter(None, (self.blocks and self.blocks.num_points, self.rooms and self.rooms.block_points))]

    def __call__(self, model: nn.Module) -> dict[str, Scores]:
        """Return the scores by protocol, each with its confusion matrix."""
        counts = {}
        for protocol in protocols_of(self.config):
            counts[protocol] = self.count_blocks(model) if protocol == "blocks" else self.count_rooms(model)
        return {protocol: scores_from(matrix) for protocol, matrix in counts.items()}

    def count_blocks(self, model: nn.Module, blocks: Dataset | None = None) -> np.ndarray:
        """Return the confusion matrix over the labeled points of blocks; None means those of the tested area."""
        total = np.zeros((len(CLASS_NAMES), len(CLASS_NAMES)), dtype=np.int64)
        both: list[list[np.ndarray]] = [[], []]
        for scores, (_, truth) in self.passes(model, self.blocks if blocks is None else blocks):
            predicted, known = scores.argmax(1).cpu().numpy(), truth.numpy() != IGNORED
            total += confusion_matrix(truth.numpy()[known], predicted[known], len(CLASS_NAMES))
            if self.kept is not None:
                both[0].append(truth.numpy().astype(np.uint8))
                both[1].append(predicted.astype(np.uint8))
        if self.kept is not None:
            self.keep("blocks", np.concatenate(both[0]), np.concatenate(both[1]))
        return total

    def keep(self, where: str, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Keep predictions for ``--save_predictions``."""
        if self.kept is not None:
            name = f"area_{self.area}/{where}"
            self.kept |= {f"{name}/truth": truth.astype(np.uint8), f"{name}/predicted": predicted.astype(np.uint8)}

    def count_rooms(self, model: nn.Module) -> np.ndarray:
        """Return the confusion matrix over all points of all rooms, averaging predictions of several blocks."""
        rooms = self.rooms
        total = np.zeros((len(CLASS_NAMES), len(CLASS_NAMES)), dtype=np.int64)
        for room, name in enumerate(rooms.rooms):
            truth, predicted, _ = predict_room(
                self.passes(model, rooms, rooms.blocks_of(room)), rooms.room_size(room), name
            )
            total += confusion_matrix(truth, predicted, len(CLASS_NAMES))
            self.keep(f"rooms/{name}", truth, predicted)
        return total

    def passes(self, model: nn.Module, dataset: Any, chosen: np.ndarray | None = None) -> Iterable[Any]:
        """Run the model over a data set with :func:`downstream.finetuning.scores_of`."""
        return scores_of(model, dataset, chosen=chosen, **inference_settings(self.config))


class RoomPrediction(NamedTuple):
    """Classes of all points of a room."""

    truth: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,)
    confidence: np.ndarray  # (N,) probability of the predicted class


def predict_room(passes: Iterable[Any], size: int, name: str) -> RoomPrediction:
    """Merge a room's predictions: average each point's class probabilities over its blocks.

    Raises:
        DataError: a point is in no block.
    """
    shares = torch.zeros(size, len(CLASS_NAMES))
    truth = torch.full((size,), -1)
    for scores, (_, labels, index, _) in passes:
        shares.index_add_(0, index.flatten(), scores.softmax(1).mT.flatten(0, 1).cpu())  # (B, K, N) -> (B * N, K)
        truth[index.flatten()] = labels.flatten()
    if (truth < 0).any():
        raise DataError(
            f"{int((truth < 0).sum())} of the {size} points of {name} are in no test block; make them again"
        )
    confidence = shares.max(1).values / shares.sum(1)
    return RoomPrediction(truth.numpy(), shares.argmax(1).numpy(), confidence.numpy())


def scores_from(confusion: np.ndarray) -> Scores:
    """Return the scores of a confusion matrix, with the matrix."""
    return {**semantic_scores(confusion, CLASS_NAMES).as_dict(), "confusion": confusion.tolist()}


def pooled(entries: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Sum the confusion matrices of several areas and return the scores by protocol."""
    return {
        protocol: scores_from(np.sum([np.array(entry[protocol]["confusion"]) for entry in entries], axis=0))
        for protocol in entries[0]
    }


def training_areas(config: SemanticConfig, test_area: int) -> list[int]:
    """Return the areas to train on: ``--train_area`` or all, always without the tested one, as released.

    Raises:
        UserError: no area is left.
    """
    given = sorted({area for part in config.train_area or [] for area in part})
    if config.train_area is not None and not given:
        raise UserError("--train_area names no area; choose from 1 to 6")
    areas = [area for area in given or AREAS if area != test_area]
    if not areas:
        raise UserError(
            f"--train_area names only area {test_area}, which is the tested one (--test_area); name another area, or "
            "leave --train_area out for all others"
        )
    return areas


def labeled_rooms(rooms: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Return the rooms whose labels a run may use: a share of them, at least one."""
    chosen = choose_labeled(np.zeros(len(rooms)), fraction, seed=seed)
    return [rooms[i] for i in chosen]


def train(config: SemanticConfig) -> list[dict[str, Any]]:
    """Train the folds of one call, with each share of the labels, and return a record for each.

    Raises:
        UserError: there are several folds and several shares, whose scores would not belong together.
    """
    fractions = list(dict.fromkeys(config.label_fraction))
    if len(fractions) > 1 and len(config.test_area) > 1:
        raise UserError("--test_area all takes one --label_fraction; start one call for each, with its own --exp_name")
    probe, _ = start_model(config, SemanticSegmentation, sizes=SIZES, in_channels=config.in_channels)
    channels = probe.encoder.in_channels
    plans = []
    for area in config.test_area:  # check all data before the first run starts
        areas = training_areas(config, area)
        test = AreaTest(config, area, channels)
        rooms = S3DIS(config.data_root, areas, in_channels=channels).rooms
        held: list[str] = []
        if config.select_on == "val" and config.eval_every:
            rooms, held = split_rooms(rooms, **HOLD_OUT)
        for fraction in fractions:
            sets = [
                S3DIS(
                    config.data_root,
                    areas,
                    in_channels=channels,
                    num_points=config.num_points,
                    rooms=labeled_rooms(names, fraction, config.seed),
                )
                for names in (rooms, held)
                if names
            ]
            for points in (sets[0].num_points, *test.block_sizes):
                check_neighbors(probe.encoder, points)
            plans.append((area, areas, fraction, test, sets))
    records = []
    one = len(fractions) == 1
    folders = run_folders(config, [f"area_{area}" if one else f"label_{f:g}" for area, _, f, _, _ in plans])
    for folder in folders:
        area, areas, fraction, test, sets = plans.pop(0)  # with a fold's data, its open files go: there are hundreds
        model, report = start_model(config, SemanticSegmentation, sizes=SIZES, in_channels=config.in_channels)
        blocks: Dataset = test.blocks if config.select_on == "test" else sets[-1]
        if config.select_on == "val" and config.point_label_fraction < 1:
            blocks = FewPointLabels(blocks, config.point_label_fraction, seed=config.seed)

        def validate(net: nn.Module, test: AreaTest = test, blocks: Dataset = blocks) -> Scores:
            return semantic_scores(test.count_blocks(net, blocks), CLASS_NAMES).as_dict()

        task = FineTuning(
            config,
            model=model,
            dataset=sets[0],
            chosen=np.arange(len(sets[0])),
            validate=validate if config.eval_every else None,
            score="mean_iou",
            table={"class_names": list(CLASS_NAMES), "train_areas": areas},
            identity=f"areas {areas}, rooms {sets[0].rooms}, {sets[0].num_points} points",
            own_settings={"label_fraction": fraction, "test_area": area},
        )
        held = len(sets[1].rooms) if len(sets) > 1 else 0
        lines = [f"test area {area}; {sets[0]!r}; rooms held out: {held}", *report]
        result = fine_tune(Run(task, folder), test, lines)
        records.append({"test_area": area, "train_areas": areas, "folder": str(folder.path), "held_out_rooms": held})
        records[-1] |= {"label_fraction": fraction, "point_label_fraction": config.point_label_fraction}
        records[-1] |= {"pretrain_path": config.pretrain_path, **result}
        picture = config.confusion_matrix if len(folders) == 1 else None
        draw(picture, reported_entry(result)[1]["test"], f"test area {area}", folder.path)
    return records


def fold_checkpoint(model_path: Path, area: int, *, folds: int) -> Path:
    """Return the checkpoint that scores one area.

    Args:
        model_path: a checkpoint; a pattern with ``{area}``; or a folder of released models or of a six-fold run.
        area: the tested area.
        folds: number of tested areas.

    Raises:
        UserError: it is missing, its run is not finished, or one checkpoint is given for several areas.
    """
    if any(model_path.glob("model_[1-6].t7")):
        model_path = model_path / f"model_{AREA}.t7"
    if AREA in str(model_path):
        path = Path(str(model_path).replace(AREA, str(area)))
        if not path.is_file():
            raise UserError(f"{path} does not exist: scoring area {area} needs the model that was not trained on it")
        return path
    if folds == 1:
        return model_path
    if not model_path.is_dir():
        raise UserError(
            f"--test_area all scores one model per area: --model_path must be a run folder, or a pattern such as "
            f"'model_{AREA}.t7', not {model_path}"
        )
    fold = model_path / f"area_{area}"
    if not (fold / "result.json").is_file():
        raise UserError(
            f"{fold} is not finished ({'it was started' if (fold / 'last.pth').is_file() else 'it was not started'}); "
            "the six-fold score needs all areas: repeat the training command with --resume"
        )
    return fold / ("best.pth" if (fold / "best.pth").is_file() else "last.pth")


def score_checkpoints(config: SemanticConfig) -> list[dict[str, Any]]:
    """Score finished models, one per tested area, and return a record for each."""
    areas = config.test_area
    paths = [fold_checkpoint(Path(config.model_path), area, folds=len(areas)) for area in areas]
    records = []
    kept: dict[str, Any] = {"class_names": list(CLASS_NAMES)}
    for area, path in zip(areas, paths, strict=True):
        model, payload = fine_tuned_from_checkpoint(path, SemanticSegmentation, model=config.model, k=config.k)
        channels = model.encoder.in_channels
        if config.in_channels not in (None, channels):
            raise CheckpointError(
                f"{path} takes {channels} values per point; --in_channels {config.in_channels} does not fit"
            )
        if model.sizes["num_classes"] != len(CLASS_NAMES):
            raise CheckpointError(f"{path} has {model.sizes['num_classes']} classes, but S3DIS has {len(CLASS_NAMES)}")
        trained = payload.get("table", {}).get("train_areas")
        if trained and area in trained:
            print(f"warning: {path} was trained on area {area}; its score there says nothing about new rooms")
        test = AreaTest(config, area, channels)
        for points in test.block_sizes:
            check_neighbors(model.encoder, points)
            warn_of_other_points(path, payload, points)
        scores = test(model.to(test.device))
        kept |= test.kept or {}
        records.append({"test_area": area, "train_areas": trained, "model_path": str(path), "test": scores})
        if config.confusion_matrix and len(areas) == 1:
            draw(config.confusion_matrix, scores, f"test area {area}", None)
    if config.save_predictions and is_main():
        write_arrays(config.save_predictions, kept)
    return records


@main_only
def draw(picture: str | None, scores: dict[str, Scores], what: str, folder: Path | None) -> None:
    """Draw the confusion matrix of each protocol, to ``picture`` or, without one, into the run folder."""
    for protocol, values in scores.items():
        if picture:
            path = Path(picture)
            path = path.with_stem(f"{path.stem}_{protocol}") if len(scores) > 1 else path
        else:
            path = folder / f"confusion_{protocol}.png"
        title = f"S3DIS, {what}, protocol {protocol}: mIoU {values['mean_iou']:.1f}"
        with warn_on_failure(str(path)):
            draw_confusion_counts(np.array(values["confusion"]), CLASS_NAMES, path, title=title, unit="points")


def result_table(scores: dict[str, Scores]) -> str:
    """Format the scores, one block of lines per protocol."""
    width = max(map(len, CLASS_NAMES))
    lines = []
    for protocol, values in scores.items():
        lines.append(
            f"  protocol {protocol}: OA {values['overall_accuracy']:.2f}, mAcc {values['mean_accuracy']:.2f}, "
            f"mIoU {values['mean_iou']:.2f}"
        )
        for name, iou in values["class_iou"].items():
            lines.append(f"    {name.ljust(width)}  IoU {'-' if iou is None else f'{iou:.1f}':>5}")
        if values["absent_classes"]:
            lines.append(f"    neither present nor predicted, not in mIoU: {', '.join(values['absent_classes'])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and score, or only score, and return the metrics that ``--json`` writes.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = SemanticConfig.from_flags(build_parser().parse_args(argv))
    log_to_screen()
    check_training_arguments(config)
    if config.confusion_matrix:
        check_output_path(config.confusion_matrix, PICTURE_TYPES)
    metrics: dict[str, Any] = {
        "task": SemanticSegmentation.kind,
        "protocols": list(protocols_of(config)),
        "seed": config.seed,
    }
    if config.eval:
        records = score_checkpoints(config)
        entries = [record["test"] for record in records]
        how = [record["model_path"] for record in records]
    else:
        records = train(config)
        found = [reported_entry(record) for record in records]
        entries = [entry["test"] for _, entry in found]
        how = [f"{name}, epoch {entry['epoch']}" for name, entry in found]
        if config.label_fraction != [1.0] or config.point_label_fraction < 1:
            texts = [labels_text(config, record["label_fraction"]) for record in records]
            how = [f"labels {text}; {rest}" for text, rest in zip(texts, how, strict=True)]
    for record, entry, text in zip(records, entries, how, strict=True):
        print(f"\ntest area {record['test_area']} ({text})\n{result_table(entry)}")
        if "last" in record:
            last = ", ".join(f"{name} mIoU {s['mean_iou']:.2f}" for name, s in record["last"]["test"].items())
            print(f"  last, epoch {record['last']['epoch']}: {last}")
    metrics["runs"] = records
    if len(config.test_area) > 1:
        metrics["six_fold"] = pooled(entries)
        print(f"\nsix-fold: the confusion matrices of all areas added up\n{result_table(metrics['six_fold'])}")
        folder = None if config.eval else Path(config.output_dir) / config.exp_name
        if folder or config.confusion_matrix:
            draw(config.confusion_matrix, metrics["six_fold"], "six-fold", folder)
    metrics |= provenance()
    if is_main():
        write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    launch(main)
