"""Turn a folder of your own meshes or clouds into pretraining pairs: point clouds with color pictures.

Reads meshes (OFF, OBJ with materials, PLY, GLB, GLTF, STL) and clouds (PLY, PCD, XYZ, PTS, NPY, LAS) below --meshes and
writes <out>/ShapeNet/<category>/<id>.ply, points drawn uniformly by area and centered in the unit sphere, and
<out>/ShapeNetRendering/<category>/<id>/rendering/00.png, 01.png, ... on a transparent background, with cameras.json.
The category comes from --labels, or is the first folder below --meshes (00000000 for files directly in it); the id is
the rest of the path joined by '-'. With two or more categories, <out>/labeled_hdf5 holds the clouds with their labels,
for the linear SVM. Unusable files are skipped, counted, printed with the reason, and listed in
<out>/prepared_report.tsv. The same command continues a stopped run; pairs of different settings are never mixed.

Rendering needs OpenGL, not a display; on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri.

Example:
  python -m data.prepare_meshes --meshes ~/models --out data/mine
  python -m data.check_data --data_root data/mine
  python train_crossnet_con.py --data_root data/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from data.pair_folder import PairFolder, PairPaths, PairSettings, make_pair, read_source, write_labeled
from data.rendering.renderer import Renderer, create_context
from data.shape_files import ShapeFile, find_shapes, split_shapes
from datasets.own_clouds import LABELED_FOLDER
from utils.cli import positive_int, run, share, write_json
from utils.errors import DataError, UserError
from utils.files import writing
from utils.locks import locked
from utils.processes import available_cores, worker_pool
from utils.progress import progress

REPORT_NAME = "prepared_report.tsv"
_QUEUE = 8  # files handed out per process ahead of time
_NOTES_SHOWN = 20


class Outcome(NamedTuple):
    """The result for one file: notes if it became a pair, or the reason why it was refused."""

    notes: list[str]
    refused: str | None = None


@dataclass(frozen=True)
class _Worker:
    """State that a process keeps between files."""

    paths: PairPaths
    settings: PairSettings
    renderer: Renderer | None


_worker: _Worker | None = None


def needs_renderer(settings: PairSettings) -> bool:
    """Return whether OpenGL is needed."""
    return settings.views > 0 or settings.remove_interior


def _start_worker(root: Path, settings: PairSettings) -> None:
    """Create this process's renderer."""
    global _worker
    renderer = None
    if needs_renderer(settings):
        renderer = Renderer(settings.image_size, samples=settings.samples)
    _worker = _Worker(PairPaths(root), settings, renderer)


def _work(shape: ShapeFile) -> Outcome:
    """Make and write the pair of one file."""
    assert _worker is not None, "runs in a process that _start_worker has prepared"
    paths = _worker.paths
    try:
        refused = None
        try:
            pair = make_pair(read_source(shape.path), shape.name, _worker.settings, _worker.renderer)
        except DataError as error:
            refused = str(error)
        except MemoryError:
            refused = f"{shape.path} does not fit into memory"
        if refused is not None:
            paths.remove(shape.name)
            return Outcome([], refused)
        paths.write(shape.name, pair)
        return Outcome(pair.notes)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or paths.root}: {error.strerror or error}") from error


