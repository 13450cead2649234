"""The least time that a pretraining step can take on a GPU, counted from its operations: nothing is measured.

The step runs on fake tensors, so this needs no GPU. Every operation counts for the longest of what it must move through
memory, what it must compute, and for selection of neighbors the instructions it must issue, plus a fixed time per
launch. The assumptions are those of ``GPU`` below: an H100 at what its kernels reach in practice, not at its data
sheet's peaks. A real step is slower where operations do not reach these rates or the host cannot launch fast enough.
Use it to compare two forms of a step, and to see which stage is worth work.

  python -m benchmarks.roofline --amp bf16 --batch_size 64 --channels_last
  python -m benchmarks.roofline --amp bf16 --batch_size 64 --channels_last --ranks 4
  python -m benchmarks.roofline --quick
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_gpu import DEVICE, Launch, Recorder, fake_gpu
from benchmarks.frame import enough_points
from benchmarks.measure import ALL_REDUCE_SECONDS, text_table
from datasets.transforms import PairAugmentation
from engine.optim import AMP_DTYPES, autocast, build_optimizer
from models import ENCODERS, CrossNet, build_encoder, crossnet, dgcnn
from models.image import IMAGE_ENCODERS
from models.ops.batch_norm import SyncBatchNorm
from utils.cli import HelpFormatter, positive_int, run, write_json
from utils.collectives import world_size
from utils.reproducible import provenance

QUICK = {"batch_size": 2, "num_points": 1024, "image_size": 32, "image_model": "resnet18"}
RENDER_PIXELS = 137  # side of a rendering as it is read, before it is resized


@dataclass(frozen=True)
class GPU:
    """What a card does in a second."""

    memory: float = 2.8e12  # bytes through its memory
    gather: float = 4.5e12  # bytes of rows gathered by index, which the cache holds in part
    float32: float = 45e12  # FLOPs of exact float32 matrix products
    float64: float = 30e12
    tf32_convolution: float = 170e12  # cuDNN's own choice for float32
    half: float = 450e12  # matrix products in bfloat16 or float16
    half_convolution: float = 330e12
    instructions: float = 2.5 * 132 * 1.7e9  # issued, a warp's each: per cycle and multiprocessor, multiprocessors, Hz
    launch: float = 2e-6  # seconds of a launch that nothing hides
    link: float = 300e9  # bytes between cards by NVLink, each way
    collective: float = ALL_REDUCE_SECONDS["cuda"]  # seconds of the smallest all-reduce of one machine


# Instructions of a warp for a row of neighbor selection, by coordinates (0: a row of products): apart from the
# halvings, and for one halving, from tests/compile_kernels.py; then halvings of a mean row. In simulated clouds with
# input dropout about half the rows need none, because k distances are equal, the others 11 or 16.
SELECTION = {0: (2600, 71, 9), 3: (3400, 73, 5)}
# How often a compiled function reads its inputs where that is not once: reductions of two shapes are two loops.
PASSES = {"_reduced": 2}
_NO_WORK = ("empty", "new_empty", "detach", "_local_scalar", "lift", "device")
_TAKES_ROWS = ("gather", "index_select", "embedding", "index")
_RADIX_PASSES = 8


@dataclass
class Cost:
    """Sums over operations."""

    bytes: float = 0.0
    flops: float = 0.0
    launches: int = 0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        """Add another's numbers."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Stages(Recorder):
    """Costs by stage and operation. A backward node belongs to the stage whose forward pass made it."""

    gpu: GPU = field(default_factory=GPU)
    ranks: int = 1
    current: str = "other"
    counting: bool = False
    costs: dict[tuple[str, str], Cost] = field(default_factory=dict)
    marks: list[tuple[int, str]] = field(default_factory=list)  # number of the next node, and the stage from there on

    @contextlib.contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        """Inside, what is done belongs to a stage."""
        before = self.current
        self._enter(stage)
        try:
            yield
        finally:
            self._enter(before)

    def staged(self, stage: str, function: Callable) -> Callable:
        """Wrap ``function`` so that it counts toward a stage."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.inside(stage):
                return function(*args, **kwargs)

        return counted

    def _enter(self, stage: str) -> None:
        self.current = stage
        self.marks.append((torch._C._autograd._get_sequence_nr(), stage))

    def entering(self, node: torch.autograd.graph.Node) -> None:
        """Find the stage of a backward node by when it was made; accumulating a gradient belongs to no stage."""
        i = bisect_right(self.marks, node._sequence_nr(), key=lambda mark: mark[0])
        self.current = "other" if "AccumulateGrad" in node.name() else self.marks[i - 1][1]

    def note(self, operation: str, *, moved: float = 0.0, flops: float = 0.0, launches: int = 1, busy: float) -> None:
        """Count an operation that keeps the GPU busy for the given seconds."""
        if self.counting:
            cost = Cost(moved, flops, launches, busy + launches * self.gpu.launch)
            self.costs.setdefault((self.current, operation), Cost()).add(cost)

    def launched(self, launch: Launch) -> None:
        """Count a Triton kernel."""
        arguments = launch.arguments
        if launch.kernel == "_select":
            fixed, halving, halvings = SELECTION[arguments["coordinates"]]
            warps = launch.programs * arguments["num_warps"]
            moved = sum(_size(x) for x in arguments.values() if torch.is_tensor(x))
            busy = max(warps * (fixed + halvings * halving) / self.gpu.instructions, moved / self.gpu.memory)
        else:
            rows, k = arguments["a"].numel(), arguments["k"]
            gathered = {"_gradient_of_neighbors": 10}.get(launch.kernel, 4)  # bytes of an edge: c, peak, place; or a
            whole = {"_gradient_of_neighbors": 12}.get(launch.kernel, 16)
            moved = rows * (gathered * k + whole)
            busy = moved / self.gpu.gather
        self.note(launch.kernel, moved=moved, busy=busy)

    def fused(self, function: Callable) -> Callable:
        """Count a compiled function: its inputs are read in each pass, its outputs written, nothing lies between."""
        passes = PASSES.get(function.__name__, 1)

        def counted(*inputs: Any) -> Any:
            counting, self.counting = self.counting, False
            out = function(*inputs)
            self.counting = counting
            moved = passes * sum(map(_size, _cuda_tensors(inputs))) + sum(map(_size, _cuda_tensors(out)))
            self.note(f"compiled {function.__name__}", moved=moved, launches=passes, busy=moved / self.gpu.memory)
            return out

        return counted

    def reduced(self, x: Tensor) -> None:
        """Count a collective: its bytes cross the link twice but for the share that is here already."""
        share = 2 * (self.ranks - 1) / self.ranks
        self.note("all-reduce", moved=_size(x), busy=self.gpu.collective + share * _size(x) / self.gpu.link)

    def by_stage(self) -> dict[str, Cost]:
        """Costs of each stage, the longest first."""
        stages: dict[str, Cost] = {}
        for (stage, _), cost in self.costs.items():
            stages.setdefault(stage, Cost()).add(cost)
        return dict(sorted(stages.items(), key=lambda item: -item[1].seconds))


def _size(x: Tensor) -> int:
    """Bytes that lie in memory: an expanded dimension is there once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def _cuda_tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if torch.is_tensor(x) and x.device == DEVICE]


