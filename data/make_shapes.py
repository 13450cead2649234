"""Make pretraining pairs without any data: generated shapes, their points and pictures, in one packed file.

A shape is a union of 1 to 9 simple solids (docs/generated_shapes.md is the recipe); its cloud and its pictures are a
function of its number and the settings. --out can be used directly as --data_root. The same command continues a
stopped run. Pictures are rendered with OpenGL, or splatted from surface points without it; the file records which.

Examples:
  python -m data.make_shapes --shapes 20000 --out data/shapes.h5 --sheet shapes.png
  python train_crossnet_con.py --data_root data/shapes.h5
  python -m data.make_shapes --shapes 2000 --out data/shapes.h5 --part_set data/shapes_parts
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from data.procedural import KINDS, LEVELS, compose, sample_visible
from data.procedural.compose import SurfaceSamples, generator
from data.procedural.pictures import LIGHT, mesh_of, splat_count, splat_views
from data.rendering import Camera, Renderer, cameras_3d_r2n2, encode_png
from datasets.shape_reader import to_unit_sphere
from utils.cli import Settings, flag, non_negative_int, positive_int, run, seed_number, write_json
from utils.errors import UserError, malformed
from utils.files import replacing, writing
from utils.locks import locked
from utils.processes import available_cores, run_jobs
from utils.progress import progress

CATEGORY = "generated"
# A stopped run continues after the last complete block; larger blocks would lose more work.
BLOCK = 50
SAMPLES = 4  # per pixel
SHEET_SHAPES, SHEET_COLUMNS, SHEET_CELL = 60, 10, 112
PART_CATEGORY, PART_SYNSET = "Generated", "99000000"
PART_FOLDER, PART_FILE_SHAPES = "shapenet_part_seg_hdf5_data", 2048
# Far apart in hue, in the order of KINDS.
KIND_COLORS = np.array(
    [[31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75], [227, 119, 194],
     [188, 189, 34]], np.uint8,
)  # fmt: skip


@dataclass(frozen=True)
class ShapeSettings(Settings):
    """Everything that determines the cloud and the pictures of a shape."""

    seed: int = flag(1, type=seed_number, metavar="S", help="seed of the shapes")
    level: int = flag(
        max(LEVELS),
        type=int,
        choices=tuple(LEVELS),
        help="; ".join(f"{level}: {text}" for level, text in LEVELS.items()),
    )
    num_points: int = flag(2048, type=positive_int, metavar="N", help="points per cloud")
    views: int = flag(1, type=positive_int, metavar="V", help="pictures per shape")
    image_size: int = flag(137, type=positive_int, metavar="PIXELS", help="side of a picture")
    pictures: str = flag(
        "auto", choices=("auto", "opengl", "splats"), help="how to make pictures; auto: OpenGL if it works, else splats"
    )


def make_shape(number: int, settings: ShapeSettings, renderer: Renderer | None) -> dict[str, Any]:
    """Make one shape; a pure function of its number and the settings.

    Args:
        number: of the shape.
        settings: of the set.
        renderer: with the set's picture size; None means splats.

    Returns:
        ``points`` (N, 3), ``part_kind`` (N,), ``part_number`` (N,), ``cameras`` (V, 2), ``images``: V PNG files.
    """
    shape = compose(settings.seed, number, settings.level)
    # A separate stream: the number of points must not change the other random choices.
    rng = np.random.default_rng([settings.seed, number, 1])
    samples = sample_visible(shape, settings.num_points, rng)
    cameras = cameras_3d_r2n2(settings.views, int(generator(settings.seed, number).integers(1 << 31)))
    if renderer is not None:
        pictures = renderer.views(mesh_of(shape), cameras)
    else:
        dense = sample_visible(shape, splat_count(settings.image_size), rng)
        pictures = splat_views(dense, shape.color_at(dense.points, dense.number), cameras, size=settings.image_size)
    return {
        "points": to_unit_sphere(samples.points).astype(np.float32),
        "part_kind": samples.kind,
        "part_number": samples.number,
        "cameras": np.array([[camera.azimuth, camera.elevation] for camera in cameras], np.float32),
        "images": [encode_png(picture) for picture in pictures],
    }


_renderer: Renderer | None = None  # one per worker process, which keeps its OpenGL context


def _open_renderer(settings: ShapeSettings) -> None:
    global _renderer
    _renderer = Renderer(settings.image_size, samples=SAMPLES) if settings.pictures == "OpenGL" else None


def _start_process(settings: ShapeSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: end at once, without a traceback
    _open_renderer(settings)


def _make_block(first: int, last: int, settings: ShapeSettings, path: str) -> str:
    """Make shapes first to last - 1 and write their arrays to a file: pictures as ``images`` and their ``lengths``."""
    made = [make_shape(number, settings, _renderer) for number in range(first, last)]
    images = [image for shape in made for image in shape["images"]]
    arrays = {name: np.stack([shape[name] for shape in made]) for name in made[0] if name != "images"}
    arrays["images"] = np.frombuffer(b"".join(images), np.uint8)
    arrays["lengths"] = np.array([len(image) for image in images], np.int64)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return path


def choose_pictures(wanted: str) -> str:
    """Return ``"OpenGL"`` or ``"splats"``.

    Args:
        wanted: ``"opengl"``, ``"splats"``, or ``"auto"``: OpenGL if it works here.

    Raises:
        UserError: OpenGL is wanted and does not work; the message names the package.
    """
    if wanted == "splats":
        return "splats"
    try:
        Renderer(8, samples=1).release()
    except UserError as error:
        if wanted == "opengl":
            raise
        print(f"pictures are splatted from surface points: {error}", file=sys.stderr)
        return "splats"
    return "OpenGL"


def open_work_folder(out: Path, settings: ShapeSettings) -> Path:
    """Return the folder of the finished blocks, which a stopped run leaves next to ``--out``.

    Raises:
        UserError: it holds shapes with other settings, or cannot be written.
    """
    folder = out.with_name(out.name + ".blocks")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    text = json.dumps(asdict(settings))
    if note.exists() and note.read_text() != text:
        raise UserError(
            f"{folder} holds the beginning of a set with other settings ({note.read_text()}); delete the folder, or "
            "give the same settings to continue"
        )
    note.write_text(text)
    return folder


def make_blocks(folder: Path, count: int, settings: ShapeSettings, *, workers: int) -> list[Path]:
    """Make the missing blocks in ``workers`` processes; 0 means this process."""
    jobs, paths = [], []
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        path = folder / f"{first:08d}_{last:08d}.npz"
        paths.append(path)
        if not path.exists():
            jobs.append((first, last, settings, str(path)))
    there = count - sum(last - first for first, last, *_ in jobs)
    with progress(total=count, initial=there, text="shapes", unit="shapes") as bar:
        for path in _run_jobs(jobs, settings, workers=min(workers, len(jobs))):
            first, last = Path(path).stem.split("_")
            bar.update(int(last) - int(first))
    return paths


def _run_jobs(
    jobs: list[tuple[int, int, ShapeSettings, str]], settings: ShapeSettings, *, workers: int
) -> Iterator[str]:
    if not jobs:
        return
    if workers == 0:
        _open_renderer(settings)
        yield from starmap(_make_block, jobs)
        return
    # Spawn, not fork: an OpenGL context does not survive a fork.
    context = multiprocessing.get_context("spawn")
    yield from run_jobs(
        _make_block, jobs, workers=workers, context=context, initializer=_start_process, initargs=(settings,)
    )


def write_packed(out: Path, paths: list[Path], count: int, settings: ShapeSettings) -> dict[str, int]:
    """Join blocks into a packed file of pairs (docs/datasets.md), atomically.

    Returns:
        Numbers of shapes, views and points, and the size of the images in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    from datasets.pair_sources import PACKED_FORMAT, PACKED_VERSION  # loads PyTorch, which the workers do not need

    views, points = settings.views, settings.num_points
    with replacing(out) as temporary:
        lengths = []
        for path in paths:
            again = "Delete it and run the same command again"
            with malformed(f"{path} is damaged", fix=again), np.load(path) as arrays:
                lengths.append(arrays["lengths"])
        offset = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        with h5py.File(temporary, "w") as file:
            file.attrs.update({"format": PACKED_FORMAT, "version": PACKED_VERSION, "source": "data.make_shapes"})
            file.attrs.update({name: value for name, value in asdict(settings).items()})
            text = h5py.string_dtype()
            file.create_dataset("ids", data=[f"{CATEGORY}/{number:08d}" for number in range(count)], dtype=text)
            file.create_dataset("unpaired", data=[], dtype=text, shape=(0,))
            names = [f"{view:02d}.png" for view in range(views)]
            file.create_dataset("view_names", data=names * count, dtype=text)
            file["view_offset"] = views * np.arange(count + 1, dtype=np.int64)
            file["image_offset"] = offset
            file.create_dataset("part_kinds", data=list(KINDS), dtype=text)
            stored = {
                "points": file.create_dataset("points", (count, points, 3), dtype=np.float32),
                "part_kind": file.create_dataset("part_kind", (count, points), dtype=np.uint8),
                "part_number": file.create_dataset("part_number", (count, points), dtype=np.uint8),
                "cameras": file.create_dataset("cameras", (count, views, 2), dtype=np.float32),
            }
            images = file.create_dataset("image_bytes", (int(offset[-1]),), dtype=np.uint8)
            first = 0
            for path in paths:
                with np.load(path) as block:
                    last = first + len(block["lengths"]) // views
                    for name, dataset in stored.items():
                        dataset[first:last] = block[name]
                    images[offset[first * views] : offset[last * views]] = block["images"]
                first = last
    return {"shapes": count, "views": count * views, "points": points, "image_bytes": int(offset[-1])}


