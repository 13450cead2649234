r"""Does everything work on this machine's GPU? One command, a page with PASS or FAIL a row: `make gpu`.

Rows: driver, card and versions; kernels of both forms at real sizes against float64; every encoder with every precision
in one pass, in chunks, with channels_last and with torch.compile, its losses and gradients against the CPU in float64;
a step that never waits for the GPU; SIGTERM and --resume; NCCL; speed, memory and time by stage at 64 objects x 2,048
points with two ResNet-50, and what they make of 100 epochs over 43,783 pairs. The page is runs/gpu/report.html, the
numbers are in report.json. Ends with code 0 if everything was run and nothing failed, 1 otherwise, 2 without a GPU.

Examples:
  python -m benchmarks.gpu_check
  python -m benchmarks.gpu_check --only kernels training
  python -m benchmarks.gpu_check --dry     # the scripts on an emulated GPU (benchmarks/dry_run.py): needs none
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import html
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from benchmarks import dry_run
from benchmarks.measure import DEMO, ROOT, memory_of, provenance, seconds_of
from datasets.transforms import PairAugmentation
from engine.device import resolve_device
from engine.grad_cache import backward_in_chunks
from engine.optim import AMP_DTYPES, autocast, grad_scaler
from models import ENCODERS, CrossNet, build_encoder
from models.ops import backend
from models.ops.edge_conv import edge_conv
from models.ops.knn import flatten_neighbors, knn
from models.ops.layers import edge_block
from models.ops.precision import exact_products
from utils.cli import EXIT_TERMINATED, HelpFormatter, check_writable, positive_float, run, write_json
from utils.errors import UserError
from utils.reproducible import deterministic

PASS, FAIL, NOT_RUN, NOT_APPLICABLE = "PASS", "FAIL", "NOT RUN", "not applicable"
VARIANTS = ("plain", "chunks", "channels_last", "compile")
# How far a step may be from float64: of the loss, and the cosine between the gradients of all weights. A neighbor that
# rounding exchanges for another changes a gradient by more than rounding does, so the cosine is what tells.
BOUNDS = {"off": (1e-3, 0.999), "bf16": (0.05, 0.7), "fp16": (0.02, 0.9)}
# Gradients of these steps reach 1.3, so GradScaler's first scale of 65,536 overflows; a run lowers it in a few steps.
FP16_SCALE = 1024.0
SHAPENET_PAIRS, EPOCHS = 43_783, 100
RUN_EPOCHS = 8  # of the run that is stopped after the first: a GPU must not reach the end before the signal


@dataclass
class Row:
    """One line of the report."""

    group: str
    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    clouds: int = 2  # of the kernels' check
    points: int = 2048
    k: int = 20
    width: int = 64
    batch: int = 16  # of a compared training step
    step_points: int = 256
    image_size: int = 64
    speed_batch: int = 64
    speed_points: int = 2048
    speed_image_model: str = "resnet50"
    speed_image_size: int = 224


SMALL = Sizes(
    **{"clouds": 2, "points": 64, "k": 4, "width": 8, "batch": 8, "step_points": 24, "image_size": 16},
    **{"speed_batch": 2, "speed_points": 32, "speed_image_model": "resnet18", "speed_image_size": 32},
)


class Report:
    """Collects the results of the checks, one row each; no further check begins after ``seconds``."""

    def __init__(self, device: torch.device, *, sizes: Sizes = Sizes(), seconds: float = 900) -> None:  # noqa: B008
        self.device, self.sizes = device, sizes
        self.rows: list[Row] = []
        self.numbers: dict[str, Any] = {}
        self.end = time.perf_counter() + seconds

    def check(self, group: str, name: str, action: Callable[[], str], *, on_gpu: bool = False) -> None:
        """Run a check and add its row.

        Args:
            group: one of ``CHECKS``.
            name: of the row.
            action: returns the row's detail; a ``NotApplicable`` says why it does not apply, any other error is a FAIL,
                and so is a fallback from kernels or compiled functions to slower operations, which is only logged.
            on_gpu: whether it does not apply without a GPU.
        """
        start = time.perf_counter()
        try:
            if on_gpu and self.device.type != "cuda":
                raise NotApplicable("no GPU")
            if start > self.end:
                row = Row(group, name, NOT_RUN, "the time is over; see --minutes")
            else:
                with no_fallback():
                    row = Row(group, name, PASS, action())
        except NotApplicable as reason:
            row = Row(group, name, NOT_APPLICABLE, str(reason))
        except Exception as error:  # whatever a driver, a compiler or a script raises is the row's outcome
            row = Row(group, name, FAIL, f"{type(error).__name__}: {error}"[:2000])
        row.seconds = round(time.perf_counter() - start, 1)
        self.rows.append(row)
        print(f"{row.status:14s} {group}: {name}  {row.detail.splitlines()[0] if row.detail else ''}", flush=True)


class NotApplicable(Exception):  # noqa: N818 - not an error
    """A check cannot run on this machine."""


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Watch for fallbacks to slower operations in the block: they warn once per process and change no result.

    Raises:
        RuntimeError: there was one.
    """
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("crossnet.kernels")
    level = logger.level
    logger.setLevel(logging.WARNING)  # counted also where the project's loggers are quiet
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    if warnings:
        raise RuntimeError("; ".join(warnings))


