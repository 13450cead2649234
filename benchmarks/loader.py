"""Reading and augmenting pretraining pairs: our data path against the textbook one, in samples per second of one core.

Ours: clouds and encoded renderings are in one packed file, a data worker reads and decodes a rendering once, and
whole batches are augmented on the training device. Textbook (benchmarks/reference/textbook_pairs.py): every view reads
a file, and clouds and images are augmented one by one, by NumPy, Pillow and torchvision.

Three numbers, each of one thread: a worker of ours, a worker of the textbook form, and ours plus the batch
augmentation, as if the training device were a core of this CPU. The augmented tensors have the same sizes. Below are
the milliseconds of each stage. Files come from the page cache: the first round is not counted.

  python -m benchmarks.loader --data_root data/shapenet2k               # real pairs, at the released sizes: a minute
  python -m benchmarks.loader                                           # without them: the demo's, written out as files
  python -m benchmarks.loader --workers 2                               # also counts what the workers deliver
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import numpy as np
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import functional as F

from benchmarks.frame import Benchmark
from benchmarks.measure import DEMO, compare, place_text, ratio_text, seconds_in_turn, seconds_of, text_table
from benchmarks.reference.textbook_pairs import TextbookPairs, augment_cloud, read_cloud
from datasets.pack import pack
from datasets.pair_sources import FolderSource, PairSource, open_source
from datasets.sampler import ResumableSampler
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from datasets.streams import SampleStreams
from datasets.transforms import (
    RenderAugmentation,
    RenderPixels,
    jitter_colors,
    luminance,
    normalize_images,
    pretraining_augmentation,
    resize_and_flip,
)
from datasets.untrusted import decode_image
from utils.cli import non_negative_int, positive_int, run
from utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("what is measured")
    g.add_argument("--data_root", default=str(DEMO), metavar="DIR", help="pairs: folders or a packed file")
    g.add_argument("--shapes", type=positive_int, default=256, metavar="N", help="use the first N of them")
    g.add_argument("--batch", type=positive_int, default=32, metavar="B", help="samples per batch")
    g.add_argument("--image_size", type=positive_int, default=224, metavar="PX", help="size of the images")
    g.add_argument(
        "--workers", type=non_negative_int, default=0, metavar="W", help="also measure loaders with W processes"
    )


def write_folders(source: PairSource, chosen: Sequence[int], root: Path) -> None:
    """Write shapes of any source as files of the released layout, points as binary PLY."""
    for i in chosen:
        name = source.ids[i]
        rows = np.rec.fromarrays(source.points(i).T, names="x,y,z")
        path = root / "ShapeNet" / f"{name}.ply"
        path.parent.mkdir(parents=True, exist_ok=True)
        PlyData([PlyElement.describe(rows, "vertex")]).write(path)
        folder = root / "ShapeNetRendering" / name / "rendering"
        folder.mkdir(parents=True)
        for view, file in enumerate(source.view_names(i)):
            (folder / file).write_bytes(source.image_file(i, view))


def prepare(args: argparse.Namespace, folder: Path) -> tuple[ShapeNetRender, TextbookPairs]:
    """Return the same shapes as a packed file and as single files.

    Raises:
        UserError: fewer shapes than a batch.
    """
    source = open_source(args.data_root)
    chosen = np.linspace(0, len(source.ids) - 1, min(args.shapes, len(source.ids))).astype(int).tolist()
    if len(chosen) < args.batch:
        raise UserError(f"--batch {args.batch} is more than the {len(chosen)} shapes of {args.data_root} in use")
    write_folders(source, chosen, folder / "files")
    files = FolderSource(folder / "files")
    pack(files, folder / "pairs.h5", chosen=list(range(len(files.ids))), name="benchmark")
    ours = ShapeNetRender(folder / "pairs.h5", seed=args.seed, transform=RenderPixels(args.image_size))
    return ours, TextbookPairs(folder / "files", size=args.image_size)


class DataPath:
    """What our data path does with a batch."""

    def __init__(self, dataset: ShapeNetRender, args: argparse.Namespace) -> None:
        self.dataset, self.seed = dataset, args.seed
        self.sampler = ResumableSampler(len(dataset), global_batch=args.batch, seed=args.seed)
        self.clouds, self.renders = pretraining_augmentation(), RenderAugmentation(args.image_size)

    def read(self) -> list[dict[str, Any]]:
        """Return the batches of an epoch, as a worker reads them."""
        return [collate_pairs(self.dataset.__getitems__(keys)) for keys in self.sampler]

    def augment(self, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Augment a batch as the training device does; return two views, color and gray images."""
        streams = SampleStreams(seed=self.seed, epoch=0, index=batch["index"])
        views = [self.clouds(batch["points"], streams) for _ in range(2)]
        images = self.renders(batch["pixels"], batch["sizes"], streams)
        return (*views, images["rgb"], images["gray"])