def check_part_set(root: Path, count: int) -> None:
    """Check that a part data set of ``count`` shapes can be written to a data root.

    Raises:
        UserError: it exists already, or there are too few shapes for three splits.
    """
    if (root / PART_FOLDER).exists():
        raise UserError(f"{root / PART_FOLDER} exists; move it away, or give another --part_set")
    if count < 10:
        raise UserError(f"--part_set needs at least 10 shapes for its three splits, --shapes is {count}")


def write_part_set(packed: Path, root: Path) -> dict[str, int]:
    """Write a part data set in the layout of ShapeNetPart's HDF5 release; the parts are the kinds of solids.

    Of every ten shapes, by number, eight are for training, one for validation, one for testing.

    Args:
        packed: file written by this script.
        root: data root to write; the set goes to ``shapenet_part_seg_hdf5_data`` there.

    Returns:
        The number of shapes in each split.

    Raises:
        UserError: the files cannot be written.
    """
    folder = root / PART_FOLDER
    counts = {}
    with h5py.File(packed, "r") as file, writing(folder), contextlib.ExitStack() as cleanup:
        count = len(file["points"])
        tenth = np.arange(count) % 10
        rows = {
            "train": np.flatnonzero(tenth < 8),
            "val": np.flatnonzero(tenth == 8),
            "test": np.flatnonzero(tenth == 9),
        }
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for split, chosen in rows.items():
            names = []
            for i in range(0, len(chosen), PART_FILE_SHAPES):
                some = chosen[i : i + PART_FILE_SHAPES]
                names.append(f"ply_data_{split}{len(names)}.h5")
                with h5py.File(temporary / names[-1], "w") as part:
                    part["data"] = file["points"][some]
                    part["label"] = np.zeros((len(some), 1), np.uint8)
                    part["pid"] = file["part_kind"][some]
            (temporary / f"{split}_hdf5_file_list.txt").write_text("\n".join(names) + "\n")
            counts[split] = len(chosen)
        (temporary / "all_object_categories.txt").write_text(f"{PART_CATEGORY}\t{PART_SYNSET}\n")
        parts = [[PART_SYNSET, i + 1] for i in range(len(KINDS))]
        (temporary / "overallid_to_catid_partid.json").write_text(json.dumps(parts))
        (temporary / "part_names.txt").write_text("\n".join(KINDS) + "\n")
        os.replace(temporary, folder)
    return counts


