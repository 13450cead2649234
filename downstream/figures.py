"""Draw results: confusion matrix, clouds and pictures of a sheet, retrieval sheet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from downstream.retrieval import nearest
from utils.errors import UserError
from utils.files import is_special, writing
from utils.pictures import Axes, Figure, save_figure

PICTURE_TYPES = (".png", ".pdf", ".svg", ".jpg")
RIGHT, WRONG, NEUTRAL = "#2a7f3f", "#c23b22", "#444444"
SHEET_ROWS, SHEET_NEIGHBORS = 10, 6
SHEET_POINTS = 2048  # of a small cloud; more would only hide each other


def check_output_path(path: str | os.PathLike[str], endings: Sequence[str] | None = None) -> None:
    """Create the folder of an output file, and fail early if the file could not be written later.

    Args:
        path: the file.
        endings: allowed suffixes; None allows any.

    Raises:
        UserError: the suffix is not allowed, or the folder cannot be created or written to.
    """
    path = Path(path)
    if endings is not None and path.suffix.lower() not in endings:
        raise UserError(f"{path}: the name must end in one of {', '.join(endings)}")
    if is_special(path):  # opening a pipe would wait for its reader
        return
    with writing(path):
        folder = Path(os.path.realpath(path)).parent  # of a link, the one in which replacing() writes
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {path}: it is a folder, or its folder is not writable")


def draw_confusion_matrix(
    truth: np.ndarray, predicted: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str], *, title: str
) -> None:
    """Draw how often each true class (row) is predicted as each class (column), in percent of the row.

    Args:
        truth: (n,) labels, indices into ``class_names``; only classes that occur are drawn.
        predicted: (n,) labels.
        class_names: name of every label value.
        path: picture to write.
        title: heading.
    """
    size = len(class_names)
    counts = np.bincount(np.asarray(truth) * size + predicted, minlength=size**2).reshape(size, size)
    draw_confusion_counts(counts, class_names, path, title=title)


def draw_confusion_counts(
    counts: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str], *, title: str, unit: str = "clouds"
) -> None:
    """Draw a confusion matrix from its counts.

    Args:
        counts: (C, C); entry [t, p] counts items of class t predicted as p. Only classes that occur are drawn.
        class_names: (C,) names.
        path: picture to write.
        title: heading.
        unit: what is counted.
    """
    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    counts = counts[np.ix_(present, present)]
    totals = counts.sum(1)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    size = len(present)
    cell = 0.55 if size <= 20 else 0.36
    figure = Figure(figsize=(max(4.5, cell * size + 2.6), max(3.8, cell * size + 2.2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    names = [class_names[label] for label in present]
    axes.set_xticks(range(size), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)])
    axes.set_xlabel("predicted class")
    axes.set_ylabel(f"true class (number of {unit})")
    axes.set_title(title)
    for row, column in zip(*np.nonzero(counts), strict=True):
        value = percent[row, column]
        text = f"{value:.0f}" if value >= 1 else "<1"
        color = "white" if value > 55 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8 if size <= 20 else 6, color=color)
    figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the true class")
    save_figure(figure, path)


def thinned(points: np.ndarray, count: int = SHEET_POINTS) -> np.ndarray:
    """Return evenly spaced rows of an array of points, at most ``count``; scans are in the scanner's order."""
    return points[:: -(-len(points) // count)]


def draw_cloud(
    axes: Axes,
    points: np.ndarray,
    *,
    title: str,
    color: str,
    point_colors: np.ndarray | None = None,
    up: str = "y",
    size: float = 2,
    above: float = 20,
) -> None:
    """Draw a cloud from the front, 35 degrees to the side and from above, near points over far ones.

    Args:
        axes: axes to draw on.
        points: (N, 3).
        title: title of the axes.
        color: of title and frame.
        point_colors: (N, 3) in 0..1; None colors by depth, darker is farther.
        up: the upward axis, ``"y"`` (objects) or ``"z"`` (rooms).
        size: of a point, in typographic points squared.
        above: elevation of the camera, in degrees.
    """
    points = points - points.mean(0)
    if up == "z":
        points = np.stack([points[:, 0], points[:, 2], -points[:, 1]], axis=1)
    side, above = np.radians([35, above])
    across = points[:, 0] * np.cos(side) + points[:, 2] * np.sin(side)
    toward = points[:, 2] * np.cos(side) - points[:, 0] * np.sin(side)
    height = points[:, 1] * np.cos(above) - toward * np.sin(above)
    depth = toward * np.cos(above) + points[:, 1] * np.sin(above)
    order = np.argsort(depth)
    colors = depth[order] if point_colors is None else point_colors[order]
    shading = {"cmap": "viridis"} if point_colors is None else {}
    axes.scatter(across[order], height[order], c=colors, s=size, linewidths=0, **shading)
    low, high = np.array([(v.min(), v.max()) for v in (across, height)]).T
    middle, radius = (low + high) / 2, 1.05 * max((high - low).max() / 2, 1e-9)
    limits = [(m - radius, m + radius) for m in middle]
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
    _frame(axes, title=title, color=color)


def draw_picture(axes: Axes, picture: Image.Image, *, title: str, color: str) -> None:
    """Draw a picture, with a title and a frame of one color."""
    axes.imshow(picture)
    _frame(axes, title=title, color=color)


def _frame(axes: Axes, *, title: str, color: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=color)
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(1.5)


def draw_retrieval(
    points: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw a sheet of queries, each with its nearest neighbors (cosine of centered features).

    The queries are the first cloud of each class, of evenly spaced classes if there are many.

    Args:
        points: (n, N, 3) clouds.
        features: (n, D).
        labels: (n,) classes, indices into ``class_names``.
        class_names: name of every label value.
        path: picture to write.
    """
    classes = np.unique(labels)
    chosen = classes[np.linspace(0, len(classes) - 1, min(SHEET_ROWS, len(classes))).round().astype(int)]
    queries = np.array([np.flatnonzero(labels == label)[0] for label in chosen])
    found = nearest(features, queries, SHEET_NEIGHBORS)
    titles = [class_names[label] for label in labels]
    draw_neighbors(points, titles, queries, found, path, right=labels[found] == labels[queries][:, None])


def shortened(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters; of a longer one the end, where names differ most."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def draw_neighbors(
    points: Sequence[np.ndarray],
    titles: Sequence[str],
    queries: np.ndarray,
    found: np.ndarray,
    path: str | os.PathLike[str],
    *,
    right: np.ndarray | None = None,
    up: str = "y",
) -> None:
    """Draw a row for each query: the query and its neighbors.

    Args:
        points: n clouds (N, 3).
        titles: of the clouds.
        queries: (q,) numbers of clouds.
        found: (q, top) numbers of their neighbors.
        path: picture to write.
        right: (q, top) which neighbors are right, for the color of their frames; None: not known.
        up: upward axis of the clouds.
    """
    columns = 1 + found.shape[1]
    figure = Figure(figsize=(1.5 * columns, 1.7 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for i, (row, query) in enumerate(zip(grid, queries, strict=True)):
        draw_cloud(row[0], points[query], title=f"query: {shortened(titles[query], 15)}", color=NEUTRAL, up=up)
        for j, (axes, item) in enumerate(zip(row[1:], found[i], strict=True)):
            color = NEUTRAL if right is None else RIGHT if right[i, j] else WRONG
            draw_cloud(axes, points[item], title=shortened(titles[item], 22), color=color, up=up)
    save_figure(figure, path)
