"""Tiny labeled sets in the official layouts: parts (ShapeNetPart), rooms (S3DIS)."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from datasets.shapenet_part import PartTaxonomy, official_taxonomy
from tests.support.files import write_h5

OWN_CATEGORIES = {"brick": 2, "cone": 3}
# Two rooms of each area.
ROOMS = [f"Area_{area}_{kind}_1" for area in range(1, 7) for kind in ("hall", "office")]


def part_clouds(counts: Sequence[int], categories: np.ndarray, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make columns whose parts are slices of the height; the category determines their width.

    Returns:
        (n, N, 3) float32 and (n, N) part numbers over all categories.
    """
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *counts[:-1]])
    clouds = rng.uniform(-1, 1, (len(categories), points, 3)).astype(np.float32)
    number = np.array(counts)[categories][:, None]
    parts = np.minimum(((clouds[..., 1] + 1) / 2 * number).astype(int), number - 1)
    clouds[..., [0, 2]] *= (0.1 + 0.8 * categories / max(len(counts) - 1, 1))[:, None, None]
    return clouds, parts + starts[categories][:, None]


def write_parts(
    root: Path,
    categories: Mapping[str, int] | None = OWN_CATEGORIES,
    *,
    counts: Sequence[int] = (),
    shapes: Mapping[str, int] | None = None,
    points: int = 64,
) -> Path:
    """Write ``shapenet_part_seg_hdf5_data`` below ``root``.

    Args:
        root: made if missing.
        categories: parts of each category, written into tables. None: the published categories, without tables.
        counts: with no ``categories``, the published number of parts.
        shapes: number of shapes by split.
        points: per shape.
    """
    folder = root / "shapenet_part_seg_hdf5_data"
    folder.mkdir(parents=True)
    if categories is not None:
        counts = list(categories.values())
        synsets = [f"{i:08d}" for i in range(len(categories))]
        lines = [f"{name}\t{synset}\n" for name, synset in zip(categories, synsets, strict=True)]
        (folder / "all_object_categories.txt").write_text("".join(lines))
        owners = [(synset, i + 1) for synset, n in zip(synsets, counts, strict=True) for i in range(n)]
        (folder / "overallid_to_catid_partid.json").write_text(json.dumps(owners))
    for seed, (split, number) in enumerate((shapes or {"train": 8, "val": 4, "test": 6}).items()):
        labels = np.arange(number) % len(counts)
        clouds, parts = part_clouds(counts, labels, points, seed)
        name = f"ply_data_{split}0.h5"
        write_h5(folder / name, data=clouds, label=labels.astype("u1")[:, None], pid=parts.astype("u1"))
        (folder / f"{split}_hdf5_file_list.txt").write_text(f"hdf5_data/{name}\n")
    return folder