class Deviation(Exception):  # noqa: N818 - the row says what it is
    """A result is too far from the exact one."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest exact value."""
    return ((found.detach().cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def bounded(errors: Mapping[str, float], bound: float) -> str:
    """Format errors.

    Raises:
        Deviation: one is above the bound.
    """
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not all(error <= bound for error in errors.values()):
        raise Deviation(f"{text}: above {bound:.0e}")
    return f"{text} (bound {bound:.0e})"


# --- kernels ---


def form(choice: str) -> contextlib.AbstractContextManager:
    """Use one form of the encoder's inner loops in the block."""
    return mock.patch.dict(os.environ, {backend.VARIABLE: choice})


def kernels_agree(device: torch.device, sizes: Sizes, choice: str) -> str:
    """Compare neighbors and an EdgeConv layer of one form with float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(sizes.clouds, sizes.points, 3, generator=generator)
    clouds[:, sizes.points // 2 :] = clouds[:, :1]  # as input dropout leaves them
    distances = torch.cdist(clouds.double(), clouds.double())
    exact_near = distances.sort(dim=-1, stable=True).indices[..., : sizes.k]
    with form(choice):
        near = knn(clouds.to(device), sizes.k).cpu()
    nearest = distances.gather(-1, near).sort(-1).values
    errors = {"distances of neighbors": relative_error(nearest, distances.gather(-1, exact_near).sort(-1).values)}

    # Of this seed no tie and no kink is within 1e-5, where rounding would change a gradient by more than the bound.
    torch.manual_seed(10)
    exact_block = edge_block(2 * sizes.width, sizes.width).double()
    rows = torch.randn(sizes.clouds * sizes.points, sizes.width, generator=generator)
    output_weight = torch.randn(rows.shape, generator=generator)
    index = flatten_neighbors(exact_near)

    def layer(block: torch.nn.Sequential, where: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        x = rows.to(where, dtype).requires_grad_()
        out = edge_conv(x, index.to(where), block, clouds=sizes.clouds)
        (out * output_weight.to(where, dtype)).sum().backward()
        return {"output": out, "gradient of x": x.grad, "gradient of W": block[0].weight.grad}

    exact = layer(exact_block, torch.device("cpu"), torch.float64)
    block = edge_block(2 * sizes.width, sizes.width).to(device)
    block.load_state_dict({name: value.float() for name, value in exact_block.state_dict().items()})
    with form(choice):
        found = layer(block, device, torch.float32)
    errors |= {name: relative_error(found[name], value.detach()) for name, value in exact.items()}
    return bounded(errors, 1e-3)


def check_kernels(report: Report) -> None:
    """Check both forms of the encoder's inner loops."""
    for choice in ("torch", "triton"):
        action = functools.partial(kernels_agree, report.device, report.sizes, choice)
        report.check("kernels", f"{choice} against float64", action, on_gpu=choice == "triton")

    def own_tests() -> str:
        needed = "import hypothesis, pytest, pytest_timeout"  # by the settings of the suite
        if subprocess.run([sys.executable, "-c", needed], capture_output=True, check=False).returncode:
            raise NotApplicable("pytest and its plugins are not installed (requirements-dev.txt)")
        tests = [sys.executable, "-m", "pytest", "-q", "tests/models/ops/test_backend.py"]
        return command_output(tests, 300, env={"CROSSNET_TEST_GPU": "1"})  # the suite hides GPUs

    report.check("kernels", "tests/models/ops/test_backend.py", own_tests, on_gpu=True)


# --- training steps ---


def example_inputs(sizes: Sizes) -> dict[str, Tensor]:
    """Return inputs of objects that differ; between equal objects the gradient of the loss would be rounding alone."""
    generator = torch.Generator().manual_seed(1)
    stretch = torch.rand(sizes.batch, 3, 1, generator=generator) * 2
    inputs = {
        name: torch.randn(sizes.batch, 3, sizes.step_points, generator=generator) * stretch
        for name in ("view1", "view2")
    }
    for name, channels in (("rgb", 3), ("gray", 1)):
        coarse = torch.randn(sizes.batch, channels, 3, 3, generator=generator)
        inputs[name] = interpolate(coarse, size=(sizes.image_size, sizes.image_size), mode="bilinear")
    return inputs


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Compute float32 convolutions and matrix products in float32 in the block.

    With the factors of convolutions in TF32, which PyTorch allows cuDNN, the cosine between gradients is 0.995: a bound
    below that would hide mistakes.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        with exact_products(device):
            yield
    finally:
        cudnn.allow_tf32 = before


def one_step(
    name: str, *, amp: str, variant: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[float, Tensor]:
    """Return the loss and all gradients (one vector, float64 on the CPU) of a step from fixed weights and inputs."""
    torch.manual_seed(0)
    k = {"k": min(sizes.k, sizes.step_points)} if name.startswith("dgcnn") else {}
    model = CrossNet(build_encoder(name, emb_dims=64, **k), image_model="resnet18").to(device, dtype)
    inputs = {key: x.to(device, dtype) for key, x in example_inputs(sizes).items()}
    if variant == "channels_last":
        model.image_encoders.to(memory_format=torch.channels_last)
        for key in ("rgb", "gray"):
            inputs[key] = inputs[key].contiguous(memory_format=torch.channels_last)
    if variant == "compile":
        for part in (*model.image_encoders.values(), *model.image_heads.values(), model.point_head):
            part.compile()
    scale = FP16_SCALE if amp == "fp16" else 1.0
    precision = functools.partial(autocast, device, amp)
    if variant == "chunks":
        chunk = sizes.batch // 2
        losses = backward_in_chunks(
            model, inputs, chunk_size=chunk, precision=precision, scale=lambda loss: loss * scale
        )
    else:
        with precision():
            losses = model(**inputs)
        (losses.total * scale).backward()
    gradients = torch.cat([p.grad.detach().cpu().double().flatten() for p in model.parameters()])
    return losses.total.item(), gradients / scale


def compare_step(
    name: str, *, amp: str, variant: str, device: torch.device, sizes: Sizes, exact: tuple[float, Tensor]
) -> str:
    """Compare a step with the same step in float64.

    Raises:
        Deviation: they differ too much.
    """
    with without_tf32(device):
        loss, gradients = one_step(name, amp=amp, variant=variant, device=device, dtype=torch.float32, sizes=sizes)
    error = abs(loss - exact[0]) / abs(exact[0])
    cosine = cosine_similarity(gradients, exact[1], dim=0).item()
    bound, least = BOUNDS[amp]
    text = f"loss differs by {error:.1e} (bound {bound:.0e}), cosine of gradients {cosine:.5f} (at least {least})"
    if not (error <= bound and cosine >= least):
        raise Deviation(text)
    return text


def check_training(report: Report) -> None:
    """Compare every encoder, precision and variant with the CPU in float64."""
    cpu = torch.device("cpu")
    for name in ENCODERS:
        # Within a check, like all that may fail: after an error of the GPU even a seed raises.
        @functools.cache
        def exact(variant: str, name: str = name) -> tuple[float, Tensor]:
            return one_step(name, amp="off", variant=variant, device=cpu, dtype=torch.float64, sizes=report.sizes)

        for amp in AMP_DTYPES:
            for variant in VARIANTS:

                def action(name: str = name, amp: str = amp, variant: str = variant, exact: Any = exact) -> str:
                    if variant == "compile" and name != "dgcnn_cls":
                        raise NotApplicable("the compiled parts are those of dgcnn_cls: image networks and heads")
                    reference = exact("chunks" if variant == "chunks" else "plain")
                    return compare_step(
                        name, amp=amp, variant=variant, device=report.device, sizes=report.sizes, exact=reference
                    )

                compiled = variant == "compile" and name == "dgcnn_cls"
                report.check("training", f"{name}, amp {amp}, {variant}", action, on_gpu=compiled)


# --- whole runs ---


def run_arguments(out: Path, *more: str) -> list[str]:
    """Return the command line of a short run on the demo pairs."""
    words = "--device cuda --num_points 256 --image_size 64 --image_model resnet18 --batch_size 32 --eval_every 0"
    return ["--data_root", str(DEMO), "--output_dir", str(out), "--exp_name", "check", *words.split(), *more]


@contextlib.contextmanager
def started(
    command: Sequence[str], *, stderr: int, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a command; if it still runs after the block, end it, so that it does not keep the GPU from later checks."""
    settings = {"cwd": ROOT, "text": True, "env": {**os.environ, **(env or {})}}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, **settings)
    try:
        yield process
    finally:
        process.terminate()  # first: torchrun then ends its processes, which outlive it where it is killed
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def command_output(command: list[str], seconds: float, *, env: Mapping[str, str] | None = None) -> str:
    """Return the last line of a command's output; ``env`` are variables to set.

    Raises:
        RuntimeError: the command fails.
    """
    with started(command, stderr=subprocess.PIPE, env=env) as process:
        output, errors = process.communicate(timeout=seconds)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {(errors or output).strip()[-1500:]}")
    return (output.strip().splitlines() or [""])[-1]


def stop_and_resume(
    out: Path, *, script: Sequence[str] = ("train_crossnet_con.py",), more: Sequence[str] = (), seconds: float = 120
) -> str:
    """Stop a run by SIGTERM after its first epoch, then resume it to the end.

    Args:
        out: folder for the run.
        script: what Python runs.
        more: flags of the run, besides ``run_arguments``.
        seconds: how long each of the two parts may take.

    Raises:
        RuntimeError: a run has an unexpected exit code or unexpected epochs.
    """
    command = [sys.executable, *script, *run_arguments(out, "--epochs", str(RUN_EPOCHS), *more)]
    folder = out / "check"
    metrics = folder / "metrics.jsonl"
    with started(command, stderr=subprocess.STDOUT) as process:
        end = time.perf_counter() + seconds
        while process.poll() is None and time.perf_counter() < end and not metrics.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=seconds)
    if process.returncode != EXIT_TERMINATED:
        raise RuntimeError(f"after SIGTERM exit code {process.returncode}, not {EXIT_TERMINATED}: {text[-1500:]}")
    command_output([*command, "--resume"], seconds)
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    if epochs != list(range(1, RUN_EPOCHS + 1)):
        raise RuntimeError(f"the resumed run has the epochs {epochs}")
    return f"stopped by SIGTERM, resumed, {RUN_EPOCHS} epochs"


def check_runs(report: Report) -> None:
    """Check steps without waits, a run that is stopped and resumed, and NCCL."""
    device = report.device

    def no_waits() -> str:
        step = speed_step(device, SMALL, amp="bf16")
        step()  # compiles, and copies constants
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "no operation of a step waits for the GPU"

    own = ("--device", str(device))  # which may be cuda:1; several processes share them out themselves

    def together(count: int, *more: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"]
            script = ["train_crossnet_con.py", *run_arguments(Path(folder), "--epochs", "1", *more)]
            return command_output([*launcher, *script], 180)

    def resume() -> str:
        with tempfile.TemporaryDirectory() as folder:
            return stop_and_resume(Path(folder), more=own)

    report.check("runs", "no waits (set_sync_debug_mode)", no_waits, on_gpu=True)
    report.check("runs", "SIGTERM and --resume", resume, on_gpu=True)
    report.check("runs", "torchrun, one process", lambda: together(1, *own), on_gpu=True)
    count = torch.cuda.device_count()

    def all_gpus() -> str:
        if count < 2:
            raise NotApplicable(f"{count} GPU")
        return together(count)

    report.check("runs", "NCCL, all GPUs", all_gpus)


# --- speed ---


def speed_step(device: torch.device, sizes: Sizes, *, amp: str) -> Callable[..., None]:
    """Return a pretraining step on random data on the device; it calls ``stage`` with each part's name and action."""
    torch.manual_seed(0)
    encoder = build_encoder("dgcnn_cls", k=min(sizes.k, sizes.speed_points))
    model = CrossNet(encoder, image_model=sizes.speed_image_model).to(device)
    model.image_encoders.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=device.type == "cuda")
    scaler = grad_scaler(device, amp)
    count, points = sizes.speed_batch, sizes.speed_points
    batch = {
        "index": torch.arange(count, device=device),
        "points": torch.rand(count, points, 3, device=device),
        "counts": torch.full((count,), points, device=device),
        "pixels": torch.randint(256, (count, 137, 137, 3), dtype=torch.uint8, device=device),
        "sizes": torch.tensor([[137, 137]] * count),
    }
    augmentation = PairAugmentation(num_points=points, image_size=sizes.speed_image_size, channels_last=True)

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    @deterministic(False)  # as in a run: cuDNN searches for its fastest algorithms
    def step(stage: Callable[[str, Callable[[], Any]], Any] = lambda name, action: action()) -> None:
        inputs = stage("augmentation", lambda: augmentation(batch, epoch=0, device=device))
        with autocast(device, amp):
            points = stage("point encoder", lambda: model.project_points(inputs["view1"], inputs["view2"]))
            images = [
                stage("image encoders", lambda name=name: model.project_images(name, inputs[name]))
                for name in ("rgb", "gray")
            ]
            losses = stage("loss", lambda: model.losses((*points, *images)))
        stage("backward pass", lambda: scaler.scale(losses.total).backward())
        stage("optimizer", update)

    return step


def measure_speed(device: torch.device, sizes: Sizes, amp: str, *, repeats: int = 5) -> dict[str, Any]:
    """Measure shapes per second, memory, and time by stage."""
    step = speed_step(device, sizes, amp=amp)
    step()
    memory = memory_of(step, device)
    seconds = sorted(seconds_of(step, device) for _ in range(repeats))[repeats // 2]
    stages: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        result: list[Any] = []
        stages[name] += seconds_of(lambda: result.append(action()), device)
        return result[0]

    step(timed)
    rate = sizes.speed_batch / seconds
    return {
        "shapes_per_s": round(rate, 1),
        "peak_mb": round(memory["peak_mb"]),
        "stages_ms": {name: round(1000 * taken, 2) for name, taken in stages.items()},
        "hours": round(SHAPENET_PAIRS * EPOCHS / rate / 3600, 2),
        "settings": {**asdict(sizes), "amp": amp, "channels_last": True},
    }


def check_speed(report: Report) -> None:
    """Measure the speed with and without mixed precision."""
    for amp in ("bf16", "off"):

        def action(amp: str = amp) -> str:
            found = measure_speed(report.device, report.sizes, amp)
            report.numbers[f"amp {amp}"] = found
            stages = ", ".join(f"{name} {ms} ms" for name, ms in found["stages_ms"].items())
            return (
                f"{found['shapes_per_s']} shapes/s, {found['peak_mb']} MB; {EPOCHS} epochs of {SHAPENET_PAIRS:,} pairs "
                f"are {found['hours']} hours of steps, reading and probes apart; each stage alone: {stages}"
            )

        report.check("speed", f"{report.sizes.speed_batch} x {report.sizes.speed_points}, amp {amp}", action)


def check_environment(report: Report) -> None:
    """Report driver, card and versions."""

    def action() -> str:
        about = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        if report.device.type == "cuda":
            card = torch.cuda.get_device_properties(report.device)
            about |= {
                "card": card.name,
                "GPUs": torch.cuda.device_count(),
                "memory": f"{card.total_memory / 2**30:.0f} GiB",
                "capability": f"{card.major}.{card.minor}",
                "driver": driver_version(),
                "NCCL": ".".join(map(str, torch.cuda.nccl.version()))
                if torch.distributed.is_nccl_available()
                else None,
            }
        with contextlib.suppress(ImportError):
            import triton

            about["Triton"] = triton.__version__
        report.numbers["environment"] = about
        return ", ".join(f"{name} {value}" for name, value in about.items())

    report.check("environment", "versions", action)


def driver_version() -> str:
    """Return the driver version that nvidia-smi reports."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


CHECKS: dict[str, Callable[[Report], None]] = {
    "environment": check_environment,
    "kernels": check_kernels,
    "runs": check_runs,
    "speed": check_speed,
    "training": check_training,
}


# --- the report ---

PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>CrossNet on a GPU</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }} td, th {{ border-bottom: 1px solid #ddd; padding: .3em .6em;
text-align: left; vertical-align: top }} .PASS {{ color: #06662d }} .FAIL, .NOT {{ color: #b00020; font-weight: bold }}
.not {{ color: #777 }}</style><h1>{title}</h1><p>{summary}</p><table>
<tr><th>check</th><th></th><th>result</th><th>detail</th><th>s</th></tr>{rows}</table><p><small>{about}</small></p></html>
"""


def write_report(folder: Path, rows: list[Row], *, title: str, numbers: Mapping[str, Any], about: Any) -> Path:
    """Write report.html and report.json; return the path of the page."""
    counts = {status: sum(row.status == status for row in rows) for status in (PASS, FAIL, NOT_RUN, NOT_APPLICABLE)}
    lines = "".join(
        f"<tr><td>{html.escape(row.group)}</td><td>{html.escape(row.name)}</td>"
        f'<td class="{row.status.split()[0]}">{row.status}</td><td>{html.escape(row.detail)}</td>'
        f"<td>{row.seconds}</td></tr>"
        for row in rows
    )
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(
        PAGE.format(title=title, summary=summary, rows=lines, about=html.escape(json.dumps(about))), encoding="utf-8"
    )
    found = {"title": title, "counts": counts, "rows": [asdict(row) for row in rows], "numbers": dict(numbers)}
    write_json(folder / "report.json", {**found, **about})
    print(f"{summary}; report: {page}")
    return page


def dry_rows(data_root: Path) -> list[Row]:
    """Run every case of the dry run; return a row for each."""
    rows = []
    for case, problem, seconds in dry_run.outcomes(dry_run.cases(), data_root):
        rows.append(Row("dry run", str(case), FAIL if problem else PASS, problem, round(seconds, 1)))
        print(f"{rows[-1].status:14s} {case}  {problem}", flush=True)
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--output_dir", default="runs/gpu", metavar="DIR", help="gets report.html and report.json")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="groups of checks")
    parser.add_argument("--minutes", type=positive_float, default=15.0, metavar="M", help="no check begins after these")
    parser.add_argument("--dry", action="store_true", help="the scripts on an emulated GPU; needs none")
    parser.add_argument("--data_root", default=str(DEMO), metavar="DIR", help="of --dry: the demo set")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the checks and write the report; return its rows.

    Raises:
        UserError: there is no GPU.
        SystemExit: with code 1, where a check fails or was not run.
    """
    args = parse_args(argv)
    if args.dry:
        check_writable(args.output_dir)
        rows, numbers, title, about = dry_rows(Path(args.data_root)), {}, "CrossNet on an emulated GPU", provenance()
    else:
        try:
            device = resolve_device(args.device)
        except UserError as error:
            raise UserError(
                f"{error}\nmake gpu checks a GPU. Without one: make gpu GPU_ARGS=--dry, which runs every script on an "
                "emulated GPU"
            ) from error
        check_writable(args.output_dir)
        about = provenance(device)
        report = Report(device, seconds=60 * args.minutes)
        for name in args.only:
            CHECKS[name](report)
        rows, numbers, title = report.rows, report.numbers, f"CrossNet on {about['machine']['gpu']}"
    write_report(Path(args.output_dir), rows, title=title, numbers=numbers, about=about)
    if any(row.status in (FAIL, NOT_RUN) for row in rows):
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    run(main)