class _Count(TorchDispatchMode):
    """Tell a ``Stages`` of every operation of PyTorch."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs, outputs = _cuda_tensors((args, kwargs)), _cuda_tensors(out)
        if func.is_view or name.startswith(_NO_WORK) or not (inputs or outputs):
            return out
        flops, rate = self.flops(func, args, kwargs, out, inputs)
        moved = self.moved(func, args, kwargs, inputs, outputs)
        launches = 3 if name == "convolution_backward" else 1
        busy = max(moved / self.stages.gpu.memory, flops / rate)
        self.stages.note(name, moved=moved, flops=flops, launches=launches, busy=busy)
        return out

    @staticmethod
    def moved(func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> float:
        """Bytes read and written."""
        name = func.overloadpacket.__name__
        if name in _TAKES_ROWS:
            index = sum(_size(x) for x in inputs if not x.is_floating_point())
            return 2 * sum(map(_size, outputs)) + index
        if name in ("scatter_add_", "scatter_add"):
            return 3 * _size(inputs[-1]) + _size(inputs[1])
        if name == "sort":
            return _RADIX_PASSES * sum(map(_size, outputs))
        changed = [
            x
            for value, declared in zip(args, func._schema.arguments, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
            for x in _cuda_tensors(value)
        ]
        written = {id(x): x for x in (*changed, *outputs)}.values()
        overwrites = name in ("copy_", "fill_", "zero_") or (name == "addmm_" and kwargs.get("beta") == 0)
        read = inputs[len(changed) :] if overwrites else inputs
        return sum(map(_size, read)) + sum(map(_size, written))

    def flops(self, func: Any, args: tuple, kwargs: dict, out: Any, inputs: list[Tensor]) -> tuple[float, float]:
        """FLOPs, and how many a second."""
        gpu, packet, name = self.stages.gpu, func.overloadpacket, func.overloadpacket.__name__
        if name == "addmm_":
            count = 2.0 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet in flop_registry:
            count = float(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            return 0.0, gpu.float32
        dtype = next(x.dtype for x in inputs if x.is_floating_point())
        convolution = "conv" in name
        if dtype in (torch.bfloat16, torch.float16):
            return count, gpu.half_convolution if convolution else gpu.half
        if dtype == torch.float64:
            return count, gpu.float64
        return count, gpu.tf32_convolution if convolution else gpu.float32


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; names are those of the training script."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", choices=list(ENCODERS), default="dgcnn_cls", help="point encoder")
    parser.add_argument("--k", type=positive_int, default=20, help="neighbors per point of DGCNN, itself included")
    parser.add_argument("--batch_size", type=positive_int, default=32, metavar="B", help="objects of a card's step")
    parser.add_argument("--num_points", type=positive_int, default=2048, metavar="N", help="points of a view")
    parser.add_argument("--image_model", choices=list(IMAGE_ENCODERS), default="resnet50", help="both image encoders")
    parser.add_argument("--image_size", type=positive_int, default=224, metavar="PX", help="pixels of an image's side")
    parser.add_argument("--amp", choices=list(AMP_DTYPES), default="off", help="mixed precision")
    parser.add_argument("--channels_last", action="store_true", help="memory layout of the image encoders")
    parser.add_argument("--ranks", type=positive_int, default=1, metavar="R", help="cards, one process each")
    parser.add_argument("--operations", type=int, default=0, metavar="O", help="also list the O longest operations")
    parser.add_argument("--quick", action="store_true", help="a try-out of seconds at sizes that say nothing")
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    return parser


def count_step(args: argparse.Namespace) -> Stages:
    """Costs of the second step: the first one makes the optimizer's state."""
    stages = Stages(ranks=args.ranks)
    with fake_gpu(stages, ranks=args.ranks), _staged_functions(stages), torch.device(DEVICE):
        step = training_step(args, stages)
        step()
        with _Count(stages):
            stages.counting = True
            step()
    return stages