def room_blocks(blocks: int, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make blocks of a room whose class depends on the height: floor, wall, ceiling.

    Returns:
        (n, N, 9) float32 and (n, N) classes.
    """
    rng = np.random.default_rng(seed)
    unit = rng.uniform(size=(blocks, points, 3)).astype(np.float32)
    meters = np.concatenate([unit[..., :2] - 0.5, 3 * unit[..., 2:]], axis=2)
    labels = np.select([unit[..., 2] < 0.2, unit[..., 2] > 0.8], [1, 0], 2)
    return np.concatenate([meters, rng.uniform(size=unit.shape), unit], axis=2).astype(np.float32), labels


def write_rooms(root: Path, rooms: Sequence[str], *, blocks: int = 2, points: int = 64, whole: bool = True) -> None:
    """Write ``indoor3d_sem_seg_hdf5_data`` and, where ``whole``, the room-wise ``..._test`` below ``root``."""
    folder = root / "indoor3d_sem_seg_hdf5_data"
    sets = [room_blocks(blocks, points, seed) for seed, _ in enumerate(rooms)]
    data, labels = (np.concatenate(parts) for parts in zip(*sets, strict=True))
    write_h5(folder / "ply_data_all_0.h5", data=data, label=labels.astype("u1"))
    (folder / "all_files.txt").write_text(f"{folder.name}/ply_data_all_0.h5\n")
    (folder / "room_filelist.txt").write_text("".join(f"{room}\n" * blocks for room in rooms))
    if not whole:
        return
    test = root / "indoor3d_sem_seg_hdf5_data_test"
    test.mkdir()
    for room, (data, labels) in zip(rooms, sets, strict=True):
        with h5py.File(test / f"{room}.h5", "w") as file:
            # The last block repeats points of the first one: a point may be seen twice.
            data, labels = np.concatenate([data, data[:1]]), np.concatenate([labels, labels[:1]])
            index = np.arange(blocks * points).reshape(blocks, points)
            file["data"], file["label"] = data, labels.astype("u1")
            file["index"] = np.concatenate([index, index[:1]])
            file.attrs.update(room=room, room_points=blocks * points, room_low=[0.0, 0, 0], room_high=[4.0, 5, 3])
    (test / "all_files.txt").write_text("".join(f"{room}.h5\n" for room in rooms))
    (test / "room_filelist.txt").write_text("".join(f"{room}\n" * (blocks + 1) for room in rooms))


def write_part_text(
    folder: Path,
    shapes: Mapping[str, Sequence[tuple[str, str]]],
    *,
    normals: Container[str] = (),
    size: int = 30,
    taxonomy: PartTaxonomy | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write ShapeNetPart's text release.

    Args:
        folder: of the release; made.
        shapes: (synset, name) of each shape, by split.
        normals: names of shapes in the form with normals, one file each.
        size: points of a shape.
        taxonomy: categories and parts; None: the published ones. Others need their table of parts.

    Returns:
        For each name, points (N, 3) and parts (N,) numbered from 0 within the category.
    """
    taxonomy = taxonomy or official_taxonomy()
    names = zip(taxonomy.category_names, taxonomy.synsets, strict=True)
    (folder / "train_test_split").mkdir(parents=True)
    (folder / "synsetoffset2category.txt").write_text("".join(f"{n.capitalize()}\t{synset}\n" for n, synset in names))
    written = {}
    for split in ("train", "val", "test"):
        rows = shapes.get(split, [])
        listed = [f"shape_data/{synset}/{name}" for synset, name in rows]
        (folder / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(listed))
        for synset, name in rows:
            generator = np.random.default_rng(len(written))
            category = taxonomy.synsets.index(synset)
            points = generator.uniform(-1, 3, (size, 3)).round(5)
            local = generator.integers(taxonomy.part_counts[category], size=size)
            written[name] = points, local
            for kind in ("points", "points_label"):
                (folder / synset / kind).mkdir(parents=True, exist_ok=True)
            if name in normals:
                table = np.column_stack([points, points, local + taxonomy.part_starts[category]])
                np.savetxt(folder / synset / f"{name}.txt", table, fmt="%.6f")
            else:
                np.savetxt(folder / synset / "points" / f"{name}.pts", points, fmt="%.5f")
                np.savetxt(folder / synset / "points_label" / f"{name}.seg", local + 1, fmt="%d")
    return written


def write_raw_room(
    root: Path,
    area: int,
    room: str,
    *,
    size: tuple[float, float, float] = (2.3, 1.2, 2.0),
    points: int = 400,
    seed: int = 0,
    objects: Sequence[str] = ("floor_1", "chair_1", "stairs_1"),
) -> tuple[np.ndarray, list[str]]:
    """Write a raw room of S3DIS; return its points (M, 6) and their class names, in the order of the sorted files."""
    generator = np.random.default_rng([seed, area])
    folder = root / f"Area_{area}" / room / "Annotations"
    folder.mkdir(parents=True)
    parts, names = [], []
    for name in sorted(objects):
        xyz = generator.uniform(0, size, (points // len(objects), 3)) + (-7, 11, 0.5)
        values = np.concatenate([xyz.round(3), generator.integers(0, 256, xyz.shape)], axis=1)
        np.savetxt(folder / f"{name}.txt", values, fmt=["%.3f"] * 3 + ["%.0f"] * 3)
        parts.append(values)
        names += [name.split("_")[0]] * len(values)
    return np.concatenate(parts), names
