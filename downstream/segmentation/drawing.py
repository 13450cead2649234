"""Draw clouds whose points are labeled: a sheet of pictures with legends, and colored PLY files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from plyfile import PlyData, PlyElement

from downstream.figures import NEUTRAL, draw_cloud, shortened
from utils.errors import UserError
from utils.pictures import Figure, Patch, save_figure

COLUMNS = ("input", "truth", "prediction", "errors")
GRAY, RIGHT_GRAY, WRONG_RED = (0.45, 0.5, 0.55), (0.82, 0.82, 0.82), (0.85, 0.1, 0.1)
DARK = (0.12, 0.13, 0.16)
SHEET_POINTS = 40_000  # per cloud on the sheet; more points would only hide each other


class Item(NamedTuple):
    """One cloud of the sheet."""

    name: str
    points: np.ndarray  # (N, 3)
    colors: np.ndarray | None  # (N, 3) of the scan, 0..1; None if it has none
    truth: np.ndarray | None  # (N,); None if it is not known
    predicted: np.ndarray  # (N,)
    hidden: np.ndarray  # (N,) bool, not drawn on the sheet


def write_colored_ply(path: Path, points: np.ndarray, colors: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write a binary PLY file with colors and, optionally, a number ``label`` for every point.

    Args:
        path: file to write.
        points: (N, 3) float32 or float64, written as such.
        colors: (N, 3) in 0..1.
        labels: (N,).
    """
    kinds = [(axis, points.dtype.str) for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    columns = [*points.T, *np.round(255 * colors).T]
    if labels is not None:
        kinds.append(("label", "i4"))
        columns.append(labels)
    rows = np.empty(len(points), dtype=kinds)
    for (name, _), column in zip(kinds, columns, strict=True):
        rows[name] = column
    try:
        PlyData([PlyElement.describe(rows, "vertex")]).write(str(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def colored(item: Item, table: np.ndarray) -> dict[str, np.ndarray]:
    """Return the colors of every column, (N, 3) each; without truth, there are two columns.

    Args:
        item: the cloud.
        table: (C, 3) color of every label.
    """
    plain = np.tile(GRAY, (len(item.points), 1)) if item.colors is None else item.colors
    if item.truth is None:
        return {"input": plain, "prediction": table[item.predicted]}
    errors = np.where((item.truth == item.predicted)[:, None], RIGHT_GRAY, WRONG_RED)
    return dict(zip(COLUMNS, (plain, table[item.truth], table[item.predicted], errors), strict=True))


def draw_sheet(
    items: Sequence[Item], table: np.ndarray, names: Sequence[str], path: Path, *, up: str, title: str
) -> None:
    """Draw a row of pictures per cloud, one for each column of :func:`colored`, with a legend of its colors.

    Args:
        items: the clouds; either all or none have a truth.
        table: (C, 3) color of every label.
        names: (C,) name of every label.
        path: picture to write.
        up: upward axis of the clouds.
        title: heading.
    """
    cell = 2.4  # inches
    count = len(colored(items[0], table))
    figure = Figure(figsize=(count * cell + 2.2, cell * 1.08 * len(items) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(items), count + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * count + [0.85]})
    for row, item in zip(grid, items, strict=True):
        seen = np.flatnonzero(~item.hidden | item.hidden.all())  # a cloud of hidden points is drawn whole
        seen = seen[np.random.default_rng(0).permutation(len(seen))[:SHEET_POINTS]]
        headings = {"input": shortened(item.name, 36)}
        if item.truth is not None:
            headings["errors"] = f"errors: {np.mean(item.truth != item.predicted):.1%} of the points"
        for axes, (column, colors) in zip(row, colored(item, table).items(), strict=False):
            size = np.clip(160 / np.sqrt(len(seen)), 0.8, 10)  # smaller points would make a sparse cloud hard to see
            draw_cloud(
                axes,
                item.points[seen],
                title=headings.get(column, column),
                color=NEUTRAL,
                point_colors=colors[seen],
                up=up,
                size=size,
                above=20 if up == "y" else 70,  # over the near walls into the room
            )
            if up == "z":
                axes.set_facecolor(DARK)  # pale walls would vanish on white
        labels = np.unique(np.concatenate([a[seen] for a in (item.truth, item.predicted) if a is not None]))
        handles = [Patch(color=table[label], label=names[label]) for label in labels]
        row[-1].axis("off")
        row[-1].legend(handles=handles, loc="center left", fontsize=9, frameon=False, borderpad=0, handlelength=1.2)
    save_figure(figure, path)
