"""Cut the raw rooms of S3DIS into blocks for training and for scoring whole rooms.

The raw rooms are the folder Stanford3dDataset_v1.2_Aligned_Version: Area_1/office_3/Annotations/chair_1.txt and so on,
one file per object, "x y z red green blue" on each line. Output, with 4,096 points per block:

  OUT/indoor3d_sem_seg_hdf5_data        training: blocks of 1 m every 0.5 m with random points, used by
                                        main_semseg.py for training and the released protocol
  OUT/indoor3d_sem_seg_hdf5_data_test   whole rooms: adjacent blocks of 1 m that contain every point of a room at
                                        least once, with its number, used by main_semseg.py to score rooms

Every room is one file, which appears when it is complete: after an interruption, run the same command again to make
only the missing rooms. The lists all_files.txt and room_filelist.txt are written last.

commands:
  python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version --out data --workers 8
  python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version --out data --areas 5 --only test
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import starmap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from datasets.hdf5 import hdf5_file
from datasets.s3dis import AREAS, BLOCK_FOLDER, CHANNELS, CLASS_NAMES, FILE_LIST, ROOM_FOLDER, ROOM_LIST, area_of
from datasets.shapenet_part import draw_rows
from utils.cli import Settings, flag, positive_int, run, write_json
from utils.errors import DataError, UserError
from utils.files import data_files, has_data_files, replacing
from utils.processes import run_jobs
from utils.progress import progress

BLOCK_FORMAT, BLOCK_VERSION = "crossnet-s3dis", 1
KINDS = {"train": BLOCK_FOLDER, "test": ROOM_FOLDER}
RAW_NAME = "Stanford3dDataset_v1.2_Aligned_Version"
AGAIN = "Unpack the raw data set again"
MAX_DISTANCE = 500  # a point farther from its room's center (in meters) would cut the room into millions of blocks
_STRAY = re.compile(r"[^\x20-\x7e\t\r]+")  # control and non-ASCII characters, invalid in a text file of numbers
_LINE = 'six numbers, "x y z red green blue", colors in 0..255'


@dataclass(frozen=True)
class BlockSettings(Settings):
    """How rooms are cut; the draws depend on the seed and the room's name alone."""

    num_points: int = flag(
        4096,
        group="blocks (the defaults are those of the published blocks)",
        type=positive_int,
        metavar="N",
        help="points per block",
    )
    block: float = 1.0  # side of a block in meters
    stride: float = flag(0.5, type=float, metavar="M", help="distance between training blocks in meters")
    min_points: int = flag(100, type=int, metavar="N", help="drop training blocks with fewer points")
    seed: int = flag(1, type=int, metavar="S", help="random seed")
    dtype: str = "float32"  # of the stored values; float16 halves the files and keeps 3 digits


@dataclass(frozen=True)
class Room:
    """One room.

    Attributes:
        name: such as ``Area_1_office_3``.
        xyz: (M, 3) float64 meters, as in the raw files.
        rgb: (M, 3) float32 in 0..255.
        labels: (M,) uint8 classes.
        notes: oddities in the files that could be repaired.
    """

    name: str
    xyz: np.ndarray
    rgb: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()


# --- reading the raw rooms ---


def _numbers(line: str) -> list[float] | None:
    """Parse six finite numbers with colors in range, or return None (also for ``1_0``, which ``float`` accepts)."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return None
    good = (
        "_" not in line
        and len(values) == 6
        and all(map(math.isfinite, values))
        and all(0 <= v <= 255 for v in values[3:])
    )
    return values if good else None


def _repair(line: str) -> tuple[list[float] | None, str]:
    """Read a line with a stray character instead of a space or between the digits of a number."""
    for replacement, reading in ((" ", "a space"), ("", "nothing")):
        if values := _numbers(_STRAY.sub(replacement, line)):
            return values, reading
    return None, ""


def read_annotation(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read the points of one object.

    One published file has a control character in a line. Such a character, or a non-ASCII one, is read as a space or
    dropped, whichever gives six numbers, and noted. Any other deviation is an error.

    Returns:
        (M, 6) float64, x, y, z and red, green, blue in 0..255; and the notes.

    Raises:
        DataError: the file cannot be read, or a line is malformed; the message names the line.
    """
    try:
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    try:
        if _STRAY.search(text.replace("\n", " ")) is None and text.strip():
            values = np.loadtxt(StringIO(text), dtype=np.float64, comments=None, ndmin=2)
            if values.shape[1] == 6 and np.isfinite(values).all() and _in_range(values[:, 3:]):
                return values, []
    except ValueError:
        pass  # the loop below finds the malformed line
    rows, notes = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        values = _numbers(line)
        if values is None or _STRAY.search(line):
            values, reading = _repair(line) if _STRAY.search(line) else (None, "")
            if values is None:
                raise DataError(f"{path}, line {number} is {line[:80]!r}; expected {_LINE}", fix=AGAIN)
            notes.append(f"{path}, line {number}: stray {_STRAY.search(line).group()!r} read as {reading}")
        rows.append(values)
    return np.array(rows, dtype=np.float64).reshape(-1, 6), notes


