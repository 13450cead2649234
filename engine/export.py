"""Export encoders for other programs: as safetensors, torch.export program or ONNX."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoint import FORMAT
from engine.load_model import describe_encoder, encoder_from_checkpoint
from models import PointEncoder
from utils.errors import UserError
from utils.files import replacing
from utils.weight_files import SUFFIX, write_weights

logger = logging.getLogger("crossnet")
FORMATS = {"safetensors": SUFFIX, "torch_export": ".pt2", "onnx": ".onnx"}
KIND = "point-encoder"  # of an exported safetensors file; checkpoints have that of their task
OPSET = 18
TOLERANCE = 1e-4
# Random inputs on which an exported file is compared with the encoder: clouds, and points beyond k.
COMPARED_SIZES = ((1, 0), (2, 100), (3, 333))
_INPUT, _OUTPUTS = "points", ("pooled", "local")


class Difference(NamedTuple):
    """Distance of features from reference features, the largest over all input sizes, of pooled and local ones."""

    largest: float  # of a number, relative to the largest feature
    norm: float  # of all features, relative to their norm


def describe_weights(encoder: nn.Module, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of an exported file: the encoder, and what the checkpoint says about its training."""
    ours = payload if "point_encoder" in payload else {}
    training = {**ours, **ours.get("progress", {})}
    return {
        "format": FORMAT,
        "kind": KIND,
        "encoder": describe_encoder(encoder),
        **{key: training[key] for key in ("epoch", "step", "git_commit") if key in training},
    }


def export(
    encoder: PointEncoder, path: str | os.PathLike[str], form: str, *, about: Mapping[str, Any], half: bool = False
) -> Difference | None:
    """Export an encoder, then compare the exported file with it.

    Args:
        encoder: on the CPU; left in eval mode.
        path: file to write.
        form: one of ``FORMATS``. Programs (``torch_export``, ``onnx``) take points (B, C, N) with any B and any N >= k,
            and return pooled features (B, feature_dim) and local features (B, local_dim, N).
        about: metadata to store, from ``describe_weights``.
        half: round matrices to float16. Vectors (batch norm, biases) stay float32: they are small, and their values
            span many magnitudes. Safetensors only.

    Returns:
        Distance of the file's features from the encoder's; None if the package that runs the file is not installed.

    Raises:
        UserError: the file cannot be written, a weight is too large for float16, or a package or a newer PyTorch is
            needed.
    """
    encoder.eval()
    if form == "safetensors":
        write_weights(path, _rounded(encoder) if half else encoder.state_dict(), about)
        return compare(encoder, encoder_from_checkpoint(path).eval())
    if half:
        raise UserError("--half rounds weights in --format safetensors only; a program computes in float32")
    if not hasattr(torch.compiler, "is_exporting"):
        raise UserError(f"--format {form} needs PyTorch 2.7 or newer, this is {torch.__version__}")
    packed = _onnx_file(encoder, about) if form == "onnx" else _exported_file(encoder, about)
    with replacing(path) as temporary:
        temporary.write_bytes(packed)
    run = _onnx_runner(path) if form == "onnx" else torch.export.load(path).module()
    return None if run is None else compare(encoder, run)


def _rounded(encoder: nn.Module) -> dict[str, Tensor]:
    state = encoder.state_dict()
    matrices = {name: tensor.half() for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1}
    if large := [name for name, tensor in matrices.items() if not tensor.isfinite().all()]:
        raise UserError(f"weights are too large for float16 ({', '.join(large)}); export without --half")
    return state | matrices


class _Program(nn.Module):
    """Wrap an encoder to return a plain tuple, so that the exported program loads without this repository."""

    def __init__(self, encoder: PointEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.encoder(points))


def _example(encoder: PointEncoder) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Return example inputs for tracing, and their dynamic dimensions."""
    least = _least_points(encoder)
    free = {0: torch.export.Dim("clouds"), 2: torch.export.Dim("points", min=least)}
    return (torch.randn(2, encoder.in_channels, least + 17),), (free,)


def _least_points(encoder: PointEncoder) -> int:
    return getattr(encoder, "k", 1)


@torch.no_grad()
def _exported_file(encoder: PointEncoder, about: Mapping[str, Any]) -> bytes:
    inputs, free = _example(encoder)
    program = torch.export.export(_Program(encoder).eval(), inputs, dynamic_shapes=free)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"crossnet.json": json.dumps(about)})
    return buffer.getvalue()


@torch.no_grad()
def _onnx_file(encoder: PointEncoder, about: Mapping[str, Any]) -> bytes:
    for package in ("onnx", "onnxscript"):
        if _optional(package) is None:
            raise UserError("--format onnx needs two packages: pip install onnx onnxscript")
    inputs, free = _example(encoder)
    program = torch.onnx.export(
        _Program(encoder).eval(),
        inputs,
        dynamo=True,
        dynamic_shapes=free,
        input_names=[_INPUT],
        output_names=list(_OUTPUTS),
        opset_version=OPSET,
        verbose=False,
    )
    program.model.metadata_props["crossnet"] = json.dumps(about)
    return program.model_proto.SerializeToString()


def _onnx_runner(path: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]] | None:
    runtime = _optional("onnxruntime")
    if runtime is None:
        return None
    session = runtime.InferenceSession(str(Path(path)), providers=["CPUExecutionProvider"])
    return lambda points: [torch.from_numpy(out) for out in session.run(list(_OUTPUTS), {_INPUT: points.numpy()})]


def _optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


@torch.no_grad()
def compare(encoder: PointEncoder, run: Callable[[Tensor], Any]) -> Difference:
    """Compare features of random clouds of ``COMPARED_SIZES``.

    Args:
        encoder: the reference, in eval mode.
        run: takes points (B, C, N); returns pooled and local features.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for clouds, more in COMPARED_SIZES:
        points = torch.randn(clouds, encoder.in_channels, _least_points(encoder) + more, generator=generator)
        for mine, other in zip(encoder(points), run(points), strict=True):
            error = mine - other
            found.append(torch.stack([error.abs().max() / mine.abs().max(), error.norm() / mine.norm()]))
    return Difference(*torch.stack(found).amax(0).tolist())
