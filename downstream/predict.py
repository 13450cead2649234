"""Run a trained model on your own files: meshes or clouds, single objects or whole rooms.

The checkpoint decides what is written:
  parts      a colored, labeled PLY of every object, parts.csv, and sheet.png with pictures and legends
  rooms      the same for every room (all points, cut into blocks of 1 m as in the whole-room protocol), and rooms.csv
  classes    classes.csv: the class of every object and the probabilities of all classes
  features   features.npz of a pretrained encoder: names (n,), features (n, D); --neighbors K draws the nearest ones
Inputs are files, folders (with all below) or patterns such as 'scans/*.ply'. Files that cannot be used are named and
skipped; the exit code is 1 then, and 2 if nothing could be used.

Examples:
  python downstream/predict.py --model_path checkpoints/part/best.pth --output_dir out chair.obj scans/
  python downstream/predict.py --model_path checkpoints/area5/best.pth --output_dir out --units mm 'rooms/*.ply'
  python downstream/predict.py --model_path checkpoints/exp/last.pth --output_dir out --neighbors 5 ~/models
"""

from __future__ import annotations

import argparse
import csv
import glob
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.pair_folder import read_source
from data.rendering import Mesh, sample_surface
from data.shape_files import SUFFIXES
from datasets.s3dis import CLASS_COLORS, CLASS_NAMES
from datasets.s3dis_prepare import MAX_DISTANCE, BlockSettings, Room, block_values, choose_points
from datasets.shape_reader import to_unit_sphere
from datasets.shapenet_part import PartTaxonomy, draw_rows, official_taxonomy
from downstream.features import check_neighbors, evaluating
from downstream.figures import SHEET_POINTS, check_output_path, draw_neighbors, thinned
from downstream.finetuning import scores_of, trained_points
from downstream.retrieval import nearest
from downstream.segmentation import drawing
from downstream.segmentation.drawing import Item, draw_sheet, write_colored_ply
from downstream.segmentation.main_semseg import RoomPrediction, predict_room
from engine.device import resolve_device
from engine.load_model import encoder_from_checkpoint, find_weights, fine_tuned_from_checkpoint, kind_of_checkpoint
from models import ENCODER_ALIASES, ENCODERS
from models.base import PointFeatures
from models.task_heads import Classification, FineTuned, PartSegmentation, SemanticSegmentation
from utils.cli import Settings, flag, log_to_screen, non_negative_int, positive_int, run, seed_number, write_json
from utils.errors import CheckpointError, DataError, UserError
from utils.files import check_name, data_files
from utils.progress import progress

TASKS: dict[str, type[FineTuned] | None] = {
    "parts": PartSegmentation,
    "rooms": SemanticSegmentation,
    "classes": Classification,
    "features": None,
}
POINTS = {"parts": 2048, "rooms": 4096, "classes": 1024, "features": 1024}
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254, "ft": 0.3048}
ROOM_DENSITY, ROOM_POINTS = 2000, (20_000, 2_000_000)  # points drawn from a mesh of a room: a square meter, limits
LABELS_OF_MESH = 8192  # points drawn from an object's mesh to be labeled
SHEET_ROWS = 20
POINT_HEADING = ["file", "category", "label", "name", "points", "share", "mean_probability"]
LINES, LABELS_PER_LINE = 20, 4  # printed


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(Settings):
    """How files are read and predicted; what is None follows from the model."""

    task: str | None = flag(choices=tuple(TASKS), help="what to predict (default: by the checkpoint's head)")
    model: str | None = flag(choices=[*ENCODERS, *ENCODER_ALIASES], help="encoder of published weights")
    k: int | None = flag(type=positive_int, help="neighbors per point (default: the checkpoint's)")
    up: str | None = flag(choices=("y", "z"), help="axis of the files that points up (default: y; rooms: z)")
    units: str = flag("m", choices=tuple(UNITS), help="of rooms; objects may have any")
    category: str | None = flag(
        metavar="NAME", help="category of all objects, for models of parts (default: the likeliest)"
    )
    num_points: int | None = flag(
        type=positive_int,
        metavar="N",
        help="points of a pass; all are labeled (default: as many as the model was fine-tuned on; where its file does "
        f"not say: {', '.join(f'{task} {count}' for task, count in POINTS.items())})",
    )
    batch_size: int = flag(8, type=positive_int, metavar="B", help="passes at once")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one")
    seed: int = flag(
        1, type=seed_number, metavar="S", help="seed of the points drawn, which depend on it and the file's name alone"
    )