def make_pairs(folder: PairFolder, shapes: Sequence[ShapeFile], *, workers: int) -> Iterator[tuple[ShapeFile, Outcome]]:
    """Make pairs in ``workers`` processes; yield each file with its outcome, in the order of completion.

    Raises:
        UserError: a pair cannot be written, or a process ended.
    """
    arguments = folder.root, folder.settings
    # Spawn, not fork: an OpenGL context does not survive a fork.
    with worker_pool(min(workers, len(shapes)), get_context("spawn"), _start_worker, arguments) as pool:
        waiting = list(reversed(shapes))
        running: dict[Future[Outcome], ShapeFile] = {}
        try:
            while waiting or running:
                while waiting and len(running) < _QUEUE * workers:
                    shape = waiting.pop()
                    folder.record(shape)
                    running[pool.submit(_work, shape)] = shape
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running[done], done.result()
                    del running[done]
        except BrokenProcessPool as error:
            suspects = ", ".join(str(shape.path) for shape in list(running.values())[: 2 * workers])
            raise UserError(
                f"a process ended abruptly, perhaps out of memory, at one of {suspects}; start again with fewer "
                "--workers (finished pairs are kept) or move that file away"
            ) from error
        finally:
            for future in running:
                future.cancel()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = PairSettings.parser(__doc__, prog="python -m data.prepare_meshes")
    parser.add_argument("--meshes", required=True, metavar="DIR", help="meshes or clouds, in a folder per category")
    parser.add_argument("--out", required=True, metavar="DIR", help="data root to write")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="FILE",
        help="categories: lines 'name category [train|test]', or the Princeton Shape Benchmark's .cla files",
    )
    parser.add_argument(
        "--test_fraction",
        type=share,
        default=0.2,
        metavar="F",
        help="fraction of each category for testing, if neither folders nor labels give a split",
    )
    workers = {"type": positive_int, "default": available_cores(), "metavar": "W"}
    parser.add_argument("--workers", **workers, help="processes; does not change the result")
    parser.add_argument("--overwrite", action="store_true", help="remake existing pairs")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Convert a folder of meshes and clouds; return counts and the skipped files."""
    args = parse_args(argv)
    settings = PairSettings.from_flags(args)
    folder = PairFolder(Path(args.out), settings, overwrite=args.overwrite)
    written = [folder.paths.cloud(name) for name in folder.records]
    shapes = find_shapes(Path(args.meshes), [Path(path) for path in args.labels], written=written)
    todo = [shape for shape in shapes if not folder.is_done(shape)]
    for shape in todo:
        folder.check_free(shape)
    report: dict[str, Any] = {"written": 0, "kept": len(shapes) - len(todo), "skipped": [], "noted": []}
    refused: list[tuple[ShapeFile, str]] = []
    if todo:
        if needs_renderer(settings):
            create_context().release()  # report missing OpenGL once, before the workers start
        with writing(folder.root):
            folder.root.mkdir(parents=True, exist_ok=True)
        bar = progress(total=len(todo), text="making pairs", unit="shapes")
        with locked(folder.root), bar:
            folder.begin()
            for shape, outcome in make_pairs(folder, todo, workers=args.workers):
                bar.update()
                if outcome.refused is not None:
                    refused.append((shape, outcome.refused))
                    continue
                folder.record(shape, outcome.notes)
                report["written"] += 1
    finish(folder, shapes, refused, report, test_fraction=args.test_fraction)
    write_json(args.json, report)
    return report


def finish(
    folder: PairFolder,
    shapes: Sequence[ShapeFile],
    refused: list[tuple[ShapeFile, str]],
    report: dict[str, Any],
    *,
    test_fraction: float,
) -> None:
    """Report the refused files and write the labeled clouds."""
    refused.sort(key=lambda item: item[0].name)
    report["skipped"] = [reason for _, reason in refused]
    left_out = {shape.name for shape, _ in refused}
    usable = [shape for shape in shapes if shape.name not in left_out]
    report["noted"] = [f"{s.path}: {note}" for s in usable for note in folder.records[s.name]["notes"]]
    for message in report["skipped"]:
        print(f"left out: {message}")
    for message in report["noted"][:_NOTES_SHOWN]:
        print(f"note: {message}")
    if len(report["noted"]) > _NOTES_SHOWN:
        print(f"note: {len(report['noted']) - _NOTES_SHOWN} more in {folder.root / REPORT_NAME}")
    if not usable:
        raise DataError(f"none of the {len(shapes)} files could be used, for the reasons printed as 'left out'")
    rows = [("file", "result", "reason"), *((str(shape.path), "left out", reason) for shape, reason in refused)]
    rows += [(str(s.path), "note", note) for s in usable for note in folder.records[s.name]["notes"]]
    text = "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)
    with writing(folder.root / REPORT_NAME):
        (folder.root / REPORT_NAME).write_text(text, encoding="utf-8")
    settings = folder.settings
    here = {shape.name for shape in shapes}
    report["earlier"] = [n for n in folder.records if n not in here and folder.paths.cloud(n).exists()]
    if report["earlier"]:
        print(
            f"note: {folder.root} also holds {len(report['earlier'])} pairs of earlier calls, whose files are not "
            f"among those of this one, such as {report['earlier'][0]}; pretraining uses them too"
        )
    print(
        f"{folder.root}: {report['written']:,} pairs of {settings.num_points:,} points and {settings.views} views "
        f"written, {report['kept']} kept, {len(refused)} files left out"
    )
    sides = split_shapes(usable, test_fraction=test_fraction, seed=settings.seed)
    classes = {shape.category for shape in sides["train"]} & {shape.category for shape in sides["test"]}
    if len(classes) > 1:
        sides = {side: [s for s in chosen if s.category in classes] for side, chosen in sides.items()}
        report["classes"] = write_labeled(folder, sides)
        train, test = (len(sides[side]) for side in ("train", "test"))
        print(
            f"{folder.root / LABELED_FOLDER}: {len(classes)} classes, {train} clouds for training, {test} for testing"
        )
        if missing := sorted({shape.category for shape in usable if shape.labeled} - classes):
            print(f"without a cloud for training and one for testing, so left out there: {', '.join(missing)}")


if __name__ == "__main__":
    run(main)
