r"""The whole pretraining step: time against the textbook form, and memory of large batches with and without chunks.

Time: augmentation of both views, point encoder, both image encoders, losses, backward pass and Adam, for a batch that
is in memory already. Ours is the model with its images in channels_last; textbook is the same model with the point
encoder of benchmarks/reference/textbook.py (all edges) and images as they are read. Both in this process, in turn.
Memory: one step in a fresh process for each batch size, in one pass and in chunks (--chunk_size of the training
script), in which memory stays flat while the loss sees the whole batch.

  python -m benchmarks.step                                      # minutes on two cores, sizes in the table
  python -m benchmarks.step --quick
  python -m benchmarks.step --device cuda --batch 32 --batches 32 64 128 200 --memory_points 2048 \
      --memory_image_model resnet50 --memory_image_size 224 --amp bf16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.measure import (
    FORMULATIONS,
    add_measuring_arguments,
    compare,
    in_fresh_process,
    memory_of,
    place_text,
    provenance,
    ratio_text,
    seconds_in_turn,
    text_table,
)
from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from datasets.streams import SampleStreams, Stream
from datasets.transforms import pretraining_augmentation
from engine.device import resolve_device
from engine.grad_cache import backward_in_chunks
from engine.optim import AMP_DTYPES, autocast
from models import CrossNet, build_encoder
from models.base import PointFeatures
from models.image import IMAGE_ENCODERS
from utils.cli import (
    HelpFormatter,
    positive_int,
    run,
    write_json,
)

QUICK = {
    **{"batch": 2, "points": 64, "image_model": "resnet18", "image_size": 32, "repeats": 1, "batches": [2, 4]},
    **{"chunk_size": 2, "memory_points": 64, "memory_image_size": 32},
}
EMBEDDING = 1024


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=HelpFormatter
    )
    g = parser.add_argument_group("time against the textbook form")
    g.add_argument("--batch", type=positive_int, default=8, metavar="B", help="objects of a step")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points of a view")
    g.add_argument("--image_model", choices=list(IMAGE_ENCODERS), default="resnet50", help="both image encoders")
    g.add_argument("--image_size", type=positive_int, default=224, metavar="PX", help="pixels of an image's side")
    g.add_argument("--k", type=positive_int, default=20, help="neighbours per point, itself included")
    g = parser.add_argument_group("memory of large batches")
    g.add_argument(
        "--batches", type=positive_int, nargs="+", default=[16, 32, 64, 128], metavar="B", help="objects of a step"
    )
    g.add_argument("--chunk_size", type=positive_int, default=16, metavar="C", help="objects of a chunk")
    g.add_argument("--memory_points", type=positive_int, default=512, metavar="N", help="points of a view")
    g.add_argument("--memory_image_model", choices=list(IMAGE_ENCODERS), default="resnet18", help="image encoders")
    g.add_argument("--memory_image_size", type=positive_int, default=112, metavar="PX", help="pixels of a side")
    g.add_argument("--only_chunks", action="store_true", help="no steps in one pass, where they do not fit")
    g = parser.add_argument_group("both")
    g.add_argument("--amp", choices=list(AMP_DTYPES), default="off", help="mixed precision")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    add_measuring_arguments(parser, repeats=2)
    parser.add_argument("--memory_of", nargs=2, type=int, help=argparse.SUPPRESS)  # batch and chunk of a fresh process
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    return args


def training_step(
    point_encoder: nn.Module,
    args: argparse.Namespace,
    *,
    batch: int,
    points: int,
    image_model: str,
    image_size: int,
    channels_last: bool,
    chunk_size: int = 0,
) -> Callable[[], None]:
    """A step of a model around ``point_encoder``, on a batch of random numbers, ready to be called."""
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    model = CrossNet(point_encoder, image_model=image_model).to(device)
    if channels_last:
        model.image_encoders.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    clouds = torch.rand(batch, points, 3, device=device)
    images = {
        name: torch.randn(batch, c, image_size, image_size, device=device) for name, c in (("rgb", 3), ("gray", 1))
    }
    augmentation, index = pretraining_augmentation(None), torch.arange(batch, device=device)

    def step() -> None:
        streams = SampleStreams(seed=args.seed, epoch=0, index=index, purpose=Stream.AUGMENTATION)
        views = {name: augmentation(clouds, streams).mT for name in ("view1", "view2")}
        layout = torch.channels_last if channels_last else torch.contiguous_format
        inputs = {**views, **{name: image.contiguous(memory_format=layout) for name, image in images.items()}}
        if chunk_size:
            backward_in_chunks(model, inputs, chunk_size=chunk_size, precision=lambda: autocast(device, args.amp))
        else:
            with autocast(device, args.amp):
                loss = model(**inputs).total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def own_memory(args: argparse.Namespace, batch: int, chunk_size: int) -> dict[str, Any]:
    """Memory and seconds of one step of this size, in this process."""
    step = training_step(
        build_encoder("dgcnn_cls", k=args.k, emb_dims=EMBEDDING),
        args,
        batch=batch,
        points=args.memory_points,
        image_model=args.memory_image_model,
        image_size=args.memory_image_size,
        channels_last=True,
        chunk_size=chunk_size,
    )
    device = resolve_device(args.device)
    memory: dict[str, float] = {}
    seconds = seconds_in_turn({"step": lambda: memory.update(memory_of(step, device))}, repeats=1, device=device)
    return {"batch": batch, "chunk_size": chunk_size or None, "seconds": seconds["step"][0], **memory}


def measure(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Memory first, in fresh processes; then time, in turn."""
    device = resolve_device(args.device)
    about = provenance(device)
    kinds = (args.chunk_size,) if args.only_chunks else (0, args.chunk_size)
    sizes = [(batch, chunk) for batch in args.batches for chunk in kinds]
    memory = [
        in_fresh_process("benchmarks.step", [*argv, "--memory_of", str(batch), str(chunk)]) for batch, chunk in sizes
    ]
    encoders = {
        "ours": build_encoder("dgcnn_cls", k=args.k, emb_dims=EMBEDDING),
        "textbook": TEXTBOOK_ENCODERS["dgcnn_cls"](k=args.k, emb_dims=EMBEDDING),
    }
    steps = {
        name: training_step(
            _Features(encoders[name], 2 * EMBEDDING),
            args,
            batch=args.batch,
            points=args.points,
            image_model=args.image_model,
            image_size=args.image_size,
            channels_last=name == "ours",
        )
        for name in FORMULATIONS
    }
    for step in steps.values():
        step()
    result = compare(seconds_in_turn(steps, repeats=args.repeats, device=device))
    for name in FORMULATIONS:
        result[name]["shapes_per_s"] = args.batch / result[name]["seconds_median"]
    names = ("batch", "points", "image_model", "image_size", "k", "amp", "repeats", "seed", "threads", "chunk_size")
    memory_names = ("memory_points", "memory_image_model", "memory_image_size")
    return {
        **result,
        "large_batches": memory,
        "settings": {**{n: getattr(args, n) for n in (*names, *memory_names)}, "device": str(device)},
        **about,
    }


