"""The whole job on the embedded demo set, in minutes on two CPU cores: `make demo`.

Pretrains a DGCNN encoder on 811 furniture models and their pictures, scores it by a linear SVM against the same encoder
without training (batch-norm statistics set, so that the comparison is fair), and writes a page with curves, example
pairs and the table: runs/demo/report.html, and the numbers in runs/demo/report.json.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import train_crossnet_con
from datasets.shapenet_render import ShapeNetRender, decode_image
from datasets.streams import SampleStreams
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, RenderTransform, pretraining_augmentation
from downstream.classification import main as linear_svm
from utils.cli import HelpFormatter, positive_int, run, write_json
from utils.training import git_commit, versions

# Small enough for two CPU cores; everything else has the released value.
PRETRAINING = {"batch_size": 32, "num_points": 512, "image_model": "resnet18", "image_size": 64, "workers": 1}
SVM_C = ("0.01", "0.1", "1", "10")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data_root", default="data/demo", metavar="DIR", help="the demo set")
    parser.add_argument(
        "--output_dir", default="runs/demo", metavar="DIR", help="what the demo makes; replaced each time"
    )
    parser.add_argument("--epochs", type=positive_int, default=3, metavar="E", help="of pretraining")
    parser.add_argument(
        "--num_points", type=positive_int, default=512, metavar="N", help="points of a view and of the SVM"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of everything random")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def flags(**settings: Any) -> list[str]:
    """Keyword settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]


def score(args: argparse.Namespace, name: str, *encoder: str) -> dict[str, Any]:
    """Linear SVM, few-label SVM and retrieval of one encoder on the demo classes."""
    print(f"\nLinear SVM on frozen features: {name} encoder", flush=True)
    folder = Path(args.output_dir)
    return linear_svm.main(
        [
            *encoder,
            *flags(dataset="demo", data_root=args.data_root, num_points=args.num_points, svm_c=SVM_C, shots=(1, 5)),
            *flags(seed=args.seed, device=args.device, retrieval_sheet=folder / f"retrieval_{name}.png"),
            *flags(confusion_matrix=folder / f"confusion_{name}.png", json=folder / f"svm_{name}.json"),
        ]
    )


def pretrain(args: argparse.Namespace) -> Path:
    """Pretrain on the demo pairs; returns the checkpoint."""
    print("\nPretraining", flush=True)
    settings = {**PRETRAINING, "num_points": args.num_points, "epochs": args.epochs, "seed": args.seed}
    train_crossnet_con.main(
        [
            *flags(data_root=args.data_root, output_dir=args.output_dir, exp_name="pretraining", device=args.device),
            *flags(**settings, eval_every=0, log_every=5),
            "--overwrite",
            "--channels_last",
        ]
    )
    return Path(args.output_dir) / "pretraining" / "last.pth"


def draw_pairs(args: argparse.Namespace, *, count: int = 6) -> Figure:
    """Example pairs: the cloud, its two augmented views, the colour and the gray rendering as the encoders see them."""
    pairs = ShapeNetRender(args.data_root, transform=RenderTransform(96), seed=args.seed)
    chosen = np.linspace(0, len(pairs) - 1, count).astype(int)
    figure = Figure(figsize=(11, 2.1 * count), layout="constrained")
    FigureCanvasAgg(figure)
    augmentation = pretraining_augmentation(args.num_points)
    for row, index in enumerate(chosen):
        sample = pairs[int(index)]
        streams = SampleStreams(seed=args.seed, epoch=0, index=torch.tensor([index]), purpose=1)
        views = [augmentation(sample["points"][None], streams)[0] for _ in range(2)]
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
            ("colour input", sample["rgb"]),
            ("gray input", sample["gray"]),
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


