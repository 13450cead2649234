"""Every form of training on an emulated GPU, through the real scripts: what fails on a GPU, found without one.

Each case runs a script's ``main``: data, model, two optimizer steps with augmentation, an evaluation, a checkpoint. It
fails on an error, on a wait of the host for the GPU inside a step, and on a parameter without a gradient; see
``benchmarks.emulated_gpu``. Numbers, memory and speed are not checked: ``python -m benchmarks.gpu_check`` does that on
a GPU.

Examples:
  python -m benchmarks.dry_run
  python -m benchmarks.dry_run --only "pretraining, dgcnn_cls"
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet

import train_crossnet_con as pretraining
from benchmarks.emulated_gpu import EmulatedGpu, emulated_gpu
from benchmarks.fake_gpu import load_kernels, set_device_guard
from benchmarks.measure import DEMO
from benchmarks.reference.tiny_image_net import TinyImageNet
from datasets.shapenet_render import ShapeNetRender
from datasets.transforms import RenderPixels
from downstream.classification import finetune
from downstream.segmentation import main_partseg, main_semseg
from engine.run_folder import RunFolder
from models import ENCODERS
from models.image import IMAGE_ENCODERS
from utils.cli import HelpFormatter, run, write_json
from utils.errors import UserError

AMP = ("off", "bf16", "fp16")
FORMS = ("torch", "triton")
# Ways to train, each with the flags that ask for it. Two steps: 8 pairs make two batches of 4, or one of 2 x 4.
VARIANTS = {
    "plain": "",
    "chunks": "--chunk_size 2",
    "accumulate": "--accumulate 2 --epochs 2",
    "channels_last": "--channels_last",
    "ave": "--objective ave",
    "mask": "--mask_same_object",
    "one modality": "--image_modality gray",
    "mixed image sizes": "",
    "SGD": "--use_sgd",
}
PRETRAINING = (
    "--num_points 24 --emb_dims 16 --image_model resnet18 --image_size 16 --batch_size 4 --epochs 1 "
    "--workers 0 --eval_points 24 --eval_dataset demo"
)
FINE_TUNING = "--emb_dims 16 --batch_size 4 --epochs 1 --workers 0"
TASKS: dict[str, tuple[Callable[[list[str]], Any], Sequence[str], str]] = {
    "parts": (main_partseg.main, ("dgcnn_partseg", "pointnet_partseg"), "--num_points 32"),
    "rooms": (main_semseg.main, ("dgcnn_semseg",), "--train_area 1 --test_area 2"),
    "classification": (finetune.main, ("dgcnn_cls", "pointnet_cls"), "--dataset demo --num_points 24"),
}
RANKS = 4


@dataclass(frozen=True)
class Case:
    """One run on the emulated GPU."""

    task: str  # pretraining, or one of TASKS
    encoder: str
    amp: str
    form: str  # of the encoder's inner loops
    variant: str = "plain"
    processes: int = 1
    resnet: bool = False  # a real ResNet, of 10 layers, in the place of one convolution

    def __str__(self) -> str:
        """Show what is particular."""
        parts = [self.task, self.encoder, f"amp {self.amp}", self.form, self.variant]
        return ", ".join(parts + ["ResNet"] * self.resnet + [f"{self.processes} ranks"] * (self.processes > 1))

    @property
    def row(self) -> str:
        """The line of the table that the case counts in."""
        return f"{self.task}, {self.processes} ranks" if self.processes > 1 else f"{self.task}, {self.encoder}"


def forms_of(encoder: str) -> Sequence[str]:
    """PointNet has no neighbors, so kernels make no difference."""
    return FORMS if encoder.startswith("dgcnn") else FORMS[:1]


def cases() -> list[Case]:
    """Every encoder with every precision and form, and every pair of (encoder, precision, form, variant) values."""
    found = [
        Case("pretraining", encoder, amp, form) for encoder in ENCODERS for amp in AMP for form in forms_of(encoder)
    ]
    for i, (encoder, variant) in enumerate(itertools.product(ENCODERS, list(VARIANTS)[1:])):
        # Encoders and variants in full; precisions and forms in turn, so that each meets each variant.
        number = i // (len(VARIANTS) - 1) + i % (len(VARIANTS) - 1)
        forms = forms_of(encoder)
        found.append(Case("pretraining", encoder, AMP[number % 3], forms[number % len(forms)], variant))
    found.append(Case("pretraining", "dgcnn_cls", "bf16", "torch", "channels_last", resnet=True))
    found += [
        Case(task, encoder, amp, form)
        for task, (_, encoders, _) in TASKS.items()
        for encoder in encoders
        for amp in AMP
        for form in forms_of(encoder)
    ]
    found += [
        Case("pretraining", encoder, AMP[i % 3], forms_of(encoder)[-1], variant, processes=RANKS)
        for i, (encoder, variant) in enumerate(
            [*((encoder, "plain") for encoder in ENCODERS), ("dgcnn_cls", "chunks"), ("dgcnn_cls", "mask")]
        )
    ]
    found += [Case(task, encoders[0], "bf16", "triton", processes=RANKS) for task, (_, encoders, _) in TASKS.items()]
    return list(dict.fromkeys(found))


def short_resnet(weights: None = None) -> ResNet:
    """Return a ResNet of ten layers."""
    return ResNet(BasicBlock, [1, 1, 1, 1])


@contextlib.contextmanager
def small_networks(case: Case) -> Iterator[None]:
    """Inside, image networks are small, and what has no part in a step is left out."""
    cut = RenderPixels.__call__
    odd = itertools.count()

    def uneven(self: RenderPixels, image: Any) -> Tensor:
        return cut(self, image)[next(odd) % 2 :]

    # At its usual start the scale of fp16 overflows, and the first steps are left out.
    scaler = functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=1.0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.amp.GradScaler, "__init__", scaler))
        stack.enter_context(mock.patch.object(RunFolder, "draw_curves", lambda self: None))
        network = short_resnet if case.resnet else TinyImageNet
        stack.enter_context(mock.patch.dict(IMAGE_ENCODERS, {"resnet18": network}))
        if case.variant == "mixed image sizes":
            stack.enter_context(mock.patch.object(RenderPixels, "__call__", uneven))
        yield


def arguments(case: Case, root: Path, out: Path, shapes: Path) -> list[str]:
    """Return the script's command line."""
    common = ["--data_root", str(root), "--output_dir", str(out), "--exp_name", "dry", "--overwrite"]
    common += ["--model", case.encoder, "--amp", case.amp, "--device", "cuda"]
    size = ["--batch_size", "2" if case.task == "pretraining" else "1"] if case.processes > 1 else []
    size += ["--k", "4"] if case.encoder.startswith("dgcnn") else []
    if case.task != "pretraining":
        return [*common, *FINE_TUNING.split(), *TASKS[case.task][2].split(), *size]
    size += ["--eval_every", "0"] if case.processes > 1 else []  # the others' shares of the probe may be smaller
    return [*common, "--list", str(shapes), *PRETRAINING.split(), *VARIANTS[case.variant].split(), *size]


