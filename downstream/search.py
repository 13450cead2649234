"""Find shapes by a picture or by a shape, and measure how well pictures and shapes of pairs find one another.

A checkpoint of train_crossnet_con.py keeps the image encoders and the projection heads, so that clouds and pictures can
be compared:
  image to shape  cosine of the projections that pretraining pulls together; of two image branches, of their mean
  shape to shape  cosine of the encoder's features, centered on the gallery
Without --query the pairs of --data_root are measured: R@1, R@5, R@10 (share of queries whose partner is among the
first 1, 5, 10 of all pairs) and the median rank, in both directions, beside chance. The pairs are those of --list, or
else those that the run held out (--val_fraction), or else all. With --query the best shapes of --gallery are found, or
of the pairs of --data_root. Files that cannot be used are named and skipped; the exit code is 1 then, and 2 if nothing
could be used.

Examples:
  python downstream/search.py --model_path checkpoints/exp/last.pth --data_root data --list held_out.txt --sheet r.png
  python downstream/search.py --model_path checkpoints/exp/last.pth --gallery ~/models --query photo.jpg --sheet r.png
  python downstream/search.py --model_path checkpoints/exp/last.pth --gallery ~/models --query chair.obj --json r.json
  python downstream/search.py --model_path checkpoints/exp/last.pth --data_root data --query photo.jpg --sheet r.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
from PIL import Image

from data.rendering.cameras import Camera
from data.shape_files import SUFFIXES
from datasets.pair_sources import PairSource, choose_shapes, open_source, read_shape_list
from datasets.photos import PHOTO_SUFFIXES, cut_out, framed, read_photo
from downstream.features import check_neighbors
from downstream.figures import (
    NEUTRAL,
    PICTURE_TYPES,
    RIGHT,
    WRONG,
    check_output_path,
    draw_cloud,
    draw_picture,
    thinned,
)
from downstream.pair_space import PairProjections, PairReader, PairSpace, pair_scores, project_pairs
from downstream.predict import POINTS, Prediction, Predictor, PredictorSettings, find_inputs
from downstream.retrieval import unit_rows
from utils.cli import CommonSettings, flag, log_to_screen, positive_int, run, write_json
from utils.errors import DataError, UserError
from utils.pictures import Axes, Figure, save_figure
from utils.progress import progress


@dataclass(kw_only=True)
class SearchConfig(CommonSettings):
    """Settings of this script.

    Raises:
        UserError: they do not fit together.
    """

    model_path: str = flag(required=True, metavar="FILE", help="checkpoint of train_crossnet_con.py, such as last.pth")
    batch_size: int = flag(32, type=positive_int, metavar="B", help="pairs per forward pass")
    num_points: int | None = flag(
        type=positive_int, metavar="N", help="points of a cloud (default: the run's, or all; files 1,024)"
    )
    top: int = flag(5, type=positive_int, metavar="K", help="items to show for a query")
    sheet: str | None = flag(metavar="FILE", help="draw queries with the best items (.png, .pdf)")
    rows: int = flag(8, type=positive_int, metavar="R", help="queries on the sheet")
    list: str | None = flag(
        group="pairs of --data_root",
        metavar="FILE",
        help="use these shapes only: one <synset>/<model_id>, or <model_id>, a line",
    )
    query: Sequence[str] | None = flag(
        group="search", nargs="+", metavar="FILE", help="pictures, meshes, clouds; files, folders or patterns"
    )
    gallery: Sequence[str] | None = flag(
        nargs="+",
        metavar="DIR",
        help="meshes and clouds to search; folders with all below (default: the shapes of the pairs)",
    )
    up: str | None = flag(choices=("y", "z"), help="axis of the files that points up (default: y)")
    fill: float = flag(
        Camera.fill,
        type=float,
        metavar="F",
        help="share of the picture's side to which an object on a transparent or plain background is scaled, as in the "
        "renderings of this project; 0 leaves it as it is",
    )
    keep_background: bool = flag(
        False, help="leave a background of one color in pictures; otherwise it becomes that of the run's renderings"
    )

    def __post_init__(self) -> None:
        if self.gallery and not self.query:
            raise UserError("--gallery is searched by --query: name a picture or a shape")
        if not 0 <= self.fill <= 1:
            raise UserError(f"--fill {self.fill:g}: expected 0 to 1")


@dataclass
class Query:
    """A query of a search, and what it found.

    Attributes:
        path: file of the query.
        picture: as the image encoders get it, square, on the run's background; None for a shape.
        points: (N, 3) of a shape.
        background: of a picture: ``transparent``, ``plain`` (removed) or ``kept``.
        order: numbers of the best items of the gallery, best first.
        similarity: cosine of each.
    """

    path: Path
    picture: Image.Image | None
    points: np.ndarray | None
    background: str | None
    order: np.ndarray
    similarity: np.ndarray


def measure(config: SearchConfig) -> dict[str, Any]:
    """Measure the pairs of ``--data_root``, draw the sheet, and return the scores.

    Raises:
        CheckpointError: the checkpoint has no projection heads.
        DataError: no pair can be read, or a listed one is missing.
    """
    space = PairSpace(config.model_path, device=config.device)
    read, rows = open_pairs(config, space)
    held_out = set() if config.list else set(space.held_out) & set(read.source.ids)
    if held_out:
        rows = choose_shapes(read.source.ids, held_out, where=config.data_root)
    pairs = project_pairs(space, read, rows, batch_size=config.batch_size)
    metrics = {
        "model_path": config.model_path,
        "data_root": config.data_root,
        "pairs": len(pairs.rows),
        "held_out": bool(held_out),
        "num_points": read.num_points,
        "seed": config.seed,
        **pair_scores(pairs),
        "skipped": pairs.skipped,
    }
    print(score_table(metrics))
    if held_out:
        print("These pairs were held out of the run's training.")
        if absent := len(space.held_out) - len(held_out):
            print(f"{absent} pairs that it held out are not in {config.data_root}: scores of fewer pairs are higher.")
    elif not config.list:
        print("Pairs that pretraining has seen are easier: pretrain with --val_fraction, or name others with --list.")
    if config.sheet:
        draw_pairs(space, read, pairs, config.sheet, rows=config.rows, top=config.top)
    return metrics


def open_pairs(config: SearchConfig, space: PairSpace) -> tuple[PairReader, list[int]]:
    """Return a reader of the pairs of ``--data_root``, and the numbers of those to use."""
    source = open_source(config.data_root)
    rows = list(range(len(source.ids)))
    if config.list:
        rows = choose_shapes(source.ids, read_shape_list(config.list), where=config.data_root)
    size = config.num_points or space.flags["num_points"] or source.size(rows[0]) or POINTS["features"]
    check_neighbors(space.model.point_encoder, size, name=config.model_path)
    return PairReader(source, num_points=size, seed=config.seed), rows


def score_table(metrics: dict[str, Any]) -> str:
    """Format the scores of pairs, one line per direction and branch."""
    columns = {"recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "median_rank": "median rank"}
    lines = [f"{metrics['pairs']} pairs".ljust(24) + "".join(text.rjust(13) for text in columns.values())]
    entries = [
        (f"{direction.replace('_', ' ')}, {branch}", scores)
        for direction in ("image_to_shape", "shape_to_image")
        for branch, scores in metrics[direction].items()
    ]
    for name, scores in [*entries, ("chance", metrics["chance"])]:
        lines.append(name.ljust(24) + "".join(f"{scores[key]:13.1f}" for key in columns))
    return "\n".join(lines)


def draw_pairs(space: PairSpace, read: PairReader, pairs: PairProjections, path: str, *, rows: int, top: int) -> None:
    """Draw pairs of evenly spaced numbers: left the picture with the shapes it finds, right the reverse."""
    count, top = len(pairs.rows), min(top, len(pairs.rows))
    queries = np.linspace(0, count - 1, min(rows, count)).round().astype(int)
    clouds, pictures = unit_rows(pairs.clouds), unit_rows(pairs.pictures[space.branches[0]])
    figure = Figure(figsize=(2.5 * (1 + top), 1.45 * len(queries) + 0.4), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.03)

    def draw(axes: Axes, item: int, *, shape: bool, title: str, color: str) -> None:
        if shape:
            draw_cloud(axes, thinned(read.source.points(pairs.rows[item])), title=title, color=color, size=1)
        else:
            draw_picture(axes, space.pixels.flatten(read.picture(pairs.rows[item])), title=title, color=color)

    for half, (by, of, shape, text) in zip(
        halves,
        ((pictures, clouds, True, "an image finds its shape"), (clouds, pictures, False, "a shape finds its image")),
        strict=True,
    ):
        half.suptitle(f"{text} among {count}", fontsize=10)
        for row, query in zip(half.subplots(len(queries), 1 + top, squeeze=False), queries, strict=True):
            similarity = of @ by[query]
            order = np.argsort(-similarity, kind="stable")
            rank = 1 + int(np.flatnonzero(order == query)[0])
            draw(row[0], query, shape=not shape, title=f"its match is no. {rank}", color=NEUTRAL)
            for axes, item in zip(row[1:], order[:top], strict=True):
                color = RIGHT if item == query else WRONG
                draw(axes, item, shape=shape, title=short_name(read.source.ids[pairs.rows[item]]), color=color)
    save_figure(figure, path, dpi=110)


def short_name(name: str) -> str:
    """Return the end of a name, without its folders, short enough for the title of a small picture."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 18 else f"...{name[-15:]}"