class _Features(nn.Module):
    """Either encoder as ``CrossNet`` expects it."""

    def __init__(self, encoder: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.encoder, self.feature_dim = encoder, feature_dim

    def forward(self, x: torch.Tensor) -> PointFeatures:
        """(B, 3, N) -> features."""
        return PointFeatures(*self.encoder(x))


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    s, ours, textbook = result["settings"], result["ours"], result["textbook"]
    time = [
        ("", "ours", "textbook", "textbook / ours"),
        ("seconds per step", f"{ours['seconds_median']:.2f}", f"{textbook['seconds_median']:.2f}", ratio_text(result)),
        ("shapes per second", f"{ours['shapes_per_s']:.2f}", f"{textbook['shapes_per_s']:.2f}", ""),
    ]
    memory = [("batch", "chunks of", "peak MB", "by the step, MB", "seconds")] + [
        (
            str(m["batch"]),
            str(m["chunk_size"] or "-"),
            f"{m['peak_mb']:.0f}",
            f"{m['peak_mb'] - m['before_mb']:.0f}",
            f"{m['seconds']:.1f}",
        )
        for m in result["large_batches"]
    ]
    return "\n".join(
        [
            f"pretraining step, {s['batch']} x {s['points']} points, {s['image_model']} at {s['image_size']} px, amp "
            f"{s['amp']}, {place_text(result)}",
            text_table(time),
            f"memory of a step, {s['memory_points']} points, {s['memory_image_model']} at {s['memory_image_size']} px",
            text_table(memory),
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON object."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        result = own_memory(args, *args.memory_of)
        print(json.dumps(result))
        return result
    result = measure(args, argv)
    print(table(result))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
