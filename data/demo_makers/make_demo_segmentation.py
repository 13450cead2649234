"""Build the labeled sets of ``data/demo`` for part segmentation and for semantic segmentation of rooms.

  shapenet_part_seg_hdf5_data/      parametric objects with exact parts, in the layout of ShapeNetPart (hdf5_data)
  indoor3d_sem_seg_hdf5_data/       blocks of furnished rooms in six areas, in the layout of S3DIS
  indoor3d_sem_seg_hdf5_data_test/  the same rooms whole, as datasets/s3dis_prepare.py writes them

The rooms are furnished with the models of shapenet_render.h5; to remake that too, run data/demo_makers/make_demo.py
first. The committed result is what everything else reads; this script is only needed to remake it. It takes about two
minutes on one core and needs only requirements.txt.

Example:
  python data/demo_makers/make_demo_segmentation.py --out data/demo
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

from data.demo_makers.demo_parts import CATEGORIES, build_object
from data.demo_makers.demo_rooms import AREA_ROOMS, build_rooms
from data.demo_makers.make_demo import PACK_NAME, check_replaceable, check_sizes
from datasets.s3dis import BLOCK_FOLDER, CLASS_NAMES, ROOM_FOLDER
from datasets.s3dis_prepare import KINDS, BlockSettings, Room, room_file, write_lists, write_room
from datasets.shapenet_part import CATEGORY_FILE, HDF5_FOLDERS, PART_FILE, PART_NAME_FILE
from utils import cli
from utils.errors import DataError
from utils.files import writing
from utils.progress import progress

SOURCE = "CrossNet demo set"
PART_FOLDER = HDF5_FOLDERS[0]
# Shapes of each category.
PART_SHAPES = {"train": 30, "val": 8, "test": 12}
# Settings of the committed set; they are the defaults of the flags with these names.
CONTENT = {"points": 1024, "block_points": 1024}


def write_parts(out: Path, *, points: int, seed: int, shapes: dict[str, int] | None = None) -> dict[str, int]:
    """Write the part set below ``out``.

    Args:
        out: the data root.
        points: number of points per shape.
        seed: of everything random.
        shapes: number per category, by split; None means the committed numbers.

    Returns:
        The number of shapes in each split.
    """
    folder = out / PART_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names = list(CATEGORIES)
    starts = np.cumsum([0] + [len(parts) for _, parts in CATEGORIES.values()])
    lines = [f"{name.capitalize()}\t{synset}\n" for name, (synset, _) in CATEGORIES.items()]
    (folder / CATEGORY_FILE).write_text("".join(lines), encoding="utf-8")
    owners = [[synset, i + 1] for synset, parts in CATEGORIES.values() for i in range(len(parts))]
    (folder / PART_FILE).write_text(json.dumps(owners) + "\n", encoding="utf-8")
    lines = [f"{name} {part}\n" for name, (_, parts) in CATEGORIES.items() for part in parts]
    (folder / PART_NAME_FILE).write_text("".join(lines), encoding="utf-8")
    sizes = {}
    for number, (split, count) in enumerate((shapes or PART_SHAPES).items()):
        jobs = [(label, i) for label in range(len(names)) for i in range(count)]
        order = np.random.default_rng([seed, number]).permutation(len(jobs))
        built = []
        for j in progress(order, text=f"parts, {split}", unit="shapes"):
            label, i = jobs[j]
            cloud, parts = build_object(names[label], split, i, seed=seed, count=points)
            built.append((cloud, label, parts + starts[label]))
        file_name = f"ply_data_{split}0.h5"
        with h5py.File(folder / file_name, "w") as file:
            file.attrs["source"] = SOURCE
            packed: dict[str, Any] = {"shuffle": True, "compression": "gzip", "compression_opts": 9}
            # Steps of 1/2048 are exact in float16 and compress better than its finer steps near zero.
            clouds = (np.rint(np.stack([cloud for cloud, _, _ in built]) * 2048) / 2048).astype(np.float16)
            file.create_dataset("data", data=clouds, chunks=(min(16, len(clouds)), points, 3), **packed)
            file["label"] = np.array([[label] for _, label, _ in built], np.uint8)
            file.create_dataset("pid", data=np.stack([parts for _, _, parts in built]).astype(np.uint8), **packed)
        (folder / f"{split}_hdf5_file_list.txt").write_text(f"{file_name}\n", encoding="utf-8")
        sizes[split] = len(built)
    return sizes


def write_rooms(out: Path, rooms: Sequence[Room], *, block_points: int, seed: int) -> dict[str, int]:
    """Cut rooms and write their blocks below ``out``.

    Returns:
        Blocks of each kind, ``"train"`` and ``"test"``.
    """
    settings = BlockSettings(num_points=block_points, stride=1.0, seed=seed, dtype="float16")
    counts = {}
    for kind, name in KINDS.items():
        for old in (out / name).glob("ply_data_all_*.h5"):
            old.unlink()
        for room in rooms:
            write_room(out, room, kind, settings, source=SOURCE)
        counts[kind] = sum(write_lists(out / name).values())
    return counts


README = """## shapenet_part_seg_hdf5_data: {shapes} shapes with parts

In the layout of ShapeNetPart's `hdf5_data`, float16, {points} points, y up, in the unit sphere: `data`, `label`
(category) and `pid` (part, numbered over all categories); the tables next to them name categories and parts. Made,
together with the rooms, with

```
{command}
```

