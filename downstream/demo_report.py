"""The demo's report: tables, curves and pictures in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.shapenet_render import ShapeNetRender, collate_pairs
from datasets.streams import SampleStreams, Stream
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, RenderAugmentation, RenderPixels, pretraining_augmentation
from datasets.untrusted import decode_image
from utils.errors import warn_on_failure
from utils.pictures import Figure, FigureCanvasAgg

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>CrossNet demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{border:1px solid #bbb;padding:.3rem .8rem;text-align:right}}
img{{max-width:100%}}figure{{margin:1.5rem 0}}figcaption,small{{color:#555}}
code{{background:#eee;padding:0 .2rem}}</style>
<h1>CrossNet on the demo set</h1>
{body}
<p><small>{provenance}</small></p></html>
"""
VIEW_POINTS = 512
SHIPPED_TEXT = " Shipped: the weights of this repository (<code>weights/</code>), whose encoder may be wider."
COLORS = ("#888888", "#2a7f3f", "#1f5fa8")  # of the curves from scratch, pretrained, shipped
SEGMENTATION_TITLES = {"parts": "Part segmentation", "rooms": "Semantic segmentation of rooms"}


def embedded(picture: Callable[[], Figure] | Path, caption: str) -> str:
    """Return a figure with the picture embedded in the page, or a note if it cannot be drawn.

    Args:
        picture: a function that draws it, or its file.
        caption: text below it.
    """
    text = html.escape(caption)
    data = b""
    with warn_on_failure(f"the picture of {caption}"):
        data = picture.read_bytes() if isinstance(picture, Path) else png_of(picture())
    if not data:
        return f"<figure><figcaption>(could not be drawn) {text}</figcaption></figure>"
    source = base64.b64encode(data).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


def png_of(figure: Figure) -> bytes:
    """Encode a figure as PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table whose first column names the rows; cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += [f"<th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) for name, *cells in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def with_deviation(mean: float, std: float) -> str:
    """Format mean and deviation as a cell."""
    return f"{mean:.1f} &plusmn; {std:.1f}"


def draw_pairs(data_root: str, *, seed: int, count: int = 6) -> Figure:
    """Draw example pairs: the cloud, its two augmented views, the color and gray renderings that the encoders see."""
    pairs = ShapeNetRender(data_root, transform=RenderPixels(96), seed=seed)
    chosen = np.linspace(0, len(pairs) - 1, count).astype(int)
    figure = Figure(figsize=(11, 2.1 * count), layout="constrained")
    augmentation, render_augmentation = (
        pretraining_augmentation(min(VIEW_POINTS, pairs.cloud_size)),
        RenderAugmentation(96),
    )
    for row, index in enumerate(chosen):
        sample = pairs[int(index)]
        streams = SampleStreams(seed=seed, epoch=0, index=torch.tensor([index]), purpose=Stream.AUGMENTATION)
        views = [augmentation(sample["points"][None], streams)[0] for _ in range(2)]
        batch = collate_pairs([sample])
        images = render_augmentation(batch["pixels"], batch["sizes"], streams)
        clouds = [("cloud", sample["points"]), ("view 1", views[0]), ("view 2", views[1])]
        for column, (title, cloud) in enumerate(clouds):
            axes = figure.add_subplot(count, 6, 6 * row + column + 1, projection="3d")
            x, y, z = cloud.numpy().T  # y is up
            axes.scatter(x, z, y, c=y, s=2, cmap="viridis")
            axes.set(title=title if row == 0 else "")
            axes.set_axis_off()
            axes.set_aspect("equal")
        image = decode_image(pairs.source.image_file(int(index), 0), pairs.source.where(int(index), 0))
        pictures = [
            ("rendering", np.asarray(image.convert("RGBA"))),
            ("color input", images["rgb"][0]),
            ("gray input", images["gray"][0]),
        ]
        for column, (title, picture) in enumerate(pictures):
            axes = figure.add_subplot(count, 6, 6 * row + column + 4)
            if isinstance(picture, torch.Tensor):
                channels = len(picture)
                picture = picture.permute(1, 2, 0).numpy() * IMAGENET_STD[:channels] + IMAGENET_MEAN[:channels]
            axes.imshow(np.clip(picture, 0, 255), cmap="gray")
            axes.set(title=title if row == 0 else "")
            axes.set_axis_off()
    return figure


def draw_validation(runs: Mapping[str, list[dict[str, Any]]], key: str, heading: str) -> Figure:
    """Plot the score on held-out training data by epoch, a line per run.

    Args:
        runs: records of fine-tuning by start.
        key: the score's name in ``metrics.jsonl``.
        heading: label of the axis.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for (start, records), color in zip(runs.items(), COLORS, strict=False):
        for number, record in enumerate(records):
            text = (Path(record["folder"]) / "metrics.jsonl").read_text(encoding="utf-8")
            lines = [line for line in map(json.loads, text.splitlines()) if key in line]
            label = start if number == 0 else None
            axes.plot([line["epoch"] for line in lines], [line[key] for line in lines], color=color, label=label)
    axes.set(xlabel="epoch", ylabel=f"{heading} (%)")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def classification_section(folder: Path, report: Mapping[str, Any], data_root: str) -> str:
    """Write the section on frozen features: scores, pretraining curves, pairs, neighbors and confusions."""
    pretrained, rows = report["pretrained"], []
    names = [name for name in ("untrained", "pretrained", "shipped") if name in report]
    for name in names:
        scores = report[name]
        few = [with_deviation(*shots) for shots in scores["shots"].values()]
        rows.append([name, f"{scores['test_accuracy_mean']:.1f}", *few, f"{scores['retrieval_map']:.1f}"])
    labels = [f"{shots} label{'s' if shots != '1' else ''} per class" for shots in pretrained["shots"]]
    over = "draws of the labels" if pretrained["shots_std_over"] == "draws" else "seeds"
    return "".join(
        [
            "<h2>Classification</h2>",
            table(["encoder", "all labels", *labels, "retrieval mAP"], rows),
            "<p>Accuracy of a linear SVM on frozen features of DGCNN-cls, and mean average precision of cosine "
            f"retrieval, in percent, on {pretrained['test_clouds']} test clouds of {pretrained['classes']} classes. "
            f"&plusmn; is the deviation over {over}. The C of the SVM was chosen by cross-validation on the training "
            "split. The batch-norm statistics of the untrained encoder were set on unlabeled clouds."
            f"{SHIPPED_TEXT * ('shipped' in names)}</p>",
            embedded(
                folder / "classification" / f"pretraining_{report['seeds'][0]}" / "curves.png",
                "pretraining: losses and learning rate by epoch",
            ),
            "<h3>What the encoders see</h3>",
            embedded(
                lambda: draw_pairs(data_root, seed=report["seeds"][0]),
                "clouds, two augmented views of each, and renderings before and after augmentation",
            ),
            "<h3>Nearest neighbors in feature space</h3>",
            *(
                embedded(
                    folder / "classification" / f"retrieval_{name}.png",
                    f"{name}: test clouds and their nearest neighbors",
                )
                for name in names
            ),
            "<h3>Confusions</h3>",
            embedded(
                folder / "classification" / "confusion_pretrained.png", "pretrained: true against predicted classes"
            ),
        ]
    )