class Prediction(NamedTuple):
    """What a model says of one file; what does not belong to its task is None."""

    name: str
    path: Path
    points: np.ndarray  # (N, 3) as in the file
    colors: np.ndarray | None = None  # (N, 3) in 0..1, of the file
    labels: np.ndarray | None = None  # (N,) parts or classes of points
    confidence: np.ndarray | None = None  # (N,) probability of each point's label
    category: str | None = None  # of a part model
    probabilities: np.ndarray | None = None  # (classes,)
    features: np.ndarray | None = None  # (D,)


@dataclass
class Report:
    """Result of :func:`predict`.

    Attributes:
        task: what was predicted.
        label_names: names of the labels of points, or of classes.
        colors: (labels, 3) in 0..1 of point labels.
        up: axis of the files that points up.
        predictions: of the usable files.
        answers: for each of them its class, or its most frequent labels, in one line; none of features.
        skipped: why files were skipped, by path.
        files: what was written.
    """

    task: str
    label_names: list[str]
    colors: np.ndarray | None = None
    up: str = "y"
    predictions: list[Prediction] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def find_inputs(
    inputs: Sequence[str | Path], *, suffixes: Sequence[str] = SUFFIXES
) -> tuple[dict[str, Path], dict[str, str]]:
    """Expand files, folders and patterns.

    Args:
        inputs: from the command line.
        suffixes: endings of the files to take from folders.

    Returns:
        Paths by a name that no other one has, and reasons by input for what is not there.
    """
    found: list[tuple[Path, str]] = []
    missing: dict[str, str] = {}
    for item in map(str, inputs):
        path = Path(item).expanduser()
        if path.is_dir():
            files = [p for p in data_files(path, "**/*") if p.is_file() and p.suffix.lower() in suffixes]
            found += [(p, _name_below(path, p)) for p in files]
        elif path.is_file():
            found.append((path, path.stem))
            files = [path]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            found += [(p, p.stem) for p in files]
        if not files:
            usable = f"holds nothing usable ({', '.join(suffixes)})"
            missing[item] = f"{item} {usable if path.is_dir() else 'does not exist'}"
    unique = list({path.resolve(): (path, name) for path, name in found}.values())
    often = Counter(name.lower() for _, name in unique)
    names: dict[str, Path] = {}
    for path, name in unique:
        own = name if often[name.lower()] == 1 else f"{path.parent.name}-{path.name}".lstrip("-")
        while own in names:
            own += "_"
        names[own] = path
    return names, missing


def _name_below(folder: Path, file: Path) -> str:
    """Return a name from the path below a folder; ``lamp/lamp.obj`` is ``lamp``."""
    parts = file.relative_to(folder).with_suffix("").parts
    return "-".join(part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1])


