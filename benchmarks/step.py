r"""The whole pretraining step: time against the textbook form, and memory of large batches with and without chunks.

Time: augmentation of both views, point encoder, both image encoders, losses, backward pass and Adam, for a batch that
is in memory already. Ours has its images in channels_last; the textbook form has the point encoder of
benchmarks/reference/textbook.py (all edges) and contiguous images. Both run in this process, in turn.
Memory: one step in a fresh process for each batch size, in one pass and in chunks (--chunk_size of the training
script), with which memory stays flat although the loss covers the whole batch.

  python -m benchmarks.step                                      # minutes on two cores, sizes in the table
  python -m benchmarks.step --quick
  python -m benchmarks.step --device cuda --batch 32 --batches 32 64 128 200 --memory_points 2048 \
      --memory_image_model resnet50 --memory_image_size 224 --amp bf16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import nn

from benchmarks.frame import Benchmark, enough_points
from benchmarks.measure import FORMULATIONS, compare, memory_of, place_text, ratio_text, seconds_in_turn, text_table
from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from datasets.streams import SampleStreams, Stream
from datasets.transforms import pretraining_augmentation
from engine.device import resolve_device
from engine.grad_cache import backward_in_chunks
from engine.optim import AMP_DTYPES, autocast
from models import CrossNet, build_encoder
from models.base import PointFeatures
from models.image import IMAGE_ENCODERS
from utils.cli import positive_int, run
from utils.errors import UserError
from utils.reproducible import deterministic

EMBEDDING = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured."""
    g = parser.add_argument_group("time against the textbook form")
    g.add_argument("--batch", type=positive_int, default=8, metavar="B", help="objects of a step")
    g.add_argument("--points", type=positive_int, default=2048, metavar="N", help="points of a view")
    g.add_argument("--image_model", choices=list(IMAGE_ENCODERS), default="resnet50", help="both image encoders")
    g.add_argument("--image_size", type=positive_int, default=224, metavar="PX", help="pixels of an image's side")
    g.add_argument("--k", type=positive_int, default=20, help="neighbors per point, itself included")
    g = parser.add_argument_group("memory of large batches")
    g.add_argument(
        "--batches", type=positive_int, nargs="+", default=[16, 32, 64, 128], metavar="B", help="objects of a step"
    )
    g.add_argument("--chunk_size", type=positive_int, default=16, metavar="C", help="objects of a chunk")
    g.add_argument("--memory_points", type=positive_int, default=512, metavar="N", help="points of a view")
    g.add_argument("--memory_image_model", choices=list(IMAGE_ENCODERS), default="resnet18", help="image encoders")
    g.add_argument("--memory_image_size", type=positive_int, default=112, metavar="PX", help="pixels of a side")
    g.add_argument("--only_chunks", action="store_true", help="skip steps in one pass, if they do not fit")
    g = parser.add_argument_group("both")
    g.add_argument("--amp", choices=list(AMP_DTYPES), default="off", help="mixed precision")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")


def check(args: argparse.Namespace) -> None:
    """Raise UserError if there are too few points or objects."""
    for flag in ("points", "memory_points"):
        enough_points(args, flag=flag)
    if (least := min(args.batch, args.chunk_size, *args.batches)) < 2:
        raise UserError(f"batches and chunks of {least} object leave no statistics for batch norm; use 2 or more")


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
    """Return a function that runs one step of a model with this encoder on a batch of random numbers."""
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

    @deterministic(False)  # as in a run: cuDNN searches for its fastest algorithms
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


def memory_of_step(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Measure memory and seconds of one step, in this process; ``words``: batch and chunk size."""
    batch, chunk_size = map(int, words)
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
    if device.type == "cuda":  # not on a CPU, where the peak of a process never shrinks
        step()  # it compiles kernels, and only after it Adam's moments lie beside the activations
    memory: dict[str, float] = {}
    seconds = seconds_in_turn({"step": lambda: memory.update(memory_of(step, device))}, repeats=1, device=device)
    return {"batch": batch, "chunk_size": chunk_size or None, "seconds": seconds["step"][0], **memory}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure memory in fresh processes, then time in turn."""
    kinds = (args.chunk_size,) if args.only_chunks else (0, args.chunk_size)
    memory = [BENCHMARK.fresh(args, batch, chunk) for batch in args.batches for chunk in kinds]
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
    return {**result, "large_batches": memory}


class _Features(nn.Module):
    """Adapts either encoder to ``CrossNet``."""

    def __init__(self, encoder: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.encoder, self.feature_dim = encoder, feature_dim

    def forward(self, x: torch.Tensor) -> PointFeatures:
        """(B, 3, N) -> features."""
        return PointFeatures(*self.encoder(x))


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
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


QUICK = {
    **{"batch": 2, "points": 64, "image_model": "resnet18", "image_size": 32, "repeats": 1, "batches": [2, 4]},
    **{"chunk_size": 2, "memory_points": 64, "memory_image_size": 32},
}
BENCHMARK = Benchmark(
    "step", __doc__, add_arguments, measure, table, repeats=2, quick=QUICK, check=check, part=memory_of_step
)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)