class Search:
    """Searches the shapes of ``--gallery``, or those of the pairs.

    Attributes:
        gallery: what can be found.
        source: of the pairs whose shapes are the gallery; None for files.
        skipped: why files were skipped, by path.

    Raises:
        CheckpointError: the checkpoint has no projection heads.
        DataError: the gallery has no usable shape.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.space = config, PairSpace(config.model_path, device=config.device)
        size = config.num_points or self.space.flags["num_points"] or POINTS["features"]
        settings = PredictorSettings(
            task="features", num_points=size, up=config.up, device=config.device, seed=config.seed
        )
        self.predictor = Predictor(config.model_path, settings)
        self.gallery: list[Prediction] = []
        self.source: PairSource | None = None
        self.skipped: dict[str, str] = {}
        if config.gallery:
            self.read_files()
        else:
            self.read_pairs()
        if not self.gallery:
            raise DataError(f"the gallery has no usable shape: {'; '.join(list(self.skipped.values())[:3])}")
        features = np.stack([item.features for item in self.gallery])  # (n, D)
        self.middle = features.mean(0)
        self.features = unit_rows(features - self.middle)
        self.projections = unit_rows(self.space.project_features(features))

    def read_files(self) -> None:
        """Read the files of ``--gallery``."""
        names, self.skipped = find_inputs(self.config.gallery)
        for name, path in progress(names.items(), text="reading the gallery", unit="files"):
            if (item := self.read_shape(path)) is not None:
                self.gallery.append(item._replace(name=name))

    def read_pairs(self) -> None:
        """Read the shapes of the pairs of ``--data_root``."""
        read, rows = open_pairs(self.config, self.space)
        self.source = read.source
        with progress(total=len(rows), text="reading the gallery", unit="shapes") as bar:
            for start in range(0, len(rows), self.config.batch_size):
                batch: list[tuple[int, np.ndarray]] = []
                for i in rows[start : start + self.config.batch_size]:
                    try:
                        batch.append((i, read.cloud(i)))
                    except DataError as error:
                        self.skipped[read.source.where(i)] = str(error)
                    bar.update()
                if not batch:
                    continue
                features = self.space.features_of(np.stack([points for _, points in batch]))
                for (i, points), feature in zip(batch, features, strict=True):
                    where = Path(read.source.where(i))
                    self.gallery.append(Prediction(read.source.ids[i], where, points[:0], features=feature))

    def points_to_draw(self, item: Prediction) -> np.ndarray:
        """Return the points of an item of the gallery; those of pairs are read again, and all of them."""
        whole = item.points if self.source is None else self.source.points(self.source.ids.index(item.name))
        return thinned(whole)

    def read_shape(self, path: Path) -> Prediction | None:
        """Read a shape and compute its features; None if it cannot be used."""
        try:
            # By the file's own name, so that a file is read alike as a query and in the gallery.
            return self.predictor.predict(path, path.stem)
        except (DataError, OSError) as error:
            self.skipped[str(path)] = str(error)
            return None

    def __call__(self, path: Path) -> Query | None:
        """Search by a file; None if it cannot be used."""
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            shape = self.read_shape(path)
            if shape is None:
                return None
            similarity = self.features @ unit_rows(shape.features[None] - self.middle)[0]
            return Query(path, None, shape.points, None, *self.best(similarity))
        try:
            photo = read_photo(path)
        except DataError as error:
            self.skipped[str(path)] = str(error)
            return None
        image, background = cut_out(photo)
        if background == "plain" and self.config.keep_background:
            image, background = photo, "kept"
        image = framed(image, fill=0.0 if background == "kept" else self.config.fill)
        projected = self.space.project_pictures([image])[self.space.branches[0]]
        picture = self.space.pixels.flatten(image).resize([self.space.image_size] * 2)
        return Query(path, picture, None, background, *self.best(self.projections @ unit_rows(projected)[0]))

    def best(self, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the most similar items, best first, and their similarity."""
        order = np.argsort(-similarity, kind="stable")[: self.config.top]
        return order, similarity[order]