def embedded(picture: Figure | Path, caption: str) -> str:
    """A picture inside the page, so that the report is one file."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, dpi=80)
        data = buffer.getvalue()
    else:
        data = picture.read_bytes()
    text = html.escape(caption)
    source = base64.b64encode(data).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


def score_table(report: dict[str, Any]) -> str:
    """The before-and-after table."""
    rows = []
    for name in ("untrained", "pretrained"):
        scores = report[name]
        few = "".join(f"<td>{mean:.1f} &plusmn; {std:.1f}</td>" for mean, std in scores["shots"].values())
        rows.append(
            f"<tr><th>{name}</th><td>{scores['test_accuracy_mean']:.1f}</td>{few}<td>{scores['retrieval_map']:.1f}</td></tr>"
        )
    labels = "".join(
        f"<th>{shots} label{'s' if shots != '1' else ''} per class</th>" for shots in report["untrained"]["shots"]
    )
    return (
        f"<table><tr><th>encoder</th><th>all labels</th>{labels}<th>retrieval mAP</th></tr>{''.join(rows)}</table>"
        "<p>Accuracy of a linear SVM on frozen features and mean average precision of cosine retrieval, in percent of "
        f"{report['pretrained']['test_clouds']} test clouds of {report['pretrained']['classes']} classes. &plusmn; is "
        "the deviation over draws of the labels. C of the SVM is chosen by cross-validation on the training split. The "
        "untrained encoder has its batch-norm statistics set on unlabelled clouds.</p>"
    )


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>CrossNet demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{border:1px solid #bbb;padding:.3rem .8rem;text-align:right}}
img{{max-width:100%}}figure{{margin:1.5rem 0}}figcaption{{color:#555}}code{{background:#eee;padding:0 .2rem}}</style>
<h1>CrossNet on the demo set</h1>
<p>{summary}</p>
<h2>Does pretraining help?</h2>{table}
<h2>Pretraining</h2>{curves}
<h2>What the encoders see</h2>{pairs}
<h2>Nearest neighbours in feature space</h2>{retrieval}
<h2>Confusions</h2>{confusion}
<p><small>{provenance}</small></p></html>
"""


def write_page(args: argparse.Namespace, report: dict[str, Any]) -> Path:
    """Write report.html."""
    folder = Path(args.output_dir)
    page = PAGE.format(
        summary=(
            f"A DGCNN encoder saw {report['pairs']} furniture models as clouds and pictures, without labels, for "
            f"{args.epochs} epochs. The models come from Sweet Home 3D (CC0 and CC-BY 3.0, see "
            f"<code>data/demo/ATTRIBUTION.md</code>). All in all this took {report['seconds'] / 60:.1f} minutes."
        ),
        table=score_table(report),
        curves=embedded(folder / "pretraining" / "curves.png", "Losses and learning rate by epoch"),
        pairs=embedded(
            draw_pairs(args), "Clouds, two augmented views of each, and renderings before and after augmentation"
        ),
        retrieval="".join(
            embedded(folder / f"retrieval_{name}.png", f"{name}: test clouds and their nearest neighbours")
            for name in ("untrained", "pretrained")
        ),
        confusion=embedded(folder / "confusion_pretrained.png", "pretrained: true against predicted classes"),
        provenance=html.escape(f"commit {report['git_commit']}, {report['versions']}, seed {args.seed}"),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns what report.json holds."""
    args = build_parser().parse_args(argv)
    matplotlib.use("Agg")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    report: dict[str, Any] = {"untrained": score(args, "untrained", "--random_init", "--calibrate_bn")}
    checkpoint = pretrain(args)
    report["pretrained"] = score(args, "pretrained", "--model_path", str(checkpoint))
    report["pairs"] = len(ShapeNetRender(args.data_root))
    report["seconds"] = round(time.perf_counter() - start, 1)
    report.update({"seed": args.seed, "epochs": args.epochs, "versions": versions(), "git_commit": git_commit()})
    path = write_page(args, report)
    write_json(Path(args.output_dir) / "report.json", report)
    for name in ("untrained", "pretrained"):
        scores = report[name]
        print(f"{name:>10}: SVM {scores['test_accuracy_mean']:.1f} %, retrieval mAP {scores['retrieval_map']:.1f} %")
    print(f"report: {path} ({report['seconds'] / 60:.1f} minutes)")
    return report


if __name__ == "__main__":
    run(main)