def segmentation_section(folder: Path, name: str, result: Mapping[str, Any], headings: Mapping[str, str]) -> str:
    """Write a segmentation section: scores from scratch and pretrained, validation curves, predictions."""
    starts = list(result["runs"])
    several = len(result["runs"][starts[0]]) > 1
    rows = []
    for start in starts:
        scores = [result[start][key] for key in headings]
        rows.append([start, *(with_deviation(s["mean"], s["std"]) if several else f"{s['mean']:.1f}" for s in scores)])
    record = result["runs"][starts[0]][0]
    deviation = " &plusmn; is the deviation over seeds." if several else ""
    return "".join(
        [
            f"<h2>{SEGMENTATION_TITLES[name]}</h2>",
            table(["fine-tuned", *headings.values()], rows),
            f"<p>Percent on the test split, at the epoch that is {html.escape(result['reported'])}. From scratch and "
            f"pretrained use the same encoder ({settings_text(result['encoder'])}) and budget "
            f"({record['training_samples']} labeled training samples; {settings_text(result['fine_tuning'])}); the "
            "pretrained one was first trained on unlabeled pairs "
            f"({settings_text(result['pretraining'])}).{SHIPPED_TEXT * ('shipped' in starts)}{deviation}</p>",
            embedded(
                lambda: draw_validation(result["runs"], result["validation"]["key"], result["validation"]["heading"]),
                "score on held-out training data by epoch; from scratch, batch norm's running statistics are still "
                "near their initial values in the first epochs, which explains most of the early difference",
            ),
            embedded(folder / name / "pictures" / "sheet.png", "pretrained: input, truth, prediction and errors"),
        ]
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    """Format settings as text."""
    given = {name.replace("_", " "): "all" if value is None else value for name, value in settings.items()}
    return html.escape(", ".join(f"{name} {value}" for name, value in given.items()))


def write_page(
    folder: Path, report: Mapping[str, Any], *, data_root: str, headings: Mapping[str, Mapping[str, str]]
) -> Path:
    """Write report.html.

    Returns:
        Path of the page.
    """
    seeds = report["seeds"]
    body = [
        f"<p>Point encoders were pretrained on {report['pairs']} furniture models as clouds and pictures, without "
        "labels. Does that help? Each task below was run without and with this pretraining. The models come from Sweet "
        "Home 3D (CC0 and CC-BY 3.0, see <code>data/demo/ATTRIBUTION.md</code>); rules generate the labeled parts and "
        f"rooms. This took {report['seconds'] / 60:.1f} minutes{' since it was continued' * report['continued']}.</p>"
    ]
    if "classification" in report["tasks"]:
        body.append(classification_section(folder, report, data_root))
    body += [
        segmentation_section(folder, name, report[name], headings[name]) for name in headings if name in report["tasks"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    shown = ", ".join(map(str, seeds))
    provenance = f"commit {report['git_commit']}; {versions}; seed{'s' if len(seeds) > 1 else ''} {shown}"
    path = folder / "report.html"
    path.write_text(PAGE.format(body="".join(body), provenance=html.escape(provenance)), encoding="utf-8")
    return path