def run_case(case: Case, root: Path, out: Path) -> EmulatedGpu:
    """Run a case.

    Args:
        case: what to run.
        root: folder of the data sets in the layout of ``data/demo``.
        out: folder for the run.

    Returns:
        What the emulated GPU noticed.

    Raises:
        Exception: whatever the script raises.
    """
    ids = ShapeNetRender(str(root)).ids
    shapes = out / "shapes.txt"
    shapes.write_text("\n".join(ids[: 8 * case.processes // (2 if case.processes > 1 else 1)]) + "\n")
    script = pretraining.main if case.task == "pretraining" else TASKS[case.task][0]
    with small_networks(case), emulated_gpu(form=case.form, processes=case.processes) as gpu:
        script(arguments(case, root, out, shapes))
    if gpu.steps < 2:
        gpu.problems.append(f"{gpu.steps} optimizer steps, expected 2 or more")
    if case.form == "triton" and case.encoder.startswith("dgcnn") and not gpu.launches:
        gpu.problems.append("no Triton kernel was launched")
    if case.processes > 1 and not gpu.reduced:
        gpu.problems.append("nothing was summed over the processes")
    return gpu


def outcome(case: Case, root: Path, out: Path) -> str:
    """Run a case; return what is wrong, or an empty text."""
    try:
        return "; ".join(run_case(case, root, out).problems[:3])
    except Exception as error:  # reported as the case's outcome
        return f"{type(error).__name__}: {error}"


def outcomes(chosen: Sequence[Case], root: Path) -> Iterator[tuple[Case, str, float]]:
    """Run cases, their output hidden; yield each with what is wrong and its seconds.

    Raises:
        UserError: no GPU can be emulated here, so that every case would fail.
    """
    set_device_guard()
    if any(case.form == "triton" for case in chosen):
        load_kernels()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                problem = outcome(case, root, Path(folder))
            yield case, problem, time.perf_counter() - start


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Log errors alone in the block: every case would say again what training says once."""
    logger = logging.getLogger("crossnet")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; returns the outcome of each.

    Raises:
        UserError: no case is chosen, or no GPU can be emulated here.
        SystemExit: with code 1, where a case fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dry_run", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--data_root", default=str(DEMO), metavar="DIR", help="the demo set")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="also write the outcomes to FILE")
    args = parser.parse_args(argv)
    chosen = [case for case in cases() if args.only in str(case)]
    if not chosen:
        raise UserError(f"no case has --only {args.only!r} in its name; one is called {str(cases()[0])!r}")
    found: dict[str, str] = {}
    start = time.perf_counter()
    with errors_only():
        for case, problem, _ in outcomes(chosen, Path(args.data_root)):
            found[str(case)] = problem
            if problem:
                print(f"FAIL  {case}: {problem}", flush=True)
    counts, bad = Counter(case.row for case in chosen), Counter(case.row for case in chosen if found[str(case)])
    for row, count in counts.items():
        print(f"{row:40s} {count - bad[row]:3d} of {count} pass")
    seconds = time.perf_counter() - start
    print(f"{len(chosen) - sum(bad.values())} of {len(chosen)} cases pass, in {seconds:.0f} s")
    write_json(args.json, {"cases": found, "seconds": round(seconds, 1)})
    if bad:
        raise SystemExit(1)
    return found


if __name__ == "__main__":
    run(main)
