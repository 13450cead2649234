"""Turn labeled clouds or meshes in class folders into HDF5 files, which every script reads as --dataset folder.

Reads train/<class>/* and test/<class>/*, or <class>/train/* and <class>/test/*: PLY, PCD, XYZ, TXT, PTS, NPY, LAS, OFF,
OBJ, STL, GLB and GLTF files, with any number of points. --test_fraction splits folders <class>/* without train and
test. Writes ply_data_train0.h5, ply_data_test0.h5, train_files.txt, test_files.txt and shape_names.txt: --num_points of
every cloud in the unit sphere, repeated if a file has fewer. --dataset folder reads the class folders directly too, but
the HDF5 files load faster and are easier to share.

Example:
  python -m data.prepare_clouds --clouds scans --test_fraction 0.2 --up z --out data/scans
  python downstream/classification/main.py --dataset folder --data_root data/scans --model_path checkpoints/a/last.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from datasets.hdf5 import SPLITS
from datasets.own_clouds import class_name, find_class_folders, shape_files
from datasets.shape_reader import DEFAULT_POINTS, SHAPE_SUFFIXES, read_shape, read_shapes
from utils.cli import HelpFormatter, positive_int, run, seed_number, share, write_json
from utils.errors import DataError, UserError
from utils.files import check_name, data_files, replacing, writing

FILES = ("shape_names.txt", "ply_data_train0.h5", "ply_data_test0.h5", "train_files.txt", "test_files.txt")


def divide(root: Path, fraction: float, *, seed: int) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """Split the files of folders ``<class>/*`` into train and test, class by class.

    Returns:
        Files and the class of each, by split. Every class keeps at least one file for training, and gives at least one
        for testing if it has two.

    Raises:
        DataError: no class folder holds two clouds, or a name is not UTF-8.
    """
    generator = np.random.default_rng(seed)
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    classes: dict[str, list[str]] = {split: [] for split in SPLITS}
    for folder in (path for path in data_files(root) if path.is_dir()):
        found = shape_files(folder)
        if not found:
            continue
        count = min(len(found) - 1, max(1, round(fraction * len(found))))
        tested = set(generator.permutation(len(found))[:count].tolist())
        for i, path in enumerate(found):
            split = "test" if i in tested else "train"
            check_name(str(path.relative_to(root)), path)
            files[split].append(path)
            classes[split].append(class_name(folder))
    if not files["test"]:
        raise DataError(
            f"no two clouds of a class in {root}; expected <class>/* with files ending in {', '.join(SHAPE_SUFFIXES)}"
        )
    return files, classes


def list_files(
    root: Path, fraction: float | None, *, seed: int
) -> tuple[dict[str, list[Path]], dict[str, np.ndarray], tuple[str, ...]]:
    """Return files and labels by split, and class names.

    Raises:
        DataError: nothing of the kind is there.
        UserError: ``fraction`` is given for folders that are divided already, or missing for those that are not.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; pass the one with the class folders as --clouds")
    found = find_class_folders(root)
    if found is not None:
        if fraction is not None:
            raise UserError(f"{root} has a train and a test split already: leave --test_fraction out")
        both = {split: found.files(split) for split in SPLITS}
        files, labels = ({split: part[i] for split, part in both.items()} for i in range(2))
        return files, labels, found.class_names
    if fraction is None:
        raise UserError(
            f"{root} has no train/<class>/* and test/<class>/*: --test_fraction 0.2 takes a fifth of every class "
            "for testing"
        )
    files, classes = divide(root, fraction, seed=seed)
    names = tuple(sorted({name for listed in classes.values() for name in listed}))
    return files, {split: np.array([names.index(name) for name in classes[split]]) for split in SPLITS}, names


def write(out: Path, split: str, points: np.ndarray, labels: np.ndarray) -> None:
    """Write one split atomically."""
    name = f"ply_data_{split}0.h5"
    with replacing(out / name) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("data", data=points, chunks=(1, *points.shape[1:]), compression="gzip", shuffle=True)
        file["label"] = labels[:, None].astype(np.int32)
    (out / f"{split}_files.txt").write_text(f"{name}\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare_clouds", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--clouds", required=True, type=Path, metavar="DIR", help="folder with the class folders")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--num_points", type=positive_int, default=DEFAULT_POINTS, metavar="N", help="points per cloud")
    parser.add_argument("--up", choices=("y", "z"), default="y", help="axis of your files that points up")
    parser.add_argument(
        "--test_fraction",
        type=share,
        metavar="F",
        help="fraction of each class for testing, if the folders have no split",
    )
    parser.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of the split by --test_fraction")
    parser.add_argument("--overwrite", action="store_true", help="replace the files in --out")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Convert the clouds; return counts.

    Raises:
        UserError: a setting or a file is wrong.
    """
    args = build_parser().parse_args(argv)
    there = [args.out / name for name in FILES if (args.out / name).exists()]
    if there and not args.overwrite:
        raise UserError(f"{there[0]} exists; --overwrite replaces it")
    files, labels, class_names = list_files(args.clouds, args.test_fraction, seed=args.seed)
    counts: dict[str, Any] = {"classes": len(class_names), "num_points": args.num_points}
    arrays = {
        split: read_shapes(
            files[split], folder=args.clouds, rows=args.num_points, split=split, how="prepare_clouds", read=read_shape
        )
        for split in SPLITS
    }
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        for split, (points, sizes) in arrays.items():
            turned = points[..., [0, 2, 1]] * np.array([1, 1, -1], np.float32) if args.up == "z" else points
            write(args.out, split, turned, labels[split])
            counts[split] = len(points)
            counts[f"{split}_with_repeated_points"] = int((sizes < args.num_points).sum())
        (args.out / "shape_names.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    print(
        f"{args.out}: {counts['train']} training and {counts['test']} test clouds of {args.num_points} points, "
        f"{len(class_names)} classes; read it with --dataset folder --data_root {args.out}"
    )
    if repeated := counts["train_with_repeated_points"] + counts["test_with_repeated_points"]:
        print(f"note: {repeated} files have fewer than {args.num_points} points, and their points repeat")
    write_json(args.json, counts)
    return counts


if __name__ == "__main__":
    run(main)
