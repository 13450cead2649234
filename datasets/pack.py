"""Write the pretraining pairs of one or several roots into one HDF5 file.

One file replaces a million small ones; train_crossnet_con.py accepts it as --data_root. Points and encoded images are
stored unchanged, and the result is checked against the source. Several roots become one set: a name that an earlier
root has too gets the suffix -2.

Examples:
  python -m datasets.pack --data_root data --out data/shapenet_render.h5
  python -m datasets.pack --data_root data/mine data/shapes.h5 --out data/both.h5
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from datasets.pair_sources import (
    PACKED_FORMAT,
    PACKED_VERSION,
    FolderSource,
    JoinedSource,
    PackedSource,
    PairSource,
    choose_shapes,
    open_source,
    read_shape_list,
)
from datasets.untrusted import decode_image
from utils.cli import HelpFormatter, positive_int, run, write_json
from utils.errors import DataError, UserError
from utils.files import replacing
from utils.locks import locked
from utils.progress import progress


def pack(source: PairSource, out: str | os.PathLike[str], *, chosen: list[int], name: str) -> dict[str, int]:
    """Write shapes of a source into one file, which appears only when it is complete and checked.

    Args:
        source: source of the pairs.
        out: file to write.
        chosen: numbers of the shapes to write.
        name: origin to record in the file.

    Returns:
        The numbers of shapes, views and points, and the bytes of the images.

    Raises:
        DataError: a cloud or an image is unreadable, clouds differ in size, or the check fails.
        UserError: the file cannot be written.
    """
    out = Path(out)
    check_sizes(source, chosen)
    views = [(i, view) for i in chosen for view in range(len(source.view_names(i)))]
    size = len(source.points(chosen[0]))
    with replacing(out) as temporary:
        lengths = [len(source.image_file(i, view)) for i, view in progress(views, text="sizes", unit="views")]
        with h5py.File(temporary, "w") as file:
            file.attrs.update({"format": PACKED_FORMAT, "version": PACKED_VERSION, "source": name})
            text = h5py.string_dtype()
            file.create_dataset("ids", data=[source.ids[i] for i in chosen], dtype=text)
            file.create_dataset("unpaired", data=source.skipped, dtype=text, shape=(len(source.skipped),))
            file.create_dataset("view_names", data=[source.view_names(i)[view] for i, view in views], dtype=text)
            counts = [len(source.view_names(i)) for i in chosen]
            file["view_offset"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            file["image_offset"] = offset
            points = file.create_dataset("points", (len(chosen), size, 3), dtype=np.float32)
            images = file.create_dataset("image_bytes", (int(offset[-1]),), dtype=np.uint8)
            row = 0
            for n, i in enumerate(progress(chosen, text="packing", unit="shapes")):
                cloud = source.points(i)
                if len(cloud) != size:
                    raise sizes_differ(source, i, len(cloud), chosen[0], size)
                points[n] = cloud
                for view in range(len(source.view_names(i))):
                    data = source.image_file(i, view)
                    decode_image(data, source.where(i, view))
                    if len(data) != lengths[row]:
                        raise DataError(f"{source.where(i, view)} changed while it was read")
                    images[offset[row] : offset[row + 1]] = np.frombuffer(data, np.uint8)
                    row += 1
        check(source, PackedSource(temporary), chosen)
    return {"shapes": len(chosen), "views": len(views), "points": size, "image_bytes": int(offset[-1])}


def sizes_differ(source: PairSource, i: int, size: int, other: int, other_size: int) -> DataError:
    """Return the error of two clouds that differ in size."""
    return DataError(
        f"{source.where(i)} has {size} points, {source.where(other)} has {other_size}: a packed file needs clouds of "
        "one size; make both with the same --num_points, or pack subsets with --list"
    )


def check_sizes(source: PairSource, chosen: list[int]) -> None:
    """Compare the sizes that clouds have by their headers, before hours of copying.

    Raises:
        DataError: two clouds differ in size.
    """
    first: tuple[int, int] | None = None
    for i in progress(chosen, text="sizes", unit="clouds"):
        size = source.size(i)
        if size is None:  # unreadable; reading it says why
            continue
        first = first or (i, size)
        if size != first[1]:
            raise sizes_differ(source, i, size, *first)


def check(source: PairSource, packed: PairSource, chosen: list[int]) -> None:
    """Compare a packed file with its source, byte by byte.

    Raises:
        DataError: they differ; the message names the first shape that does.
    """
    for n, i in enumerate(progress(chosen, text="checking", unit="shapes")):
        same = (
            packed.ids[n] == source.ids[i]
            and list(packed.view_names(n)) == list(source.view_names(i))
            and np.array_equal(packed.points(n), source.points(i))
            and all(packed.image_file(n, v) == source.image_file(i, v) for v in range(len(source.view_names(i))))
        )
        if not same:
            raise DataError(f"the packed copy of {source.where(i)} differs from its source; check the disk")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--data_root",
        nargs="+",
        default=["data"],
        metavar="DIR",
        help="folders with ShapeNet/ and ShapeNetRendering/, or packed files",
    )
    parser.add_argument("--out", required=True, metavar="F.h5", help="file to write")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--list", metavar="FILE", help="pack only these shapes: one <synset>/<model_id> or <model_id> per line"
    )
    choice.add_argument(
        "--shapes",
        type=positive_int,
        metavar="N",
        help="pack N shapes: all of the earlier roots and the first ones of the last, by name (default: all)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE")
    return parser


def open_folders(root: str) -> PairSource:
    """Open the pairs at ``root``: its folders if it has some, also if there is an earlier packed file next to them."""
    return FolderSource(root) if (Path(root) / "ShapeNet").is_dir() else open_source(root)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Pack data sets and return the counts."""
    args = build_parser().parse_args(argv)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; --overwrite replaces it")
    places = [os.path.realpath(root) for root in args.data_root]
    if repeated := [root for root, place in zip(args.data_root, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"--data_root names {repeated[0]} twice; each of its shapes would be packed twice")
    source = JoinedSource([open_folders(root) for root in args.data_root], limit=args.shapes)
    chosen = list(range(len(source.ids)))
    if args.list:
        chosen = choose_shapes(source.ids, read_shape_list(args.list), where=", ".join(args.data_root))
    with locked(args.out):
        counts = pack(source, args.out, chosen=chosen, name=", ".join(Path(root).name for root in args.data_root))
    counts["skipped"] = len(source.skipped)
    print(
        f"{args.out}: {counts['shapes']} shapes of {counts['points']} points, {counts['views']} views, equal to the "
        f"source; skipped {counts['skipped']} shapes without rendering"
    )
    if source.renamed:
        print(f"{source.renamed} shapes have the name of a shape in an earlier root; the name got a suffix, such as -2")
    write_json(args.json, counts)
    return counts


if __name__ == "__main__":
    run(main)