def _in_range(colors: np.ndarray) -> bool:
    return bool(colors.min() >= 0 and colors.max() <= 255)


def annotation_files(folder: Path) -> list[Path]:
    """Return the files of a room's objects, sorted.

    Raises:
        DataError: the room has no objects.
    """
    files = data_files(folder / "Annotations", "*.txt")
    if not files:
        raise DataError(f"{folder}/Annotations has no objects (expected chair_1.txt and so on)", fix=AGAIN)
    return files


def class_of(path: Path) -> int:
    """Return the class of an object from its file name, such as ``chair_1.txt``; unknown names are clutter."""
    name = path.stem.split("_")[0].lower()
    return CLASS_NAMES.index(name if name in CLASS_NAMES else "clutter")


def read_room(folder: Path, name: str) -> Room:
    """Read one room, object by object.

    Raises:
        DataError: a file is damaged, or the room has no points.
    """
    parts, labels, notes = [], [], []
    files = annotation_files(folder)
    for file in files:
        values, odd = read_annotation(file)
        parts.append(values)
        labels.append(np.full(len(values), class_of(file), dtype=np.uint8))
        notes += odd
    values = np.concatenate(parts)
    if not len(values):
        raise DataError(f"{folder} has no points", fix=AGAIN)
    # One outlier would cut the room into millions of blocks.
    middle = np.median(values[:, :3], axis=0)
    for file, part in zip(files, parts, strict=True):
        if len(part) and (distance := np.abs(part[:, :3] - middle).max()) > MAX_DISTANCE:
            raise DataError(f"{file} has a point {distance:g} m from the center of its room", fix=AGAIN)
    return Room(name, values[:, :3], values[:, 3:].astype(np.float32), np.concatenate(labels), tuple(notes))


def find_rooms(raw: Path, areas: tuple[int, ...]) -> dict[str, Path]:
    """Return the folder of every room by its name, such as ``Area_1_office_3``, sorted.

    Args:
        raw: the folder with ``Area_1`` and so on, or its parent.
        areas: the areas.

    Raises:
        DataError: an area is missing or has no rooms.
    """
    root = raw if data_files(raw, "Area_*") or not (raw / RAW_NAME).is_dir() else raw / RAW_NAME
    rooms: dict[str, Path] = {}
    for area in sorted(areas):
        folder = root / f"Area_{area}"
        found = [f for f in data_files(folder) if f.is_dir()]
        if not found:
            _name_areas_found(root, area)
            raise DataError(
                f"no rooms in {folder}; --raw must be the unpacked {RAW_NAME} (Area_{area}/office_1/Annotations/*.txt "
                "and so on)",
                fix="Request it at http://buildingparser.stanford.edu/dataset.html",
            )
        rooms |= {f"Area_{area}_{f.name}": f for f in found}
    return rooms


def _name_areas_found(root: Path, missing: int) -> None:
    """Raise an error that names the areas that exist and the flags to use them; return if there are none."""
    there = [number for number in AREAS if has_data_files(root / f"Area_{number}", "*/Annotations/*.txt")]
    if there:
        names = ", ".join(f"Area_{number}" for number in there)
        flag = " ".join(map(str, there))
        raise DataError(f"no rooms in {root / f'Area_{missing}'}; {root} holds {names}: cut these with --areas {flag}")
    if re.fullmatch(r"Area_\d", root.name) and has_data_files(root, "*/Annotations/*.txt"):
        raise DataError(f"{root} is one area; --raw takes its parent: --raw {root.parent} --areas {root.name[5:]}")


# --- cutting ---


def block_starts(extent: float, *, block: float, stride: float) -> list[float]:
    """Return the lower ends of blocks that cover 0..extent at every ``stride``, like the published blocks."""
    return [i * stride for i in range(max(1, math.ceil((extent - block) / stride) + 1))]