The shapes are parametric (`data/demo_makers/demo_parts.py`): each has different proportions and a style, such
as four legs, a pedestal or runners, and its parts are known exactly. Points are uniform on the visible surface. Not
every shape has every part: arms and drawers are optional. Nothing comes from ShapeNet; the license is the repository's.

| category | parts | train | val | test |
| --- | --- | --- | --- | --- |
{part_table}

## indoor3d_sem_seg_hdf5_data, indoor3d_sem_seg_hdf5_data_test: {rooms} furnished rooms in six areas

In the layout of S3DIS as `datasets/s3dis_prepare.py` writes it, float16: blocks of 1 m every 1 m with {block_points}
points of 9 values ({train} blocks), and the same rooms whole, with the number of every point ({test} blocks, {total}
points). A room (`data/demo_makers/demo_rooms.py`) has floor, ceiling, walls, a door, windows, columns and beams,
and models of `shapenet_render.h5` on the floor, on tables and on the walls, in their size and colors; the licenses in
`ATTRIBUTION.md` cover their points here too. Colors differ between rooms; models differ between areas where there
are enough of a kind.

| area | rooms | points | training blocks | classes absent |
| --- | --- | --- | --- | --- |
{room_table}
"""


def write_readme(out: Path, sizes: dict[str, int], rooms: Sequence[Room], counts: dict[str, int], command: str) -> None:
    """Write the sections about these sets at the end of ``README.md``, replacing older ones."""
    path = out / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# The demo set\n"
    text = text.partition(f"## {PART_FOLDER}")[0].rstrip("\n") + "\n\n"
    per_category = [f"{sizes[split] // len(CATEGORIES)}" for split in ("train", "val", "test")]
    part_rows = [
        f"| {name} | {', '.join(parts)} | {' | '.join(per_category)} |" for name, (_, parts) in CATEGORIES.items()
    ]
    part_rows.append(
        f"| all | {sum(len(p) for _, p in CATEGORIES.values())} | {sizes['train']} | {sizes['val']} | {sizes['test']} |"
    )
    room_rows = []
    for area in range(1, len(AREA_ROOMS) + 1):
        here = [room for room in rooms if room.name.startswith(f"Area_{area}_")]
        blocks = 0
        for room in here:
            with h5py.File(room_file(out, "train", room.name), "r") as file:
                blocks += len(file["data"])
        present = np.unique(np.concatenate([room.labels for room in here]))
        absent = [name for i, name in enumerate(CLASS_NAMES) if i not in present]
        kinds = ", ".join(room.name.split("_")[2] for room in here)
        points = sum(len(room.xyz) for room in here)
        room_rows.append(f"| {area} | {kinds} | {points} | {blocks} | {', '.join(absent) or 'none'} |")
    with h5py.File(out / PART_FOLDER / "ply_data_train0.h5", "r") as file:
        points = file["data"].shape[1]
    with h5py.File(room_file(out, "train", rooms[0].name), "r") as file:
        block_points = file["data"].shape[1]
    text += README.format(
        shapes=sum(sizes.values()),
        points=points,
        command=command,
        part_table="\n".join(part_rows),
        rooms=len(rooms),
        block_points=block_points,
        train=counts["train"],
        test=counts["test"],
        total=sum(len(room.xyz) for room in rooms),
        room_table="\n".join(room_rows),
    )
    path.write_text(text, encoding="utf-8")


def check_free(out: Path) -> None:
    """Check that only an earlier demo set is replaced.

    Raises:
        UserError: one of the folders holds another set.
    """
    for name in (PART_FOLDER, BLOCK_FOLDER, ROOM_FOLDER):
        for path in sorted((out / name).glob("*.h5")):
            check_replaceable(path, SOURCE)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    demo = Path("data/demo")
    parser.add_argument(
        "--pack", type=Path, default=demo / PACK_NAME, metavar="FILE", help="the demo set's models, for the rooms"
    )
    parser.add_argument("--out", type=Path, default=demo, metavar="DIR", help="data root to write the folders into")
    parser.add_argument(
        "--points", type=cli.positive_int, default=CONTENT["points"], metavar="N", help="points of a labeled shape"
    )
    parser.add_argument(
        "--block_points", type=cli.positive_int, default=CONTENT["block_points"], metavar="N", help="points of a block"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of all draws")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Build both sets; return their counts."""
    args = parse_args(argv)
    if not args.pack.is_file():
        raise DataError(
            f"{args.pack} is missing; expected the demo set's models. data/demo_makers/make_demo.py makes them"
        )
    check_free(args.out)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        rooms = build_rooms(args.pack, seed=args.seed)
        sizes = write_parts(args.out, points=args.points, seed=args.seed)
        counts = write_rooms(args.out, rooms, block_points=args.block_points, seed=args.seed)
        command = f"python data/demo_makers/make_demo_segmentation.py --out data/demo --seed {args.seed}"
        changed = {name: getattr(args, name) for name, usual in CONTENT.items() if getattr(args, name) != usual}
        command += "".join(f" --{name} {value}" for name, value in changed.items())
        write_readme(args.out, sizes, rooms, counts, command)
        total = check_sizes(args.out)
    print(f"{sum(sizes.values())} shapes, {len(rooms)} rooms, {counts['train']} + {counts['test']} blocks")
    print(f"{total / 1e6:.1f} MB in {args.out}")
    return {"shapes": sizes, "rooms": len(rooms), "blocks": counts, "bytes": total}


if __name__ == "__main__":
    cli.run(main)
