"""Settings that choose the encoders and labeled clouds of an evaluation, and the functions that open them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from datasets.hdf5 import LabeledClouds
from datasets.registry import CLASSIFICATION_SETS, find_datasets, open_classification_set
from datasets.scanobjectnn import VARIANTS
from downstream.features import calibrate_batch_norm, extract_features
from downstream.figures import check_output_path
from engine.device import resolve_device
from engine.load_model import (
    DEFAULT_ENCODER,
    describe_encoder,
    encoder_from_checkpoint,
    encoder_from_flags,
    find_weights,
)
from models import ENCODER_ALIASES, ENCODERS
from utils.cli import CommonSettings, Settings, flag, positive_int, seed_number
from utils.errors import DataError, UserError
from utils.files import sha256
from utils.released_flags import model_name
from utils.reproducible import seed_everything


@dataclass(kw_only=True)
class CloudSettings(Settings):
    """Settings that choose labeled clouds, see :func:`open_splits`."""

    dataset: str = flag(
        "modelnet40",
        group="data",
        type=str.lower,
        choices=CLASSIFICATION_SETS,
        help="labeled clouds to score on; folder: your files, --data_root DIR with train/<class>/* and test/<class>/* "
        "(docs/datasets.md)",
    )
    variant: str = flag(
        "OBJ_BG",
        metavar="V",
        help=f"variant of ScanObjectNN, one of {', '.join(VARIANTS)}; always report it with the number",
    )
    num_points: int | None = flag(1024, type=positive_int, metavar="N", help="points per cloud, the first N rows")


@dataclass(kw_only=True)
class EvaluationConfig(CommonSettings, CloudSettings):
    """Settings that scripts for frozen encoders share.

    Raises:
        UserError: they do not fit together.
    """

    batch_size: int = flag(
        32,
        "--test_batch_size",
        type=positive_int,
        metavar="B",
        help="clouds per forward pass; changes speed and memory, not the features (with --calibrate_bn: clouds whose "
        "statistics are taken together)",
    )
    model_path: list[str] | None = flag(
        group="encoder",
        exclusive="source",
        required=True,
        nargs="+",
        metavar="FILE",
        help="our checkpoints, published state dicts, or weights of this repository: pretrained[:NAME]",
    )
    random_init: bool = flag(
        False, exclusive="source", required=True, help="score an untrained encoder; use --calibrate_bn with it"
    )
    seeds: list[int] | None = flag(
        type=seed_number,
        nargs="+",
        metavar="S",
        help="--random_init: one run per seed of the weights (default: --seed)",
    )
    calibrate_bn: bool = flag(
        False,
        help="set batch-norm statistics from unlabeled training clouds in one pass; without them an untrained encoder "
        "is not a fair baseline: its features hardly differ between clouds",
    )
    calibration_clouds: int = flag(512, type=positive_int, metavar="N", help="clouds used by --calibrate_bn")
    model: str | None = flag(
        type=model_name([*ENCODERS, *ENCODER_ALIASES]),
        choices=[*ENCODERS, *ENCODER_ALIASES],
        help="encoder (default: the checkpoint's; for published state dicts recognized by the tensors; "
        f"{DEFAULT_ENCODER} with --random_init)",
    )
    k: int | None = flag(
        type=positive_int, help="neighbors per point, itself included (default: the checkpoint's; otherwise 20)"
    )
    emb_dims: int | None = flag(
        type=positive_int,
        metavar="E",
        help="width of the embedding (default: the checkpoint's; 1024 with --random_init)",
    )
    dropout: float | None = flag(
        type=float, metavar="P", help="accepted for released command lines and ignored; frozen encoders have no dropout"
    )

    def __post_init__(self) -> None:
        if self.json is not None:
            check_output_path(self.json)
        if self.seeds and not self.random_init:
            raise UserError("--seeds needs --random_init, whose weights it draws; for random draws use --seed")
        if self.calibration_clouds < 2:
            raise UserError("--calibration_clouds 1: batch statistics need at least two clouds")


class Candidate(NamedTuple):
    """An encoder to score, and its origin."""

    name: str  # shown in the table
    encoder: nn.Module
    origin: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what was scored, for the JSON."""
        encoder = describe_encoder(self.encoder)
        return {"name": self.name, **self.origin, "encoder": encoder["name"], **encoder["kwargs"]}


