"""Describe a checkpoint: its entries, its origin, and the encoder that its tensors fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import checkpoint_errors, load_checkpoint
from engine.load_model import misfits
from engine.published_weights import find_state, published_arguments, split_published_state
from models import ENCODERS, build_encoder
from models.task_heads import TASKS
from utils.errors import CheckpointError
from utils.files import sha256

SHOWN_NAMES = 5
_PROGRAMS = {".onnx": "onnxruntime.InferenceSession(FILE)", ".pt2": "torch.export.load(FILE).module()"}


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a checkpoint of this project, or published weights.

    Returns:
        Plain types: file, bytes, sha256, origin, entries; of our checkpoints also kind, epoch, step, git_commit,
        versions, settings and the head's sizes; and the encoder that fits, or the nearest one, as ``encoder``,
        ``kwargs``, ``fitting`` (number of tensors) and ``misfits`` (names of tensors by what is wrong with them).

    Raises:
        CheckpointError: the file cannot be read, or it is a program that needs no checkpoint.
    """
    path = Path(path)
    if path.suffix in _PROGRAMS:
        raise CheckpointError(f"{path} is an exported program, which runs by itself: {_PROGRAMS[path.suffix]}")
    payload = load_checkpoint(path)
    found: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    with checkpoint_errors(path):
        found |= _ours(payload, path) if "point_encoder" in payload else _others(payload, path)
    found["entries"] = [{"name": str(name), "holds": _content(value)} for name, value in payload.items()]
    return found


def _ours(payload: Mapping[str, Any], path: Path) -> dict[str, Any]:
    progress = payload.get("progress", payload)
    found = {
        "origin": f"checkpoint of this project, format {payload['format']}",
        "kind": payload.get("kind"),
        "epoch": progress.get("epoch"),
        "step": progress.get("step"),
        "git_commit": payload.get("git_commit"),
        "versions": payload.get("versions"),
        "settings": payload.get("arguments"),
        "head": payload.get("head_sizes"),
    }
    described = payload["encoder"]
    fit = _compare_with_encoder(payload["point_encoder"], described["name"], described["kwargs"], path)
    return {key: value for key, value in found.items() if value is not None} | fit


def _others(payload: Mapping[str, Any], path: Path) -> dict[str, Any]:
    state = find_state(payload)
    if state is None:
        return {"origin": "no tensors that could be weights"}
    fits = []
    for name in ENCODERS:
        own = split_published_state(state.tensors, name)[0]
        fit = _compare_with_encoder(own, name, published_arguments(own, name), path)
        fits.append({**fit, "left_out": len(state.tensors) - len(own)})
    about = {"origin": "weights of another origin", "weights": state.describe()}
    nearest = max(fits, key=lambda fit: (fit["fitting"], -sum(map(len, fit["misfits"].values()))))
    if not nearest["fitting"]:
        return about
    nearest["kwargs"].pop("k", None)  # not in such files
    return about | nearest


def _compare_with_encoder(state: Mapping[str, Any], name: str, kwargs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Compare a state dict with an encoder."""
    try:
        with torch.device("meta"):
            encoder = build_encoder(name, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} describes an encoder that this version does not have ({error})") from error
    wrong = {kind: names for kind, names in misfits(encoder, state).items() if names}
    names = encoder.state_dict().keys() & state.keys()
    fitting = len(names) - sum(len(wrong.get(kind, [])) for kind in ("of another shape", "of another type"))
    return {"encoder": name, "kwargs": dict(kwargs), "fitting": fitting, "misfits": wrong}


def _content(value: Any) -> str:
    """Describe an entry of a file in a few words."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        tensors = [item for item in value.values() if isinstance(item, Tensor)]
        if tensors:
            return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} numbers"
        names = [str(key)[:40] for key in list(value)[:SHOWN_NAMES]] + ["..."] * (len(value) > SHOWN_NAMES)
        return f"{len(value)} entries: {', '.join(names)}" if value else "empty"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)[:80]
    return type(value).__name__


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what ``inspect`` found as lines of text."""
    yield f"{found['file']}: {found['bytes']:,} bytes, SHA-256 {found['sha256']}"
    yield f"  {found['origin']}" + (f": {found['kind']}" if "kind" in found else "")
    if "weights" in found:
        yield f"  weights: {found['weights']}"
    if "encoder" in found:
        yield from _report_fit(found)
    else:
        yield f"  encoder: none; no tensor has the name and shape of one of {', '.join(ENCODERS)}"
    rest = ("epoch", "step", "git_commit", "versions", "settings", "head")
    for key in (key for key in rest if key in found):
        value = found[key]
        yield f"  {key}: " + (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        )
    yield "  entries:"
    yield from (f"    {entry['name']}: {entry['holds']}" for entry in found["entries"][:40])
    if len(found["entries"]) > 40:
        yield f"    and {len(found['entries']) - 40} more"


def _report_fit(found: Mapping[str, Any]) -> Iterator[str]:
    settings = ", ".join(f"{key} {value}" for key, value in found["kwargs"].items())
    left_out = f"; {found['left_out']} others are of heads, or repeat one" if found.get("left_out") else ""
    encoder = f"{found['encoder']} ({settings})"
    if not found["misfits"]:
        yield f"  encoder: {encoder}: all {found['fitting']} tensors fit{left_out}"
        head = found.get("kind") in TASKS
        yield f"  use: --pretrain_path or --model_path{', with --eval too: it has a head' if head else ''}"
        return
    yield f"  encoder: none fits exactly; the nearest is {encoder}, {found['fitting']} tensors fit{left_out}"
    for kind, names in found["misfits"].items():
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        yield f"    {len(names)} {kind}: {', '.join(names[:SHOWN_NAMES])}{more}"
