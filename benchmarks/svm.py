"""Scoring frozen features: our linear SVM and feature extraction against the plain ones.

- The SVM on one Gram matrix (downstream/svm.py) against ``sklearn.svm.SVC(kernel="linear")``: fit and predict, with
  the released C. The features are synthetic: each class is a Gaussian in a few dimensions, mixed at random into all of
  them, and the classes are close enough that the SVM makes mistakes, as on real features.
- Feature extraction in evaluation mode, ours (no edge tensors, batches of 32) against the textbook encoder
  (benchmarks/reference/textbook.py) in batches of 16, the released test batch.

At ModelNet40's size the textbook SVM takes minutes; --svm_repeats sets its number of rounds.

  python -m benchmarks.svm                                         # ModelNet40's size
  python -m benchmarks.svm --train 2460 --test 617 --repeats 3     # a quarter of it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
import torch
from sklearn.svm import SVC

from benchmarks.frame import Benchmark
from benchmarks.measure import compare, place_text, ratio_text, seconds_in_turn, text_table
from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from downstream.features import evaluating, extract_features
from downstream.svm import RELEASED_C, linear_svm
from models import build_encoder
from utils.cli import positive_float, positive_int, run
from utils.errors import UserError

NEIGHBORS = 20  # of the encoder, by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--train", type=positive_int, default=9840, metavar="N", help="training samples")
    g.add_argument("--test", type=positive_int, default=2468, metavar="N", help="test samples")
    g.add_argument("--classes", type=positive_int, default=40, metavar="C", help="classes")
    g.add_argument("--dims", type=positive_int, default=2048, metavar="D", help="features")
    g.add_argument("--svm_c", type=positive_float, default=RELEASED_C, metavar="C", help="of the SVM")
    g.add_argument("--clouds", type=positive_int, default=64, metavar="N", help="clouds whose features are extracted")
    g.add_argument("--points", type=positive_int, default=1024, metavar="N", help="points per cloud")
    g.add_argument("--svm_repeats", type=positive_int, default=1, metavar="R", help="rounds of the SVM")


def check(args: argparse.Namespace) -> None:
    """Raise UserError if there are too few classes or points."""
    if args.classes < 2:
        raise UserError("--classes 1 leaves nothing to tell apart; use 2 or more")
    if args.points < NEIGHBORS:
        raise UserError(f"--points {args.points}: the encoder's {NEIGHBORS} neighbors need at least as many points")


def synthetic_features(
    *, train: int, test: int, classes: int, dims: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features of overlapping classes, (n, D) float32 and not negative, and labels: training set, test set."""
    rng = np.random.default_rng(seed)
    inner = min(64, dims)
    centers = rng.normal(size=(classes, inner))
    mixing = rng.normal(size=(inner, dims)) / np.sqrt(inner)
    out = []
    for count in (train, test):
        labels = np.arange(count) % classes
        hidden = centers[labels] + 1.8 * rng.normal(size=(count, inner))
        noise = 0.3 * rng.normal(size=(count, dims))
        out += [np.maximum(hidden @ mixing + noise, 0).astype(np.float32), labels]  # as after a ReLU
    return tuple(out)


def measure_svm(args: argparse.Namespace) -> dict[str, Any]:
    """Time fit and predict of both forms in turn."""
    train_x, train_y, test_x, test_y = synthetic_features(
        train=args.train, test=args.test, classes=args.classes, dims=args.dims, seed=args.seed
    )
    predicted: dict[str, np.ndarray] = {}

    def ours() -> None:
        predicted["ours"] = linear_svm(train_x, train_y, test_x, test_y, c_values=(args.svm_c,)).predictions

    def textbook() -> None:
        predicted["textbook"] = SVC(kernel="linear", C=args.svm_c).fit(train_x, train_y).predict(test_x)

    result = compare(seconds_in_turn({"ours": ours, "textbook": textbook}, repeats=args.svm_repeats))
    result["agreement"] = float(np.mean(predicted["ours"] == predicted["textbook"]))
    for name in ("ours", "textbook"):
        result[name]["accuracy"] = 100 * float(np.mean(predicted[name] == test_y))
    return result


def measure_features(args: argparse.Namespace) -> dict[str, Any]:
    """Time both encoders in turn, with the same weights, on random clouds in evaluation mode."""
    torch.manual_seed(args.seed)
    encoder = build_encoder("dgcnn_cls")
    plain = TEXTBOOK_ENCODERS["dgcnn_cls"]()
    plain.load_state_dict(encoder.state_dict())
    clouds = torch.rand(args.clouds, args.points, 3, generator=torch.Generator().manual_seed(args.seed))
    features: dict[str, np.ndarray] = {}

    def ours() -> None:
        features["ours"] = extract_features(encoder, clouds.numpy(), progress=False)

    def textbook() -> None:
        with evaluating(plain):
            features["textbook"] = np.concatenate([plain(part.mT)[0].numpy() for part in clouds.split(16)])

    actions = {"ours": ours, "textbook": textbook}
    seconds_in_turn(actions, repeats=1)
    result = compare(seconds_in_turn(actions, repeats=args.repeats))
    scale = np.abs(features["textbook"]).max()
    # Not the maximum: in float32, neighbors at almost equal distances may swap.
    result["median_relative_difference"] = float(np.median(np.abs(features["ours"] - features["textbook"]) / scale))
    return result


def measure(args: argparse.Namespace, _: torch.device) -> dict[str, Any]:
    """Measure both."""
    return {"svm": measure_svm(args), "features": measure_features(args)}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    settings, svm, features = result["settings"], result["svm"], result["features"]
    rows = [("", "ours", "textbook", "textbook / ours")]
    for text, part in (
        (f"SVM, {settings['train']} + {settings['test']} x {settings['dims']}, {settings['classes']} classes, s", svm),
        (f"features of {settings['clouds']} clouds of {settings['points']} points, s", features),
    ):
        rows.append((text, *(f"{part[form]['seconds_median']:.2f}" for form in ("ours", "textbook")), ratio_text(part)))
    return "\n".join(
        [
            f"linear SVM (C = {settings['svm_c']:g}) and feature extraction (DGCNN-cls), {place_text(result)}",
            text_table(rows),
            f"{svm['agreement']:.2%} of the SVMs' predictions agree; accuracy {svm['ours']['accuracy']:.2f} and "
            f"{svm['textbook']['accuracy']:.2f} %; features differ by {features['median_relative_difference']:.0e} of "
            "their maximum, half of them by less",
        ]
    )


QUICK = {"train": 120, "test": 60, "classes": 4, "dims": 32, "svm_repeats": 1, "clouds": 4, "points": 64, "repeats": 1}
BENCHMARK = Benchmark("svm", __doc__, add_arguments, measure, table, quick=QUICK, check=check)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