def cut(xyz: np.ndarray, starts: tuple[list[float], list[float]], block: float) -> Iterator[np.ndarray]:
    """Yield the indices of the points of each block, in order of x, then y; both ends of a block are inclusive.

    Args:
        xyz: (M, 3) meters from the room's lower corner.
        starts: lower ends of the blocks in x and in y.
        block: side of a block.
    """
    side = block + 1e-9  # otherwise rounding can lose points between the last block and the wall
    order = np.argsort(xyz[:, 0], kind="stable")
    sorted_x = xyz[order, 0]
    for x in starts[0]:
        begin, end = np.searchsorted(sorted_x, x, side="left"), np.searchsorted(sorted_x, x + side, side="right")
        strip = order[begin:end]
        strip = strip[np.argsort(xyz[strip, 1], kind="stable")]
        sorted_y = xyz[strip, 1]
        for y in starts[1]:
            begin, end = np.searchsorted(sorted_y, y, side="left"), np.searchsorted(sorted_y, y + side, side="right")
            yield np.sort(strip[begin:end])


def block_values(xyz: np.ndarray, rgb: np.ndarray, extent: np.ndarray, block: float) -> np.ndarray:
    """Return the nine values of the points of a block.

    Args:
        xyz: (N, 3) meters from the room's lower corner.
        rgb: (N, 3) in 0..255.
        extent: (3,) of the room, in meters.
        block: side of a block in meters.

    Returns:
        (N, 9) float64: x and y relative to the block's center and z; red, green, blue in 0..1; x, y, z divided by the
        extent. The center is half a side from the lowest x and y of these points, as in the published blocks.
    """
    local = xyz.copy()
    local[:, :2] -= local[:, :2].min(axis=0) + block / 2
    # Without the maximum, a flat room (extent 0 along an axis) would give NaN.
    return np.concatenate([local, rgb / 255.0, xyz / np.maximum(extent, np.finfo(np.float32).tiny)], axis=1)


def choose_points(room: Room, kind: str, settings: BlockSettings) -> tuple[np.ndarray, list[np.ndarray]]:
    """Choose the points of every block of a room.

    Training blocks start at every ``stride`` and hold ``num_points`` random points, with repetitions if they have
    fewer. Test blocks are adjacent (the last of a row is shifted back into the room, so that it is not a thin strip);
    the points of each are dealt at random to as many blocks as necessary, the last one padded with repetitions.

    Args:
        room: the room.
        kind: ``"train"`` or ``"test"``.
        settings: how to cut.

    Returns:
        (M, 3) float64 points in meters from the room's lower corner, and for every block (num_points,) point indices.
    """
    generator = np.random.default_rng([settings.seed, zlib.crc32(f"{kind} {room.name}".encode())])
    xyz = room.xyz - room.xyz.min(axis=0)
    extent = xyz[:, :2].max(axis=0)
    size, side = settings.num_points, settings.block
    chosen = []
    if kind == "train":
        starts = tuple(block_starts(length, block=side, stride=settings.stride) for length in extent)
        for members in cut(xyz, starts, side):
            if len(members) >= settings.min_points:
                chosen.append(members[draw_rows(len(members), size, generator)])
        return xyz, chosen
    starts = tuple(
        [min(start, max(0.0, length - side)) for start in block_starts(length, block=side, stride=side)]
        for length in extent
    )
    for members in cut(xyz, starts, side):
        if len(members):
            dealt = members[draw_rows(len(members), len(members), generator)]
            filled = np.concatenate([dealt, generator.choice(members, -len(members) % size)])
            chosen += list(filled.reshape(-1, size))
    return xyz, chosen


# --- writing ---


def room_file(out: str | Path, kind: str, room: str) -> Path:
    """Return the file of a room's blocks."""
    return Path(out) / KINDS[kind] / f"ply_data_all_{room}.h5"


def _marks(kind: str, settings: BlockSettings, source: str) -> dict[str, Any]:
    """Return the attributes by which a finished file is recognized."""
    used = asdict(settings)
    if kind == "test":
        del used["stride"], used["min_points"]  # test blocks do not depend on them
    return {"format": BLOCK_FORMAT, "version": BLOCK_VERSION, "kind": kind, "source": source, **used}


