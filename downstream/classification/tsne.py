"""Map frozen features to the plane with t-SNE: a picture colored by class, and its data.

Writes --output (.png, .pdf) and next to it an .npz file with features (n, D), embedding (n, 2), labels (n,) and
class_names. The map shows which classes mix; distances between clusters mean little.

Examples:
  python downstream/classification/tsne.py --dataset modelnet10 --model_path checkpoints/crossnet/last.pth
  python downstream/classification/tsne.py --dataset demo --data_root data/demo --random_init --calibrate_bn
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np
from sklearn.manifold import TSNE

from downstream.classification.eval_inputs import EvaluationConfig, candidates, data_title, features_of, open_splits
from downstream.features import check_neighbors
from downstream.figures import PICTURE_TYPES, check_output_path
from utils.cli import flag, log_to_screen, positive_float, positive_int, run, write_json
from utils.errors import UserError
from utils.files import replacing
from utils.pictures import Figure, colormaps, save_figure

MARKERS = "osD^vP"


@dataclass(kw_only=True)
class MapConfig(EvaluationConfig):
    """Settings of this script."""

    split: str = flag("test", group="map", choices=("train", "test"), help="clouds to map")
    max_clouds: int = flag(2000, type=positive_int, metavar="N", help="maximum number, drawn at random")
    perplexity: float = flag(30.0, type=positive_float, metavar="P", help="t-SNE's effective number of neighbors")
    output: str = flag("runs/tsne.png", metavar="FILE", help="picture; the .npz file is written next to it")
    overwrite: bool = flag(False, help="replace an existing .npz file")


def embed(features: np.ndarray, *, perplexity: float, seed: int) -> np.ndarray:
    """Compute t-SNE (van der Maaten and Hinton, 2008) with PCA initialization.

    Args:
        features: (n, D).
        perplexity: lowered if there are too few clouds.
        seed: of the optimization.

    Returns:
        (n, 2) float32.

    Raises:
        UserError: fewer than four clouds, or all have the same features.
    """
    if len(features) < 4:
        raise UserError(f"t-SNE needs at least 4 clouds, there are {len(features)}")
    if (features == features[0]).all():  # scikit-learn crashes on them
        raise UserError(
            f"all {len(features)} clouds have the same features, so there is nothing to map: use another checkpoint, "
            "or --calibrate_bn with --random_init"
        )
    perplexity = min(perplexity, (len(features) - 1) / 3)
    spread = features.std(axis=0)
    standard = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(standard)


def class_styles(count: int) -> list[tuple[tuple[float, ...], str]]:
    """Return a color and a marker for every class; the marker changes every ten classes."""
    colors = colormaps["tab10"].colors
    return [(colors[i % 10], MARKERS[i // 10 % len(MARKERS)]) for i in range(count)]


def draw_map(embedding: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw the map with a legend of the classes that occur.

    Args:
        embedding: (n, 2).
        labels: (n,) indices into ``class_names``.
        class_names: name of every label.
        path: picture to write.
        title: heading.
    """
    present = np.unique(labels)
    columns = 1 if len(present) <= 20 else 2
    figure = Figure(figsize=(7 + 1.7 * columns, 6.5), layout="constrained")
    axes = figure.add_subplot()
    size = 26 if len(labels) < 500 else 12
    for label, (color, marker) in zip(present, class_styles(len(present)), strict=True):
        rows = embedding[labels == label]
        axes.scatter(*rows.T, s=size, color=color, marker=marker, linewidths=0, alpha=0.85, label=class_names[label])
    axes.set(xticks=[], yticks=[], title=title)
    figure.legend(loc="outside right center", fontsize=8, markerscale=1.6, ncols=columns, frameon=False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Draw the map and return the files written.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = MapConfig.from_flags(MapConfig.parser().parse_args(argv))
    log_to_screen()
    picture = Path(config.output)
    check_output_path(picture, PICTURE_TYPES)
    numbers = picture.with_suffix(".npz")
    if numbers.exists() and not config.overwrite:
        raise UserError(f"{numbers} exists: replace it with --overwrite, or choose another --output")
    train, test = open_splits(config.dataset, config.data_root, variant=config.variant, num_points=config.num_points)
    part = test if config.split == "test" else train
    found = candidates(config)
    if len(found) > 1:
        raise UserError(f"a map shows one encoder, got {len(found)}; run once per encoder with a separate --output")
    check_neighbors(found[0].encoder, part.points.shape[1])
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(part))[: config.max_clouds])
    (features,) = features_of(found[0].encoder, config, {"features": part.points[chosen]}, train=train)
    embedding, labels = embed(features, perplexity=config.perplexity, seed=config.seed), part.labels[chosen]
    title = f"{data_title(config.dataset, part)}, {config.split} split, {len(chosen)} clouds: t-SNE of {found[0].name}"
    with replacing(numbers) as temporary, open(temporary, "wb") as file:
        names = np.array(part.class_names)
        np.savez(file, features=features, embedding=embedding, labels=labels, class_names=names)
    draw_map(embedding, labels, part.class_names, picture, title=title)
    print(f"{picture} and {numbers}")
    metrics = {"picture": str(picture), "numbers": str(numbers), "clouds": len(chosen), "data": part.origin()}
    metrics |= found[0].origin
    write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    run(main)