@contextlib.contextmanager
def _staged_functions(stages: Stages) -> Iterator[None]:
    """Inside, the point encoder's parts count as stages."""
    with contextlib.ExitStack() as stack:
        for module, name, stage in (
            (dgcnn, "knn", "neighbours"),
            (dgcnn, "edge_conv", "EdgeConv"),
            (dgcnn, "edge_conv_two_layers", "EdgeConv"),
            (dgcnn, "pool_pointwise", "conv5 and pooling"),
            (crossnet, "pooled_features", "point encoder, rest"),
        ):
            function = stages.staged(stage, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def training_step(args: argparse.Namespace, stages: Stages) -> Callable[[], None]:
    """Return a function that runs the training script's step on a batch of shapes."""
    encoder = build_encoder(args.model, **({"k": args.k} if args.model.startswith("dgcnn") else {}))
    model = CrossNet(encoder, image_model=args.image_model)
    if args.channels_last:
        _to_channels_last(model.image_encoders)
    if world_size() > 1:
        SyncBatchNorm.convert(model)
    for net in model.image_encoders.values():
        net.forward = stages.staged("images", net.forward)
    optimizer = build_optimizer(model, argparse.Namespace(use_sgd=False, lr=1e-3, weight_decay=1e-5))
    count = args.batch_size
    sides = [[RENDER_PIXELS, RENDER_PIXELS]] * count
    batch: dict[str, Any] = {
        "index": torch.arange(count),
        "points": torch.empty(count, args.num_points, 3),
        "counts": torch.full((count,), args.num_points),
        "pixels": torch.empty(count, RENDER_PIXELS, RENDER_PIXELS, 3, dtype=torch.uint8),
        "sizes": SimpleNamespace(tolist=lambda: sides),  # real numbers: the step is on fake tensors, which have none
    }
    augmentation = PairAugmentation(
        num_points=args.num_points, image_size=args.image_size, channels_last=args.channels_last
    )

    def step() -> None:
        with stages.inside("augmentation"):
            inputs = augmentation(batch, epoch=1, device=DEVICE)
        with stages.inside("heads and loss"), autocast(DEVICE, args.amp):
            loss = model(**inputs).total
        loss.backward()
        with stages.inside("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _to_channels_last(module: torch.nn.Module) -> None:
    """``module.to(memory_format=...)``, which cannot change fake parameters in place."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                moved = parameter.detach().contiguous(memory_format=torch.channels_last)
                child._parameters[name] = torch.nn.Parameter(moved)


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
    s = result["settings"]
    rows = [("stage", "GB", "GFLOP", "launches", "ms")]
    for stage, cost in (*result["stages"].items(), ("all", result["total"])):
        numbers = (f"{cost['bytes'] / 1e9:.1f}", f"{cost['flops'] / 1e9:.0f}", str(cost["launches"]))
        rows.append((stage, *numbers, f"{1e3 * cost['seconds']:.1f}"))
    title = (
        f"counted, not measured: {s['batch_size']} objects x {s['num_points']} points a card, {s['model']}, two "
        f"{s['image_model']} at {s['image_size']} px, amp {s['amp']}{', channels_last' if s['channels_last'] else ''}, "
        f"{s['ranks']} card(s)"
    )
    lines = [title, text_table(rows), f"at most {result['shapes_per_s']:.0f} shapes/s a card"]
    if result["collectives"]:
        lines[-1] += f"; {result['collectives']} all-reduces besides those of gradients, which overlap"
    for stage, operation, cost in result["operations"]:
        lines.append(f"  {stage}: {operation}, {cost['bytes'] / 1e9:.1f} GB, {1e3 * cost['seconds']:.2f} ms")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Count, print the table, write the JSON object."""
    args = build_parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if args.model.startswith("dgcnn"):
        enough_points(args, flag="num_points")
    stages = count_step(args)
    total = Cost()
    for cost in stages.costs.values():
        total.add(cost)
    longest = sorted(stages.costs.items(), key=lambda item: -item[1].seconds)[: args.operations]
    names = ("model", "k", "batch_size", "num_points", "image_model", "image_size", "amp", "channels_last", "ranks")
    result = {
        "shapes_per_s": args.batch_size / total.seconds,
        "total": asdict(total),
        "stages": {stage: asdict(cost) for stage, cost in stages.by_stage().items()},
        "collectives": sum(cost.launches for (_, name), cost in stages.costs.items() if name == "all-reduce"),
        "operations": [(stage, name, asdict(cost)) for (stage, name), cost in longest],
        "assumptions": asdict(stages.gpu),
        "settings": {name: getattr(args, name) for name in names},
        **provenance(),
    }
    print(table(result))
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main)