def candidates(config: EvaluationConfig) -> list[Candidate]:
    """Build all encoders, so that a wrong file is found before the first one is scored.

    Raises:
        UserError: an encoder does not have a flag, or its value is wrong.
        CheckpointError: a file cannot be read or does not fit.
    """
    found = []
    if config.model_path:
        names = [Path(path).name for path in config.model_path]
        for path, name in zip(config.model_path, names, strict=True):
            file = find_weights(path, model=config.model)
            encoder = encoder_from_checkpoint(
                file, model=config.model, k=config.k, emb_dims=config.emb_dims, in_channels=3
            )
            # Runs usually differ by folder: checkpoints/a/last.pth, checkpoints/b/last.pth.
            shown = name if names.count(name) == 1 else path
            found.append(Candidate(shown, encoder, {"model_path": str(path), "sha256": sha256(file)}))
        return found
    for seed in config.seeds or [config.seed]:
        seed_everything(seed)
        encoder = encoder_from_flags(config.model or DEFAULT_ENCODER, k=config.k, emb_dims=config.emb_dims)
        found.append(Candidate(f"random init, seed {seed}", encoder, {"random_init_seed": seed}))
    return found


def open_splits(
    dataset: str, data_root: str, *, variant: str, num_points: int | None
) -> tuple[LabeledClouds, LabeledClouds]:
    """Open both splits and print what they are; arguments as for :func:`datasets.registry.open_classification_set`.

    Raises:
        DataError: a file is missing or wrong; the message names the sets that exist.
    """
    try:
        train, test = (
            open_classification_set(dataset, data_root, split, variant=variant, num_points=num_points)
            for split in ("train", "test")
        )
    except DataError as error:
        found = find_datasets(data_root)
        hint = f" (found there: --dataset {', '.join(found)})" if found and dataset not in found else ""
        raise DataError(f"{error}{hint}") from error
    # Without names, each split numbers its classes up to its highest label.
    train.class_names = test.class_names = max(train.class_names, test.class_names, key=len)
    for part in (train, test):
        print(f"{part!r} from {', '.join(map(str, part.files))} ({part.layout})")
        if part.repeated:
            points = part.points.shape[1]
            print(f"note: {part.repeated} {part.split} clouds have fewer than {points} points, so points repeat")
        official = part.official_sizes.get(part.split)
        if official not in (None, len(part)):
            print(f"note: {len(part)} {part.split} clouds, but the published set has {official}")
    return train, test


def data_record(dataset: str, splits: Sequence[LabeledClouds]) -> dict[str, Any]:
    """Return what was read, for the JSON."""
    return {
        "dataset": dataset,
        "variant": getattr(splits[0], "variant", None),
        "data": {part.split: part.origin() for part in splits},
    }


def data_title(dataset: str, split: LabeledClouds) -> str:
    """Return the name of a set with its variant, for headings."""
    return " ".join([dataset, getattr(split, "variant", "")]).rstrip()


def features_of(
    encoder: nn.Module, config: EvaluationConfig, clouds: Mapping[str, np.ndarray], *, train: LabeledClouds
) -> list[np.ndarray]:
    """Extract frozen features, after ``--calibrate_bn`` on training clouds.

    Args:
        encoder: moved to the device; its batch-norm statistics change with ``--calibrate_bn``.
        config: settings of the script.
        clouds: (n, N, 3) by the title of their progress bar.
        train: the training split.

    Returns:
        (n, D) float32 for each of ``clouds``.

    Raises:
        UserError: a feature is not finite.
    """
    common: Any = {"batch_size": config.batch_size, "device": resolve_device(config.device)}
    if config.calibrate_bn:
        calibrate_batch_norm(encoder, train.points, max_clouds=config.calibration_clouds, seed=config.seed, **common)
    return [extract_features(encoder, points, text=text, **common) for text, points in clouds.items()]
