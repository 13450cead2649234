"""Draw docs/CrossNet.jpg: the method at one look, with a model of the demo set as the example.

The two views are made by the augmentation that pretraining uses, and the pictures are that model's own renderings.

Example:
  python docs/make_figure.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from datasets.pair_sources import open_source
from datasets.streams import SampleStreams
from datasets.transforms import pretraining_augmentation
from datasets.untrusted import decode_image
from downstream.figures import PICTURE_TYPES, check_output_path
from utils.cli import HelpFormatter, run
from utils.errors import UserError
from utils.pictures import Axes, FancyArrowPatch, FancyBboxPatch, Figure, Polygon, Rectangle, save_figure

MODEL = "living_room/blendswap-cc-0-oakchair"  # CC0
INK, PALE = "#2b2f36", "#8a919c"
POINT, POINT_FILL = "#1f6fb2", "#e3eef8"
IMAGE, IMAGE_FILL = "#c8641e", "#fbeadd"
INTRA, CROSS, AFTER = "#2a8a4a", "#7b3fa0", "#565c66"
WIDTH, HEIGHT = 176, 91


def project(points: np.ndarray, *, azimuth: float = 38, elevation: float = 22) -> np.ndarray:
    """See (N, 3) points, y up, from outside: right and up on paper, then nearness, (N, 3)."""
    a, e = np.radians([azimuth, elevation])
    x, y, z = points.T
    right, toward = x * np.cos(a) - z * np.sin(a), x * np.sin(a) + z * np.cos(a)
    return np.stack([right, y * np.cos(e) - toward * np.sin(e), y * np.sin(e) + toward * np.cos(e)], axis=1)


def scatter_cloud(ax: Axes, points: np.ndarray, x: float, y: float, *, size: float, color: str) -> None:
    """Scatter a cloud of the unit sphere around (x, y); near points are drawn last and darkest."""
    seen = project(points)
    seen = seen[np.argsort(seen[:, 2])]
    near = (seen[:, 2] - seen[:, 2].min()) / max(np.ptp(seen[:, 2]), 1e-6)
    alpha = 0.35 + 0.65 * near
    ax.scatter(x + size * seen[:, 0], y + size * seen[:, 1], s=3.4, c=color, alpha=alpha, linewidths=0, zorder=4)


def draw_picture(ax: Axes, image: Image.Image, x: float, y: float, *, size: float, gray: bool = False) -> None:
    """Place a rendering around (x, y) in a thin frame."""
    canvas = Image.new("RGBA", image.size, "white")
    picture = Image.alpha_composite(canvas, image.convert("RGBA")).convert("L" if gray else "RGB")
    picture = picture.resize((512, 512), Image.Resampling.BICUBIC)
    half = size / 2
    box = (x - half, x + half, y - half, y + half)
    options: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 255} if gray else {}
    ax.imshow(np.asarray(picture), extent=box, zorder=3, interpolation="lanczos", **options)
    ax.add_patch(Rectangle((x - half, y - half), size, size, fill=False, edgecolor=PALE, linewidth=0.8, zorder=4))


def draw_box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, edge: str, fill: str, **font: Any
) -> None:
    """Draw a rounded box around (x, y) with text in it."""
    font = {"color": INK, "fontsize": 9, "linespacing": 1.25, **font}
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1.4",
        facecolor=fill, edgecolor=edge, linewidth=1.3, zorder=3,
    )  # fmt: skip
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", zorder=5, **font)


def draw_encoder(ax: Axes, x: float, y: float, height: float, text: str, edge: str, fill: str) -> None:
    """Draw a funnel that is wide where data comes in."""
    w, h = 8.5, height / 2
    corners = [(x - w, y - h), (x - w, y + h), (x + w, y + 0.62 * h), (x + w, y - 0.62 * h)]
    ax.add_patch(Polygon(corners, facecolor=fill, edgecolor=edge, linewidth=1.3, joinstyle="round", zorder=3))
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.25, zorder=5)


def draw_vector(ax: Axes, x: float, y: float, name: str, color: str, seed: int) -> None:
    """Draw a projection as a row of cells of different strength, with its name on the left."""
    cells, cell = 7, 1.9
    strength = np.random.default_rng(seed).uniform(0.12, 0.95, cells)
    for n, alpha in enumerate(strength):
        left = x + (n - cells / 2) * cell
        ax.add_patch(Rectangle((left, y - 1.1), cell, 2.2, facecolor="white", zorder=3))
        ax.add_patch(
            Rectangle((left, y - 1.1), cell, 2.2, facecolor=color, alpha=alpha, edgecolor="white", lw=0.7, zorder=4)
        )
    ax.text(x, y + 2.2, name, ha="center", va="bottom", fontsize=9.5, color=color, zorder=5)


def draw_arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, *, bend: float = 0.0, **style: Any
) -> None:
    """Draw an arrow, straight or bent."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, **style}
    bow = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, end, color=color, connectionstyle=bow, zorder=2, **style))