def stages(dataset: ShapeNetRender, textbook: TextbookPairs, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return milliseconds per sample by form and stage: the fastest of the rounds, each over one batch."""
    count, size, source = args.batch, args.image_size, dataset.source
    rounds = range(args.repeats + 1)

    def ms(action: Callable[[int], Any]) -> float:
        def over_batch() -> None:
            for i in range(count):
                action(i)

        return 1e3 * min(seconds_of(over_batch, cpu=True) for _ in rounds) / count

    def batch_ms(action: Callable[[], Any]) -> float:
        return 1e3 * min(seconds_of(action, cpu=True) for _ in rounds) / count

    where = [source.where(i, 0) for i in range(count)]
    files = [source.image_file(i, 0) for i in range(count)]
    pictures = [decode_image(data, name) for data, name in zip(files, where, strict=True)]
    samples = dataset.__getitems__(list(range(count)))
    batch = collate_pairs(samples)
    streams = SampleStreams(seed=args.seed, epoch=0, index=batch["index"])
    augmentation, pixels = pretraining_augmentation(), dataset.transform
    factors, order = streams.uniform(3, low=0.6, high=1.4), streams.uniform(3).argsort(1)
    flips = streams.uniform(1)[:, 0] < 0.5
    pieces = []  # of one size, in the chunks that the augmentation takes on a CPU
    for pixels_size in batch["sizes"].unique(dim=0):
        for rows in (batch["sizes"] == pixels_size).all(1).nonzero()[:, 0].split(RenderAugmentation.CPU_CHUNK):
            height, width = pixels_size.tolist()
            pieces.append((rows, batch["pixels"][rows, :height, :width].permute(0, 3, 1, 2)))
    gray = [(rows, luminance(x.float()).byte()) for rows, x in pieces]
    resized = [(rows, resize_and_flip(x, size, flips[rows]).float()) for rows, x in pieces]
    ours = {
        "read cloud": ms(source.points),
        "read image file": ms(lambda i: source.image_file(i, 0)),
        "decode": ms(lambda i: decode_image(files[i], where[i])),
        "composite": ms(lambda i: pixels(pictures[i])),
        "collate": batch_ms(lambda: collate_pairs(samples)),
        "augment clouds*": batch_ms(lambda: [augmentation(batch["points"], streams) for _ in range(2)]),
        "gray*": batch_ms(lambda: [luminance(x.float()).byte() for _, x in pieces]),
        "resize and flip*": batch_ms(lambda: [resize_and_flip(x, size, flips[rows]) for rows, x in pieces + gray]),
        "color jitter*": batch_ms(lambda: [jitter_colors(x, factors[rows], order[rows]) for rows, x in resized]),
        "normalize*": batch_ms(lambda: [(normalize_images(x), normalize_images(x[:, :1])) for _, x in resized]),
    }
    clouds, views = zip(*(textbook.pairs[i] for i in range(count)), strict=True)
    arrays = [read_cloud(path) for path in clouds]
    color = [Image.open(view[0]).convert("RGB") for view in views]
    large = [textbook.rgb.transforms[0](x) for x in color]
    luma = [x.convert("L") for x in large]
    tensors = [F.to_tensor(x) for x in large]
    examples = [textbook[i] for i in range(count)]
    resize, jitter, flip, to_tensor, normalize = textbook.rgb.transforms
    plain = {
        "read cloud": 2 * ms(lambda i: read_cloud(clouds[i])),
        "read image file": 2 * ms(lambda i: views[i][0].read_bytes()),
        "decode": 2 * ms(lambda i: Image.open(io.BytesIO(files[i])).load()),
        "gray*": ms(lambda i: color[i].convert("L")),
        "collate": batch_ms(lambda: default_collate(examples)),
        "augment clouds*": 2 * ms(lambda i: augment_cloud(arrays[i])),
        "resize and flip*": ms(lambda i: flip(resize(color[i]))) + ms(lambda i: flip(resize(luma[i]))),
        "color jitter*": ms(lambda i: jitter(large[i])),
        "normalize*": ms(lambda i: normalize(to_tensor(large[i]))) + ms(lambda i: (to_tensor(luma[i]), tensors[i])),
    }
    return {"ours": ours, "textbook": plain}


def with_workers(dataset: Any, workers: int, **kwargs: Any) -> float:
    """Return samples per second of PyTorch's loader over an epoch, after one that is not counted."""
    loader = DataLoader(dataset, num_workers=workers, persistent_workers=True, prefetch_factor=4, **kwargs)
    count = 0

    def epoch() -> None:
        nonlocal count
        count = sum(len(batch["index"] if isinstance(batch, dict) else batch[0]) for batch in loader)

    epoch()
    return count / seconds_of(epoch)


def measure(args: argparse.Namespace, _: torch.device) -> dict[str, Any]:
    """Measure both data paths in turn."""
    with tempfile.TemporaryDirectory(prefix="crossnet-loader-") as folder:
        dataset, textbook = prepare(args, Path(folder))
        path = DataPath(dataset, args)
        batches = list(path.sampler)
        count = len(batches) * args.batch

        def read_textbook() -> None:
            for keys in batches:
                default_collate([textbook[key.index] for key in keys])

        def read_and_augment() -> None:
            for batch in path.read():
                path.augment(batch)

        actions = {"ours": path.read, "textbook": read_textbook, "whole": read_and_augment}
        seconds_in_turn(actions, repeats=1, cpu=True)
        seconds = seconds_in_turn(actions, repeats=args.repeats, cpu=True)
        per_sample = {name: [value / count for value in values] for name, values in seconds.items()}
        result = compare(per_sample)
        result["whole"] = {
            "seconds": per_sample["whole"],
            "seconds_median": statistics.median(per_sample["whole"]),
            "time_ratio": statistics.median(
                b / a for a, b in zip(per_sample["whole"], per_sample["textbook"], strict=True)
            ),
        }
        for name in ("ours", "textbook", "whole"):
            result[name]["samples_per_second"] = 1 / result[name]["seconds_median"]
        result["stages_ms"] = stages(dataset, textbook, args)
        if args.workers:
            result["with_workers"] = {
                "workers": args.workers,
                "ours": with_workers(dataset, args.workers, batch_sampler=path.sampler, collate_fn=collate_pairs),
                "textbook": with_workers(textbook, args.workers, batch_size=args.batch, shuffle=True, drop_last=True),
            }
    return result | {"settings": {"data": Path(args.data_root).name, "points": dataset.cloud_size}}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    settings = result["settings"]
    rate = {name: result[name]["samples_per_second"] for name in ("ours", "textbook", "whole")}
    stage = result["stages_ms"]
    rows = [
        ("", "ours", "textbook", "textbook / ours"),
        ("samples/s of a worker", f"{rate['ours']:.0f}", f"{rate['textbook']:.0f}", ratio_text(result)),
        (
            "and batch augmentation",
            f"{rate['whole']:.0f}",
            f"{rate['textbook']:.0f}",
            f"{result['whole']['time_ratio']:.2f}",
        ),
        ("ms per sample by stage", "", "", ""),
    ]
    for name in {**stage["ours"], **stage["textbook"]}:
        cells = [f"{stage[form][name]:.3f}" if name in stage[form] else "" for form in ("ours", "textbook")]
        rows.append((f"  {name}", *cells, ""))
    if workers := result.get("with_workers"):
        rows.append(
            (f"samples/s, {workers['workers']} workers", f"{workers['ours']:.0f}", f"{workers['textbook']:.0f}", "")
        )
    return "\n".join(
        [
            f"{settings['shapes']} shapes of {settings['data']}, {settings['points']} points, both images at "
            f"{settings['image_size']} px, batches of {settings['batch']}, CPU time, {place_text(result)}",
            text_table(rows),
            "* with ours on the training device, in batch; here on the CPU",
        ]
    )


QUICK = {"shapes": 8, "batch": 4, "image_size": 32, "repeats": 1}
BENCHMARK = Benchmark("loader", __doc__, add_arguments, measure, table, quick=QUICK, threads=1)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