class Predictor:
    """A model and how it answers on one file.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        UserError: a setting that does not fit the model.
    """

    def __init__(self, model_path: str | Path, settings: PredictorSettings) -> None:
        self.settings, self.path = settings, find_weights(model_path, model=settings.model)
        self.task = self._task()
        self.up = settings.up or _up_of_models(self.task)
        self.device = resolve_device(settings.device)
        kind, payload = TASKS[self.task], {}
        if kind is None:
            model: nn.Module = encoder_from_checkpoint(self.path, model=settings.model, k=settings.k, in_channels=3)
        else:
            model, payload = fine_tuned_from_checkpoint(self.path, kind, model=settings.model, k=settings.k)
        self.model = model.to(self.device)
        self.encoder = model if kind is None else model.encoder
        self.size = settings.num_points or trained_points(payload) or POINTS[self.task]
        check_neighbors(self.encoder, self.size, name=str(self.path))
        self.colors: np.ndarray | None = None
        self.label_names: list[str] = []
        self._name_labels(payload.get("table", {}))

    def _task(self) -> str:
        if self.settings.task is not None:
            return self.settings.task
        kind = kind_of_checkpoint(self.path, model=self.settings.model)
        return next((name for name, task in TASKS.items() if task and task.kind == kind), "features")

    def _name_labels(self, table: dict[str, Any]) -> None:
        if self.task == "parts":
            self._name_parts(table)
        elif self.task == "rooms":
            if self.model.sizes["num_classes"] != len(CLASS_NAMES):
                raise CheckpointError(
                    f"{self.path} knows {self.model.sizes['num_classes']} classes, rooms have {len(CLASS_NAMES)}"
                )
            self.label_names, self.colors = list(CLASS_NAMES), np.asarray(CLASS_COLORS)
        elif self.task == "classes":
            count = self.model.sizes["num_classes"]
            self.label_names = list(table.get("class_names") or [f"class {i}" for i in range(count)])
        if self.settings.category is not None and self.task != "parts":
            raise UserError(f"--category belongs to models of parts, {self.path} predicts {self.task}")

    def _name_parts(self, table: dict[str, Any]) -> None:
        if table:
            taxonomy = PartTaxonomy.build(
                table["category_names"], table["part_counts"], part_names=table.get("part_names")
            )
        else:
            taxonomy = official_taxonomy()
        choice = table.get("class_choice") or self.settings.category
        self.categories = list(range(len(taxonomy.category_names)))
        if choice is not None:
            self.categories = [taxonomy.category_number(choice)]
        self.first = 0  # number of the model's first part
        if table.get("class_choice"):
            self.first = taxonomy.part_starts[self.categories[0]]
            if self.settings.category and taxonomy.category_number(self.settings.category) != self.categories[0]:
                raise UserError(f"--category {self.settings.category}: {self.path} knows {choice} alone")
        elif self.model.sizes["num_parts"] != taxonomy.num_parts:
            raise CheckpointError(f"{self.path} knows {self.model.sizes['num_parts']} parts and does not name them")
        self.taxonomy = taxonomy
        self.label_names, self.colors = list(taxonomy.part_names), taxonomy.colors

    def predict(self, path: Path, name: str) -> Prediction:
        """Read a file and predict.

        Raises:
            DataError: the file cannot be used.
        """
        check_name(name, path)
        rng = np.random.default_rng([self.settings.seed, zlib.crc32(name.encode())])
        points, colors = self._read(path, rng)  # (N, 3), (N, 3) in 0..1 or None
        k = getattr(self.encoder, "k", 1)
        if len(points) < k:
            raise DataError(f"{path} has {len(points)} points; the model needs {k} or more")
        upright = points if self.up == _up_of_models(self.task) else _turned(points, self.task)
        found = Prediction(name, path, points, colors)
        if self.task == "rooms":
            room = self._room(upright * UNITS[self.settings.units], colors, path, name)
            return found._replace(labels=room.predicted, confidence=room.confidence)
        if np.ptp(points, axis=0).max() == 0:
            raise DataError(f"{path}: all its points are the same")
        unit = to_unit_sphere(upright).astype(np.float32)
        if self.task == "parts":
            labels, confidence, category = self._parts(unit, rng)
            return found._replace(labels=labels, confidence=confidence, category=category)
        chosen = draw_rows(len(unit), min(self.size, len(unit)), rng)
        batch = torch.from_numpy(unit[chosen]).to(self.device)[None].mT  # (1, 3, N)
        with evaluating(self.model):
            result = self.model(batch)
        if self.task == "features":
            return found._replace(features=result.pooled[0].float().cpu().numpy())
        return found._replace(probabilities=result[0].float().softmax(0).cpu().numpy())

    def _read(self, path: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        shape = read_source(path)
        if not isinstance(shape, Mesh):
            if not len(shape.points):
                raise DataError(f"{path} contains no points")
            return shape.points, shape.colors
        count = {"parts": max(LABELS_OF_MESH, self.size)}.get(self.task, self.size)
        if self.task == "rooms":
            area = shape.areas().sum() * UNITS[self.settings.units] ** 2
            count = int(np.clip(ROOM_DENSITY * area, *ROOM_POINTS))
        samples = sample_surface(shape, count, int(rng.integers(1 << 31)))
        return samples.points, samples.colors / 255.0

    def _parts(self, unit: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
        """Label every point; in each pass as many as the model was trained with.

        Args:
            unit: (N, 3) in the unit sphere.
            rng: random numbers.

        Returns:
            Parts (N,) numbered over all categories, their probabilities (N,), and the category.
        """
        size = min(self.size, len(unit))
        dealt = np.concatenate([rng.permutation(len(unit)), rng.integers(len(unit), size=-len(unit) % size)])
        passes = dealt.reshape(-1, size)  # every point is in at least one
        category = self.categories[0]
        if len(self.categories) > 1:
            category = self._likeliest(unit[passes[:1]])
        shares = torch.zeros(len(unit), self.taxonomy.part_counts[category])
        times = torch.zeros(len(unit), 1)
        for rows in np.array_split(passes, -(-len(passes) // self.settings.batch_size)):
            index = torch.from_numpy(rows.ravel())
            shares.index_add_(0, index, self._probabilities(self._encoded(unit[rows]), category).mT.flatten(0, 1))
            times.index_add_(0, index, torch.ones(len(index), 1))
        confidence, part = (shares / times).max(1)
        start = self.taxonomy.part_starts[category]
        return start + part.numpy(), confidence.numpy(), self.taxonomy.category_names[category]

    def _likeliest(self, points: np.ndarray) -> int:
        """Return the category whose own parts get the most probability on points (B, N, 3)."""
        encoded = self._encoded(points)
        shares = [float(self._probabilities(encoded, category).sum(1).mean()) for category in self.categories]
        return self.categories[int(np.argmax(shares))]

    def _encoded(self, points: np.ndarray) -> PointFeatures:
        """Return the encoder's features of points (B, N, 3)."""
        with evaluating(self.model):
            return self.model.features(torch.from_numpy(points).to(self.device))

    def _probabilities(self, encoded: PointFeatures, category: int) -> Tensor:
        """Return the probabilities (B, parts, N) of a category's own parts, among all of the model."""
        own = self.taxonomy.parts_of(category)
        with evaluating(self.model):
            scores = self.model.head(encoded, torch.full((len(encoded.pooled),), category, device=self.device))
        return scores.float().softmax(1)[:, own.start - self.first : own.stop - self.first].cpu()

    def _room(self, xyz: np.ndarray, colors: np.ndarray | None, path: Path, name: str) -> RoomPrediction:
        """Label every point of a room (N, 3), in meters, z up."""
        channels = self.encoder.in_channels
        if channels > 3 and colors is None:
            raise DataError(f"{path} has no colors, which this model needs")
        if (distance := np.abs(xyz - np.median(xyz, axis=0)).max()) > MAX_DISTANCE:
            raise DataError(f"{path} has a point {distance:g} m from the middle of the room; are its --units right?")
        rgb = np.zeros_like(xyz) if colors is None else 255 * colors
        room = Room(name, xyz, rgb.astype(np.float32), np.zeros(len(xyz), np.uint8))
        blocks = _Blocks(room, BlockSettings(num_points=self.size, seed=self.settings.seed), channels)
        passes = scores_of(self.model, blocks, batch_size=self.settings.batch_size, device=self.device)
        return predict_room(passes, len(xyz), name)


class _Blocks(Dataset):
    """The test blocks of a room in memory; items as those of ``S3DISRooms``."""

    def __init__(self, room: Room, settings: BlockSettings, channels: int) -> None:
        self.room, self.channels, self.side = room, channels, settings.block
        self.xyz, self.chosen = choose_points(room, "test", settings)
        self.extent = self.xyz.max(0)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, int]:
        rows = self.chosen[i]
        values = block_values(self.xyz[rows], self.room.rgb[rows], self.extent, self.side)[:, : self.channels]
        unknown = torch.zeros(len(rows), dtype=torch.int64)
        return torch.from_numpy(values.astype(np.float32)), unknown, torch.from_numpy(rows), 0


def _up_of_models(task: str) -> str:
    """Return the axis that pointed up in training."""
    return "z" if task == "rooms" else "y"


def _turned(points: np.ndarray, task: str) -> np.ndarray:
    """Turn a cloud whose up axis is not that of training."""
    x, y, z = points.T
    return np.stack([x, -z, y] if task == "rooms" else [x, z, -y], axis=1)


def predict(
    model_path: str | Path,
    inputs: Sequence[str | Path],
    output_dir: str | Path | None = None,
    *,
    neighbors: int = 0,
    keep_points: bool = True,
    **settings: Any,
) -> Report:
    """Predict on files.

    Args:
        model_path: checkpoint or published weights.
        inputs: files, folders, patterns.
        output_dir: where results are written; None writes none.
        neighbors: of each object on the sheet of features; 0 draws none.
        keep_points: whether the report holds all points; otherwise only as many as a sheet shows, since thousands of
            scans do not fit in memory.
        settings: see :class:`PredictorSettings`.

    Raises:
        DataError: no file could be used.
        UserError: a wrong setting, or a file that cannot be written.
    """
    names, missing = find_inputs(inputs)
    predictor = Predictor(model_path, PredictorSettings(**settings))
    if neighbors and predictor.task != "features":
        raise UserError(f"--neighbors belongs to features, {model_path} predicts {predictor.task}")
    report = Report(predictor.task, predictor.label_names, predictor.colors, predictor.up, skipped=missing)
    writer = None if output_dir is None else _Writer(Path(output_dir), report)
    for name, path in progress(names.items(), text="predicting", unit="files"):
        try:
            prediction = predictor.predict(path, name)
        except (DataError, OSError) as error:
            report.skipped[str(path)] = str(error)
            continue
        if report.task != "features":
            report.answers.append(answer(prediction, report.label_names))
        if writer is not None:
            writer.add(prediction)
        report.predictions.append(prediction if keep_points else thinned_prediction(prediction, report.task))
    if not report.predictions:
        reasons = "; ".join(report.skipped.values())
        raise DataError(f"none of the files could be used: {reasons}")
    if writer is not None:
        writer.finish(neighbors)
    return report


def thinned_prediction(item: Prediction, task: str) -> Prediction:
    """Return a prediction with evenly spaced points, as many as a sheet shows."""
    count = {"rooms": drawing.SHEET_POINTS, "parts": LABELS_OF_MESH}.get(task, SHEET_POINTS)
    arrays = {name: getattr(item, name) for name in ("points", "colors", "labels", "confidence")}
    # Copies: a view would keep the whole array.
    return item._replace(**{name: thinned(a, count).copy() for name, a in arrays.items() if a is not None})


class _Writer:
    """Writes a report's files: a PLY for each labeled cloud at once, tables and pictures at the end."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        self.rows: list[list[Any]] = []  # of the table
        check_output_path(folder / "sheet.png")

    def add(self, item: Prediction) -> None:
        """Write what belongs to one file."""
        if item.labels is not None:
            path = self.folder / f"{item.name}_{self.report.task}.ply"
            write_colored_ply(path, item.points, self.report.colors[item.labels], item.labels)
            self.report.files.append(str(path))
            self.rows += _point_rows(item, self.report.label_names)
        elif item.probabilities is not None:
            self.rows.append(_class_row(item, self.report.label_names))

    def finish(self, neighbors: int) -> None:
        """Write the table or the features, and the pictures."""
        report, items = self.report, self.report.predictions
        shown = np.linspace(0, len(items) - 1, min(SHEET_ROWS, len(items))).round().astype(int)
        if report.task == "features":
            features = np.stack([item.features for item in items])
            names = [item.name for item in items]
            np.savez(self._file("features.npz"), names=np.array(names), features=features)
            if neighbors and len(items) > 1:
                found = nearest(features, shown, neighbors)
                clouds = [thinned(item.points) for item in items]
                draw_neighbors(clouds, names, shown, found, self._file("neighbors.png"), up=report.up)
            return
        classes = ["file", "class", "probability", *report.label_names]
        heading = classes if report.task == "classes" else POINT_HEADING
        with open(self._file(f"{report.task}.csv"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([heading, *self.rows])
        if report.task != "classes":
            drawn = [_drawn(items[i], report) for i in shown]
            some = f", {len(drawn)} of {len(items)} files" if len(drawn) < len(items) else ""
            title = report.task + some + (", drawn without ceilings" if report.task == "rooms" else "")
            draw_sheet(drawn, report.colors, report.label_names, self._file("sheet.png"), up=report.up, title=title)

    def _file(self, name: str) -> Path:
        """Return the path of a file, and remember that it is written."""
        self.report.files.append(str(self.folder / name))
        return self.folder / name


def _drawn(item: Prediction, report: Report) -> Item:
    """Return what the sheet shows: rooms without their ceilings."""
    hidden = item.labels == (CLASS_NAMES.index("ceiling") if report.task == "rooms" else -1)
    name = item.name if item.category is None else f"{item.name}: {item.category}"
    return Item(name, item.points, item.colors, None, item.labels, hidden)


def _point_rows(item: Prediction, names: Sequence[str]) -> list[list[Any]]:
    """Rows of the table of parts or of classes of points, one for each label of the file."""
    rows: list[list[Any]] = []
    for label, count in zip(*np.unique(item.labels, return_counts=True), strict=True):
        sure = f"{item.confidence[item.labels == label].mean():.4f}"
        share = f"{count / len(item.labels):.4f}"
        rows.append([str(item.path), item.category or "", int(label), names[label], int(count), share, sure])
    return rows


def _class_row(item: Prediction, names: Sequence[str]) -> list[Any]:
    """Row of the table of classes."""
    best = int(item.probabilities.argmax())
    probabilities = [f"{value:.6f}" for value in item.probabilities]
    return [str(item.path), names[best], probabilities[best], *probabilities]


def answer(item: Prediction, names: Sequence[str]) -> str:
    """Return the class of a file, or its most frequent labels, in one line."""
    shares = item.probabilities
    if shares is None:
        shares = np.bincount(item.labels, minlength=len(names)) / len(item.labels)
    best = np.argsort(-shares, kind="stable")[:LABELS_PER_LINE]
    named = ", ".join(f"{names[i]} {shares[i]:.0%}" for i in best if shares[i] >= 0.005)
    return f"{item.name}: {f'{item.category}: ' if item.category else ''}{named}"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = PredictorSettings.parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or pattern of meshes and clouds")
    parser.add_argument(
        "--model_path", required=True, metavar="FILE", help="checkpoint, published weights, or pretrained[:NAME]"
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="write into --output_dir although it is not empty")
    parser.add_argument(
        "--neighbors",
        type=non_negative_int,
        default=0,
        metavar="K",
        help="of features: draw each object's K nearest ones",
    )
    parser.add_argument("--json", metavar="FILE", help="also write a summary to FILE as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Predict and write; return a summary.

    Raises:
        DataError: no file could be used.
        UserError: a wrong setting, file or checkpoint.
    """
    args = build_parser().parse_args(argv)
    log_to_screen()
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UserError(f"{folder} is not empty; choose a new --output_dir, or --overwrite")
    if args.json:
        check_output_path(args.json)
    settings = asdict(PredictorSettings.from_flags(args))
    report = predict(args.model_path, args.inputs, folder, neighbors=args.neighbors, keep_points=False, **settings)
    for line in report.answers[:LINES]:
        print(line)
    for message in report.skipped.values():
        print(f"skipped: {message}")
    print(f"{len(report.predictions)} files predicted ({report.task}), {len(report.skipped)} skipped: {folder}")
    summary = {
        "task": report.task,
        "predicted": [str(item.path) for item in report.predictions],
        "skipped": report.skipped,
        "files": report.files,
    }
    write_json(args.json, summary)
    return summary


if __name__ == "__main__":
    run(main, failed=lambda result: result["skipped"])