def draw_sheet(packed: Path, path: Path) -> None:
    """Draw the first shapes of a packed file: a picture of each, and below it its cloud, colored by kind of solid."""
    with h5py.File(packed, "r") as file:
        count = min(SHEET_SHAPES, len(file["points"]))
        cells = []
        for i in range(count):
            view = file["view_offset"][i]
            data = file["image_bytes"][file["image_offset"][view] : file["image_offset"][view + 1]]
            picture = Image.open(io.BytesIO(data.tobytes())).convert("RGBA").resize((SHEET_CELL, SHEET_CELL))
            cells.append((picture, _draw_cloud(file["points"][i], file["part_kind"][i], file["cameras"][i, 0])))
    rows = -(-count // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_CELL, 2 * rows * SHEET_CELL), "white")
    for i, (picture, cloud) in enumerate(cells):
        x, y = i % SHEET_COLUMNS * SHEET_CELL, i // SHEET_COLUMNS * 2 * SHEET_CELL
        sheet.paste(picture, (x, y), picture)
        sheet.paste(cloud, (x, y + SHEET_CELL), cloud)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
    except ValueError as error:  # no format of that suffix
        raise UserError(f"cannot write {path}: {error}") from error


def _draw_cloud(points: np.ndarray, kind: np.ndarray, camera: np.ndarray) -> Image.Image:
    """Draw a cloud (N, 3) as the camera (azimuth, elevation) sees it."""
    samples = SurfaceSamples(points.astype(float), np.tile(LIGHT, (len(points), 1)), kind, kind)
    view = Camera(float(camera[0]), float(camera[1]))
    pixels = splat_views(samples, KIND_COLORS[kind] / 255, [view], size=SHEET_CELL // 2)[0]
    return Image.fromarray(pixels).resize((SHEET_CELL, SHEET_CELL), Image.Resampling.NEAREST)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = ShapeSettings.parser(__doc__, prog="python -m data.make_shapes")
    parser.add_argument("--shapes", type=positive_int, required=True, metavar="N", help="number of shapes")
    parser.add_argument("--out", required=True, metavar="F.h5", help="packed file of pairs to write")
    parser.add_argument(
        "--workers", type=non_negative_int, default=available_cores(), metavar="W", help="processes; 0: this one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--sheet", metavar="F.png", help="also draw a contact sheet of the first shapes")
    parser.add_argument(
        "--part_set",
        metavar="DIR",
        help="also write a part data set to this data root, in ShapeNetPart's layout; parts are the kinds of solids",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make a set of shapes; return counts.

    Raises:
        UserError: a setting is wrong, or a file exists or cannot be written.
    """
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; --overwrite replaces it")
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out names the file to write, such as {out / 'shapes.h5'}")
    if args.sheet and Path(args.sheet).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--sheet {args.sheet}: the name must end as a picture's, such as .png")
    if args.part_set:
        check_part_set(Path(args.part_set), args.shapes)
    settings = replace(ShapeSettings.from_flags(args), pictures=choose_pictures(args.pictures))
    start = time.perf_counter()
    with locked(out):
        folder = open_work_folder(out, settings)
        paths = make_blocks(folder, args.shapes, settings, workers=args.workers)
        seconds = time.perf_counter() - start
        counts: dict[str, Any] = write_packed(out, paths, args.shapes, settings)
        shutil.rmtree(folder)
    print(
        f"{out}: {args.shapes:,} shapes of {args.num_points:,} points, views of each: {args.views} "
        f"({settings.pictures}), level {args.level}, seed {args.seed}; {seconds:.0f} s"
    )
    if args.part_set:
        counts["part_set"] = write_part_set(out, Path(args.part_set))
        print(f"{args.part_set}: part data set, shapes by split: {counts['part_set']}")
    if args.sheet:
        draw_sheet(out, Path(args.sheet))
    counts |= {"seconds": seconds, "settings": asdict(settings)}
    write_json(args.json, counts)
    return counts


if __name__ == "__main__":
    run(main)
