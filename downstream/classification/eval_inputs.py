"""Flags that choose the encoders and labeled clouds of an evaluation, and the functions that open them."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from datasets.hdf5 import LabeledClouds
from datasets.registry import CLASSIFICATION_SETS, find_datasets, open_classification_set
from datasets.scanobjectnn import VARIANTS, resolve_variant
from engine.load_model import encoder_from_checkpoint, encoder_from_flags
from models import ENCODER_ALIASES, ENCODERS
from utils.cli import positive_int, seed_number
from utils.errors import DataError, UserError
from utils.released_flags import model_name
from utils.reproducible import seed_everything

DEFAULT_MODEL = "dgcnn_cls"


class Candidate(NamedTuple):
    """An encoder to score, and its origin."""

    name: str  # shown in the table
    encoder: nn.Module
    origin: dict[str, Any]  # goes into the JSON


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose encoders, read by ``candidates``."""
    group = parser.add_argument_group("encoder", "give either --model_path or --random_init")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_path", nargs="+", metavar="FILE", help="our checkpoints, or published state dicts")
    source.add_argument(
        "--random_init", action="store_true", help="score an untrained encoder; use --calibrate_bn with it"
    )
    group.add_argument(
        "--seeds",
        type=seed_number,
        nargs="+",
        metavar="S",
        help="--random_init: one run per seed of the weights (default: --seed)",
    )
    group.add_argument(
        "--calibrate_bn",
        action="store_true",
        help="set batch-norm statistics from unlabeled training clouds in one pass; without them an untrained encoder "
        "is not a fair baseline: its features hardly differ between clouds",
    )
    group.add_argument(
        "--calibration_clouds", type=positive_int, default=512, metavar="N", help="clouds used by --calibrate_bn"
    )
    group.add_argument(
        "--model",
        type=model_name([*ENCODERS, *ENCODER_ALIASES]),
        choices=[*ENCODERS, *ENCODER_ALIASES],
        help="encoder (default: the checkpoint's; for published state dicts recognized by the tensors; "
        f"{DEFAULT_MODEL} with --random_init)",
    )
    group.add_argument(
        "--k",
        type=positive_int,
        help="neighbors per point, itself included (default: the checkpoint's; otherwise 20)",
    )
    group.add_argument(
        "--emb_dims",
        type=positive_int,
        metavar="E",
        help="width of the embedding (default: the checkpoint's; 1024 with --random_init)",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="accepted for released command lines and ignored; frozen encoders have no dropout",
    )


def check_encoder_arguments(args: argparse.Namespace) -> None:
    """Check that the encoder flags fit together, before any data is read.

    Raises:
        UserError: they do not.
    """
    if args.seeds and not args.random_init:
        raise UserError("--seeds needs --random_init, whose weights it draws; for random draws use --seed")


def add_data_arguments(parser: argparse.ArgumentParser, *, num_points: int | None = 1024, batch: bool = True) -> None:
    """Add the flags that choose labeled clouds, read by ``open_splits``.

    Args:
        parser: parser to extend.
        num_points: default of ``--num_points``; None means all.
        batch: also add ``--batch_size`` for forward passes.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=str.lower,
        choices=CLASSIFICATION_SETS,
        default="modelnet40",
        help="labeled clouds to score on; folder: your files, --data_root DIR with train/<class>/* and test/<class>/* "
        "(docs/datasets.md)",
    )
    group.add_argument(
        "--variant",
        default="OBJ_BG",
        metavar="V",
        help=f"variant of ScanObjectNN, one of {', '.join(VARIANTS)}; always report it with the number",
    )
    group.add_argument(
        "--num_points",
        type=positive_int,
        default=num_points,
        metavar="N",
        help="points per cloud, the first N rows" + (" (default: all)" if num_points is None else ""),
    )
    if not batch:
        return
    group.add_argument(
        "--batch_size",
        "--test_batch_size",
        type=positive_int,
        default=32,
        metavar="B",
        help="clouds per forward pass; changes speed and memory, not the features (with --calibrate_bn: clouds whose "
        "statistics are taken together)",
    )


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """Build all encoders, so that a wrong file is found before the first one is scored.

    Raises:
        UserError: an encoder does not have a flag, or its value is wrong.
        CheckpointError: a file cannot be read or does not fit.
    """
    found = []
    if args.model_path:
        names = [Path(path).name for path in args.model_path]
        for path, name in zip(args.model_path, names, strict=True):
            encoder = encoder_from_checkpoint(path, model=args.model, k=args.k, emb_dims=args.emb_dims)
            # Runs usually differ by folder: checkpoints/a/last.pth, checkpoints/b/last.pth.
            shown = name if names.count(name) == 1 else path
            found.append(Candidate(shown, encoder, {"model_path": str(path), "sha256": sha256(path)}))
        return found
    for seed in args.seeds or [args.seed]:
        seed_everything(seed)
        encoder = encoder_from_flags(args.model or DEFAULT_MODEL, k=args.k, emb_dims=args.emb_dims)
        found.append(Candidate(f"random init, seed {seed}", encoder, {"random_init_seed": seed}))
    return found


def open_splits(args: argparse.Namespace) -> tuple[LabeledClouds, LabeledClouds]:
    """Open both splits and print what they are.

    Raises:
        DataError: a file is missing or wrong; the message names the sets that exist.
    """
    if args.dataset == "scanobjectnn":
        args.variant = resolve_variant(args.variant)
    try:
        train, test = (
            open_classification_set(
                args.dataset, args.data_root, split, variant=args.variant, num_points=args.num_points
            )
            for split in ("train", "test")
        )
    except DataError as error:
        found = find_datasets(args.data_root)
        hint = f" (found there: --dataset {', '.join(found)})" if found and args.dataset not in found else ""
        raise DataError(f"{error}{hint}") from error
    for part in (train, test):
        print(f"{part!r} from {', '.join(map(str, part.files))} ({part.layout})")
        if part.repeated:
            points = part.points.shape[1]
            print(f"note: {part.repeated} {part.split} clouds have fewer than {points} points, so points repeat")
        official = part.official_sizes.get(part.split)
        if official not in (None, len(part)):
            print(f"note: {len(part)} {part.split} clouds, but the published set has {official}")
    return train, test