def two_views(points: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return views of a cloud by the pretraining augmentation, without its shifts."""
    augment = pretraining_augmentation()
    streams = SampleStreams(seed=seed, epoch=0, index=torch.tensor([0]))
    views = [augment(torch.from_numpy(points)[None], streams)[0].numpy() for _ in range(2)]
    return [view - (view.max(0) + view.min(0)) / 2 for view in views]


def draw(data_root: str, *, model: str = MODEL, seed: int = 1) -> Figure:
    """Draw the method.

    Args:
        data_root: pretraining pairs that hold ``model``.
        model: the example, ``<synset>/<model_id>``.
        seed: of the two views.

    Raises:
        UserError: the data does not contain the model.
    """
    source = open_source(data_root)
    if model not in source.ids:
        raise UserError(f"{data_root} contains no model {model}; --model names one of its shapes")
    i = source.ids.index(model)
    points = source.points(i)
    image = decode_image(source.image_file(i, 0), source.where(i, 0))

    figure = Figure(figsize=(WIDTH / 12.6, HEIGHT / 12.6), dpi=160, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    top, low = 60.5, 19.0  # middle lines of the two branches

    # Grounds of the branches.
    for y, height, fill, edge, title in (
        (top, 43, "#f6f9fc", POINT, "point branch"),
        (low - 1, 33, "#fdf8f3", IMAGE, "image branch: thrown away after pretraining"),
    ):
        ground = FancyBboxPatch(
            (27, y - height / 2), 98, height, boxstyle="round,pad=0,rounding_size=2", facecolor=fill,
            edgecolor=edge, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0,
        )  # fmt: skip
        ax.add_patch(ground)
        ax.text(29, y - height / 2 + 1.5, title, fontsize=8.5, color=edge, style="italic", va="bottom")

    # One object: its cloud and its rendering.
    ax.text(12.5, 86.5, "one object, no label", ha="center", va="center", fontsize=10, color=INK, weight="bold")
    scatter_cloud(ax, points, 12.5, top, size=9.5, color=INK)
    ax.text(12.5, top - 12.5, "point cloud", ha="center", va="center", fontsize=9, color=INK)
    draw_picture(ax, image, 12.5, low, size=15)
    ax.text(12.5, low - 10, "rendering", ha="center", va="center", fontsize=9, color=INK)

    # Point branch.
    views = two_views(points, seed)
    rows = (top + 9.5, top - 9.0)
    for view, y, name, bend in zip(views, rows, ("view $t_1$", "view $t_2$"), (-0.12, 0.12), strict=True):
        draw_arrow(ax, (22.5, top + (1.5 if bend < 0 else -1.5)), (34.5, y), bend=bend)
        radius = np.linalg.norm(view, axis=1).max()
        scatter_cloud(ax, view / radius, 42.5, y, size=8.3, color=POINT)
        ax.text(33.0, y + 6.0 * np.sign(y - top), name, ha="center", va="center", fontsize=9, color=POINT)
        draw_arrow(ax, (51, y), (58.3, top + 0.30 * (y - top)), bend=0.0)
    ax.text(28.4, top, "augment", ha="left", va="center", fontsize=8.5, color=INK, style="italic")
    draw_encoder(ax, 67, top, 26, "point encoder\nDGCNN or\nPointNet\n(shared)", POINT, POINT_FILL)
    draw_box(ax, 87, top, 12, 10, "head\n256", POINT, "white")
    draw_arrow(ax, (75.6, top), (80.9, top))
    names, ys = ("$z_{t_1}$", "$z_{t_2}$"), (top + 8, top - 8)
    for n, (name, y) in enumerate(zip(names, ys, strict=True)):
        draw_arrow(ax, (93.1, top + (1 if n == 0 else -1)), (102.5, y), bend=0.12 if n else -0.12)
        draw_vector(ax, 110, y, name, POINT, seed=n)

    # Image branch.
    images = ((low + 7, "color", r"$z_{\mathrm{rgb}}$"), (low - 7, "gray", r"$z_{\mathrm{gray}}$"))
    for n, (y, kind, name) in enumerate(images):
        draw_arrow(ax, (20.4, low + (1.5 if n == 0 else -1.5)), (36.2, y), bend=0.1 if n else -0.1)
        draw_picture(ax, image, 42.5, y, size=12, gray=kind == "gray")
        ax.text(35.6, y + 4.2, kind, ha="right", va="center", fontsize=9, color=IMAGE)
        draw_arrow(ax, (48.7, y), (58.3, y))
        draw_encoder(ax, 67, y, 11.4, "ResNet\n" + ("3 channels" if n == 0 else "1 channel"), IMAGE, IMAGE_FILL)
        draw_arrow(ax, (75.6, y), (80.9, y))
        draw_box(ax, 87, y, 12, 7.5, "head\n256", IMAGE, "white")
        draw_arrow(ax, (93.1, y), (102.5, y))
        draw_vector(ax, 110, y, name, IMAGE, seed=10 + n)

    # Losses.
    draw_arrow(ax, (110, ys[0] - 1.6), (110, ys[1] + 5.8), INTRA, arrowstyle="<|-|>", linewidth=1.8)
    ax.text(108.6, top + 0.8, "pull", ha="right", va="center", fontsize=8.5, color=INTRA, style="italic")
    draw_box(ax, 149, top + 9.5, 43, 15, "", INTRA, "#eaf6ee")
    ax.text(149, top + 13, "intra-modal NT-Xent", ha="center", va="center", fontsize=10, color=INTRA, weight="bold")
    formula = r"$L_{\mathrm{intra}} = \mathrm{NTX}(z_{t_1},\, z_{t_2})$"
    ax.text(149, top + 7.5, formula, ha="center", va="center", fontsize=10.5)
    draw_arrow(ax, (118, ys[0]), (127.3, top + 9.5), INTRA, bend=0.0)
    draw_arrow(ax, (118, ys[1]), (127.3, top + 6.2), INTRA, bend=0.15)

    middle = (top + low) / 2 - 3.5
    draw_box(ax, 149, middle, 43, 19, "", CROSS, "#f4ecf8")
    ax.text(149, middle + 5.6, "cross-modal NT-Xent", ha="center", va="center", fontsize=10, color=CROSS, weight="bold")
    formula = r"$L_{\mathrm{cross}} = \mathrm{NTX}([z_{t_1};\, z_{t_2}],\ [z_{\mathrm{rgb}};\, z_{\mathrm{gray}}])$"
    ax.text(149, middle - 0.2, formula, ha="center", va="center", fontsize=10.5)
    pairing = "$t_1$ pairs with color, $t_2$ with gray; other rows are negatives"
    ax.text(149, middle - 6, pairing, ha="center", va="center", fontsize=8, color=CROSS, style="italic")
    for y, bend, target in ((ys[0], -0.1, 5.5), (ys[1], -0.05, 3), (low + 7, 0.05, -3), (low - 7, 0.1, -5.5)):
        draw_arrow(ax, (118, y - 0.8 if y > middle else y + 0.8), (127.3, middle + target), CROSS, bend=bend)
    total = r"minimize   $L = L_{\mathrm{intra}} + \alpha\, L_{\mathrm{cross}}$"
    ax.text(149, low - 7, total, ha="center", va="center", fontsize=11.5, color=INK)

    # Afterwards.
    draw_arrow(ax, (67, top + 13.2), (67, 86.5), AFTER, linewidth=1.5, linestyle=(0, (3, 2)), arrowstyle="-")
    draw_arrow(ax, (67, 86.5), (78.6, 86.5), AFTER, linewidth=1.5)
    text = "afterwards the point encoder alone serves:   linear SVM   |   part segmentation   |   semantic segmentation"
    draw_box(ax, 125, 86.5, 92, 5.6, text, AFTER, "#f1f2f4", fontsize=9)

    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    return figure


def main(argv: list[str] | None = None) -> dict[str, str]:
    """Write the figure; return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    here = Path(__file__).resolve().parent
    demo = str(here.parent / "data" / "demo")
    parser.add_argument("--data_root", default=demo, metavar="DIR", help="pretraining pairs")
    parser.add_argument("--model", default=MODEL, metavar="ID", help="the shape to draw")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the two views")
    parser.add_argument("--out", default=str(here / "CrossNet.jpg"), metavar="FILE", help="picture to write")
    args = parser.parse_args(argv)
    check_output_path(args.out, PICTURE_TYPES)
    figure = draw(args.data_root, model=args.model, seed=args.seed)
    quality = {"pil_kwargs": {"quality": 92}} if args.out.endswith(".jpg") else {}
    save_figure(figure, args.out, dpi=figure.dpi, **quality)
    print(args.out)
    return {"figure": args.out}


if __name__ == "__main__":
    run(main)