def write_room(out: str | Path, room: Room, kind: str, settings: BlockSettings, *, source: str = "") -> Path:
    """Cut a room and write its blocks into one file, which appears when it is complete.

    The arrays are ``data`` (n, N, 9), ``label`` (n, N) uint8 and, for ``kind`` ``"test"``, ``index`` (n, N) int32, the
    point's number in the room. Each block is a separate chunk, so that it can be read alone. Attributes: ``room``,
    ``room_points``, ``room_low`` and ``room_high`` (corners of its bounding box in meters), ``notes`` and the settings.

    Args:
        out: the data root.
        room: the room.
        kind: ``"train"`` or ``"test"``.
        settings: how to cut.
        source: description of the raw files; if it changes, the file is made again.

    Returns:
        The file.

    Raises:
        UserError: it cannot be written.
    """
    xyz, chosen = choose_points(room, kind, settings)
    low, high = room.xyz.min(axis=0), room.xyz.max(axis=0)
    path = room_file(out, kind, room.name)
    count, size = len(chosen), settings.num_points
    with replacing(path, shared=True) as temporary, h5py.File(temporary, "w") as file:
        kept: dict[str, Any] = {"chunks": (1, size), "compression": "gzip", "compression_opts": 1}
        # A sparse room can have zero blocks; HDF5 accepts one-block chunks for that only if the array can grow.
        kept["maxshape"] = (None, size)
        data = file.create_dataset(
            "data",
            (count, size, CHANNELS),
            settings.dtype,
            **{**kept, "chunks": (1, size, CHANNELS), "maxshape": (None, size, CHANNELS), "shuffle": True},
        )
        label = file.create_dataset("label", (count, size), np.uint8, **kept)
        index = file.create_dataset("index", (count, size), np.int32, shuffle=True, **kept) if kind == "test" else None
        for i, members in enumerate(chosen):
            data[i] = block_values(xyz[members], room.rgb[members], high - low, settings.block)
            label[i] = room.labels[members]
            if index is not None:
                index[i] = members
        file.attrs.update(_marks(kind, settings, source))
        file.attrs.update({"room": room.name, "room_points": len(xyz), "room_low": low, "room_high": high})
        file.attrs["notes"] = "\n".join(room.notes)
    return path


def finished(path: Path, marks: dict[str, Any]) -> dict[str, Any] | None:
    """Return the counts of a finished room, or None if its file is missing, damaged or has other settings."""
    if not path.is_file():
        return None
    try:
        with hdf5_file(path) as file:
            if any(file.attrs.get(name) != value for name, value in marks.items()):
                return None
            blocks, notes = file["data"].shape[0], str(file.attrs["notes"])
            return {
                "points": int(file.attrs["room_points"]),
                "blocks": blocks,
                "notes": notes.split("\n") if notes else [],
            }
    except (OSError, KeyError):
        return None


def _foreign_files(folder: Path) -> list[Path]:
    """Return the block files in a folder that this module did not write."""
    foreign = []
    for path in data_files(folder, "ply_data_all_*.h5"):
        try:
            with hdf5_file(path) as file:
                if file.attrs.get("format") == BLOCK_FORMAT:
                    continue
        except OSError:
            if _is_room_file(path):
                continue  # ours but damaged: it is made again
        foreign.append(path)
    return foreign


def _is_room_file(path: Path) -> bool:
    return re.fullmatch(r"ply_data_all_Area_\d+_\S+\.h5", path.name) is not None