def search(config: SearchConfig) -> dict[str, Any]:
    """Search ``--gallery`` by every ``--query``, print and draw what is found, and return it.

    Raises:
        CheckpointError: the checkpoint has no projection heads.
        DataError: no query, or no file of the gallery, can be used.
    """
    names, missing = find_inputs(config.query, suffixes=(*SUFFIXES, *PHOTO_SUFFIXES))
    if not names:
        raise DataError("; ".join(missing.values()))
    engine = Search(config)
    engine.skipped |= missing
    queries = [query for path in progress(names.values(), text="searching", unit="queries") if (query := engine(path))]
    if not queries:
        reasons = [*missing.values(), *(engine.skipped[str(path)] for path in names.values())]
        raise DataError(f"no query could be used: {'; '.join(reasons[:3])}")
    found = []
    for query in queries:
        kind = "shape" if query.picture is None else f"picture, background {query.background}"
        print(f"{query.path} ({kind})")
        items = [
            {"name": engine.gallery[i].name, "path": str(engine.gallery[i].path), "similarity": round(float(s), 4)}
            for i, s in zip(query.order, query.similarity, strict=True)
        ]
        for item in items:
            print(f"  {item['similarity']:6.3f}  {item['path']}")
        found.append({"query": str(query.path), "background": query.background, "found": items})
    if config.sheet:
        up = config.up or "y"
        draw_search(queries[: config.rows], engine, config.sheet, up=up, gallery_up=up if config.gallery else "y")
    return {
        "model_path": config.model_path,
        "gallery": [str(item.path) for item in engine.gallery],
        "queries": found,
        "skipped": engine.skipped,
    }