def write_lists(folder: str | Path) -> dict[str, int]:
    """Write ``all_files.txt`` and ``room_filelist.txt`` for all rooms in a folder, in the published form.

    Returns:
        Number of blocks of every room with blocks, in the order of the lists.

    Raises:
        DataError: a room's file is damaged.
        UserError: the lists cannot be written.
    """
    folder = Path(folder)
    blocks: dict[str, int] = {}
    for path in data_files(folder, "ply_data_all_Area_*.h5"):
        try:
            with hdf5_file(path) as file:
                blocks[str(file.attrs["room"])] = file["data"].shape[0]
        except (OSError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and make its room again") from error
    blocks = {room: blocks[room] for room in sorted(blocks, key=lambda r: (area_of(r), r)) if blocks[room]}
    lists = {
        ROOM_LIST: [room for room, count in blocks.items() for _ in range(count)],
        FILE_LIST: [f"{folder.name}/ply_data_all_{room}.h5" for room in blocks],
    }
    for name, lines in lists.items():
        with replacing(folder / name, shared=True) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return blocks


# --- the command ---


def prepare_room(name: str, folder: Path, out: Path, kinds: tuple[str, ...], settings: BlockSettings) -> dict[str, Any]:
    """Make the missing files of one room.

    Returns:
        ``name``, ``points``, ``notes``, ``made`` (whether a file was written) and the number of blocks of each kind.
    """
    files = annotation_files(folder)
    source = f"{len(files)} objects of {sum(f.stat().st_size for f in files)} bytes"
    result: dict[str, Any] = {"name": name, "made": False}
    room = None
    for kind in kinds:
        marks = _marks(kind, settings, source)
        path = room_file(out, kind, name)
        state = finished(path, marks)
        if state is None:
            room = room or read_room(folder, name)
            write_room(out, room, kind, settings, source=source)
            state = finished(path, marks)
            result["made"] = True
            if state is None:
                raise UserError(f"{path} cannot be read back after writing; check the disk")
        result |= {"points": state["points"], "notes": state["notes"], kind: state["blocks"]}
    return result


def prepare(
    raw: Path, out: Path, *, areas: tuple[int, ...], kinds: tuple[str, ...], settings: BlockSettings, workers: int
) -> dict[str, Any]:
    """Make all missing files, then the lists.

    Returns:
        ``rooms``, ``points``, ``made``, the blocks of each kind, ``areas`` (the same by area) and ``notes``.

    Raises:
        DataError: a raw file is missing or damaged.
        UserError: an output folder has blocks from elsewhere or cannot be written.
    """
    rooms = find_rooms(raw, areas)
    for kind in kinds:
        if foreign := _foreign_files(out / KINDS[kind]):
            raise UserError(
                f"{foreign[0]} was not made by this command, and its blocks cannot be mixed with ours; choose another "
                "--out, or make only the blocks of whole rooms with --only test"
            )
    results: dict[str, dict[str, Any]] = {}
    with progress(total=len(rooms), text="cutting rooms", unit="rooms") as bar:
        jobs = [(name, folder, out, kinds, settings) for name, folder in rooms.items()]
        made = starmap(prepare_room, jobs) if workers <= 1 else run_jobs(prepare_room, jobs, workers=workers)
        for result in made:
            for note in result["notes"]:
                tqdm.write(f"note: {note}", file=sys.stderr)
            results[result["name"]] = result
            bar.update()
    for kind in kinds:
        write_lists(out / KINDS[kind])
    return summarize([results[name] for name in rooms], kinds)


def summarize(results: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Sum over the rooms; return the result of :func:`prepare`."""

    def total(some: list[dict[str, Any]]) -> dict[str, int]:
        counts = {"rooms": len(some), "made": sum(r["made"] for r in some), "points": sum(r["points"] for r in some)}
        return counts | {f"{kind}_blocks": sum(r[kind] for r in some) for kind in kinds}

    areas = sorted({area_of(result["name"]) for result in results})
    by_area = {str(area): total([r for r in results if area_of(r["name"]) == area]) for area in areas}
    return {**total(results), "areas": by_area, "notes": [note for result in results for note in result["notes"]]}


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary as a table."""
    columns = [name for name in summary if name not in ("areas", "notes")]
    rows = [["area", *(name.replace("_", " ") for name in columns)]]
    rows += [[area, *(f"{counts[name]:,}" for name in columns)] for area, counts in summary["areas"].items()]
    rows.append(["all", *(f"{summary[name]:,}" for name in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script."""
    parser = BlockSettings.parser(__doc__, prog="python -m datasets.s3dis_prepare")
    parser.add_argument("--raw", required=True, type=Path, metavar="DIR", help=f"the unpacked {RAW_NAME}")
    parser.add_argument(
        "--out", type=Path, default=Path("data"), metavar="DIR", help="data root for the output folders"
    )
    parser.add_argument(
        "--areas", type=int, nargs="+", choices=AREAS, default=list(AREAS), metavar="N", help="areas to cut, of 1 to 6"
    )
    parser.add_argument("--only", choices=sorted(KINDS), help="make only the training blocks or only the whole rooms")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="W",
        help="rooms to cut in parallel; a large room takes about 2 GB of memory",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Cut the rooms; return the counts."""
    args = build_parser().parse_args(argv)
    if not args.stride > 0 or args.min_points < 1 or args.workers < 0 or args.seed < 0:
        raise UserError("--stride must be above 0, --min_points at least 1, --workers and --seed at least 0")
    settings = BlockSettings.from_flags(args)
    kinds = (args.only,) if args.only else tuple(KINDS)
    summary = prepare(
        args.raw, args.out, areas=tuple(sorted(set(args.areas))), kinds=kinds, settings=settings, workers=args.workers
    )
    print(summary_table(summary))
    for kind in kinds:
        print(f"{kind}: {args.out / KINDS[kind]}")
    write_json(args.json, summary)
    return summary


if __name__ == "__main__":
    run(main)