def draw_search(queries: Sequence[Query], engine: Search, path: str, *, up: str, gallery_up: str) -> None:
    """Draw every query beside what it found; the query's own file has a green frame."""
    columns = 1 + len(queries[0].order)
    figure = Figure(figsize=(1.5 * columns, 1.7 * len(queries)), layout="constrained")
    for row, query in zip(figure.subplots(len(queries), columns, squeeze=False), queries, strict=True):
        title = short_name(query.path.stem)
        if query.picture is None:
            draw_cloud(row[0], thinned(query.points), title=title, color=NEUTRAL, up=up)
        else:
            draw_picture(row[0], query.picture, title=title, color=NEUTRAL)
        for axes, i, similarity in zip(row[1:], query.order, query.similarity, strict=True):
            item = engine.gallery[i]
            color = RIGHT if item.path.resolve() == query.path.resolve() else NEUTRAL
            title = f"{short_name(item.name)}\n{similarity:.2f}"
            draw_cloud(axes, engine.points_to_draw(item), title=title, color=color, up=gallery_up)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure or search; return what ``--json`` writes.

    Raises:
        DataError: nothing could be used.
        UserError: a wrong setting, file or checkpoint.
    """
    config = SearchConfig.from_flags(SearchConfig.parser().parse_args(argv))
    log_to_screen()
    if config.sheet:
        check_output_path(config.sheet, PICTURE_TYPES)
    if config.json:
        check_output_path(config.json)
    result = search(config) if config.query else measure(config)
    for message in result["skipped"].values():
        print(f"skipped: {message}")
    write_json(config.json, result)
    return result


if __name__ == "__main__":
    run(main, failed=lambda result: result["skipped"])
