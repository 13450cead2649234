"""Describe encoders and fine-tuned models in checkpoints, and rebuild them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import checkpoint_errors, load_checkpoint
from engine.published_weights import guess_encoder, published_arguments, published_state, split_published_state
from models import ENCODER_ALIASES, ENCODERS, CrossNet, build_encoder, encoder_arguments, resolve_encoder_name
from models.pretrained import pretrained_file
from models.projection_heads import HIDDEN_DIM, point_projection
from models.task_heads import TASKS, FineTuned
from utils.errors import CheckpointError, UserError

logger = logging.getLogger("crossnet")


DEFAULT_ENCODER = "dgcnn_cls"
PRETRAINED = "pretrained"


def find_weights(source: str | os.PathLike[str], *, model: str | None = None) -> Path:
    """Return the file that ``--model_path`` or ``--pretrain_path`` selects.

    Args:
        source: a file; ``pretrained:NAME``, the weights of that name in this repository; or ``pretrained``, those of
            the encoder ``model``. A file named ``pretrained`` has precedence.
        model: name of an encoder, or a released alias; None means ``DEFAULT_ENCODER``.

    Raises:
        CheckpointError: there are no weights of that name, or their file is missing or not the published one.
    """
    word, _, name = os.fspath(source).partition(":")
    if word != PRETRAINED or os.path.isfile(source):
        return Path(source)
    name = name or model or DEFAULT_ENCODER
    return pretrained_file(ENCODER_ALIASES.get(name, name))


def describe_encoder(encoder: nn.Module) -> dict[str, Any]:
    """Return the name and keyword arguments that rebuild an encoder of ``models.ENCODERS``."""
    name = next(name for name, kind in ENCODERS.items() if type(encoder) is kind)
    return {"name": name, "kwargs": encoder.config()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, path: str | os.PathLike[str], what: str) -> None:
    """Load a state dict that must match exactly.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape or type, or not finite; the message names them.
    """
    _check_fit(module, state, path=path, what=what)
    module.load_state_dict(state)


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], *, path: str | os.PathLike[str], what: str) -> None:
    """Check that a state dict matches a module, which may be on the meta device; raises as ``load_strictly``."""
    problems = misfits(module, state)
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointError(f"{path} does not fit {what}: tensors {text}")


def misfits(module: nn.Module, state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Compare a state dict with a module, possibly on the meta device; return the names of tensors by problem."""
    expected = module.state_dict()
    common = {name: (state[name], expected[name]) for name in expected if isinstance(state.get(name), Tensor)}
    return {
        "missing": [name for name in expected if name not in common],
        "unknown": [str(name) for name in state if name not in common],
        "of another shape": [
            f"{name} is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
            for name, (ours, theirs) in common.items()
            if ours.shape != theirs.shape
        ],
        "of another type": [
            f"{name} is {ours.dtype}, not {theirs.dtype}"
            for name, (ours, theirs) in common.items()
            if ours.is_floating_point() != theirs.is_floating_point() or ours.is_complex()
        ],
        "not finite": [name for name, (ours, _) in common.items() if not ours.isfinite().all()],
    }


def _is_setting(value: Any, default: Any) -> bool:
    """Return whether a value is a plausible encoder setting: a plain type, as the default, and not too large."""
    if isinstance(value, list | tuple):
        return (default is None or isinstance(default, list | tuple)) and all(_is_setting(item, None) for item in value)
    plain = isinstance(value, bool | str | float) or (isinstance(value, int) and abs(value) < 1 << 31)
    return plain and (default is None or type(value) is type(default))


def encoder_from_flags(
    model: str, *, k: int | None = None, emb_dims: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Build a randomly initialized encoder from ``--model``, ``--k``, ``--emb_dims`` and ``--in_channels``.

    Args:
        model: encoder name or a released alias.
        k: number of neighbors; None means the released value, here and below.
        emb_dims: width of the embedding.
        in_channels: number of values per point.

    Raises:
        UserError: the encoder does not have one of these settings.
    """
    known, name = encoder_arguments(model), resolve_encoder_name(model)
    given = {"k": k, "emb_dims": emb_dims, "in_channels": in_channels}
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in known:
            raise UserError(f"--{key}: {name} has no such setting")
    return build_encoder(name, **given)


def encoder_from_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    k: int | None = None,
    emb_dims: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """Rebuild a point encoder and load its weights strictly.

    Our checkpoints need no other argument. Weights published by DGCNN repositories, CrossPoint or CrossNet contain
    neither the encoder's name nor k: the name is inferred from the tensors and k defaults to the released 20, both with
    a warning.

    Args:
        path: checkpoint, state dict, or another source of ``find_weights``.
        model: encoder name; must agree with the checkpoint.
        k: number of neighbors; overrides the checkpoint's with a warning.
        emb_dims: must agree with the weights.
        in_channels: values per point that the encoder must take; None takes any number.

    Returns:
        The encoder, in training mode, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is of another model, or has tensors that do not fit.
    """
    path = find_weights(path, model=model)
    payload = load_checkpoint(path)
    with checkpoint_errors(path):
        encoder, heads = _encoder_from_payload(payload, path, model=model, k=k, emb_dims=emb_dims)
    if in_channels not in (None, encoder.in_channels):
        raise CheckpointError(f"{path} holds an encoder of {encoder.in_channels} values per point, not {in_channels}")
    _log_left_out(path, heads)
    return encoder


def _log_left_out(path: str | os.PathLike[str], heads: Iterable[str]) -> None:
    """Log how many tensors of a file are not used."""
    if count := len(list(heads)):
        logger.info("%s: %d tensors of heads are left out", path, count)


def _encoder_from_payload(
    payload: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    k: int | None = None,
    emb_dims: int | None = None,
    released_k: int | None = None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Rebuild an encoder as ``encoder_from_checkpoint``; ``released_k`` is the default for published weights.

    Returns:
        The encoder, and the tensors of heads in published weights.
    """
    heads: dict[str, Tensor] = {}
    if "encoder" in payload and "point_encoder" in payload:
        name, kwargs = payload["encoder"]["name"], dict(payload["encoder"]["kwargs"])
        defaults = encoder_arguments(name) if name in ENCODERS else {}  # build() refuses unknown names
        if not all(_is_setting(value, defaults.get(key)) for key, value in kwargs.items()):
            raise CheckpointError(f"{path} describes an encoder with settings of the wrong type or size: {kwargs}")
        state = payload["point_encoder"]
        if model is not None and resolve_encoder_name(model) != name:
            raise CheckpointError(f"{path} holds a {name}, not the {resolve_encoder_name(model)} of --model")
    else:
        state = published_state(payload, path)
        name = guess_encoder(state, path) if model is None else resolve_encoder_name(model)
        if model is None:
            logger.warning("%s does not name its encoder; by its tensors it is a %s", path, name)
        state, heads = split_published_state(state, name)
        kwargs = published_arguments(state, name)
        if "k" in kwargs:
            kwargs["k"] = released_k or kwargs["k"]
        if k is None and "k" in kwargs:
            logger.warning("%s does not contain its number of neighbors; --k %d is used", path, kwargs["k"])
        elif "k" in kwargs:
            kwargs["k"] = k
    if emb_dims is not None and emb_dims != kwargs["emb_dims"]:
        raise CheckpointError(f"{path} has an embedding of {kwargs['emb_dims']}, not --emb_dims {emb_dims}")
    if k is not None and "k" in kwargs and k != kwargs["k"]:
        logger.warning("%s was trained with k = %d; --k %d is used instead", path, kwargs["k"], k)
        kwargs["k"] = k

    def build() -> nn.Module:
        try:
            encoder = build_encoder(name, **kwargs)
            if missing := sorted(encoder_arguments(name).keys() - kwargs.keys()):
                raise ValueError(f"it lacks the setting {', '.join(missing)}")
            return encoder
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} describes an encoder that this version does not have ({error})") from error

    what = f"the encoder {name}"
    with torch.device("meta"):  # a damaged file may ask for more memory than there is
        shapes = build()
    _check_fit(shapes, state, path=path, what=what)
    encoder = build()
    load_strictly(encoder, state, path=path, what=what)
    return encoder, heads


def _is_projection(key: str) -> bool:
    """Return whether a published tensor belongs to the projection head of pretraining."""
    return key.startswith("inv_head.")


def kind_of_checkpoint(path: str | os.PathLike[str], *, model: str | None = None) -> str | None:
    """Return the task of a fine-tuned model, or None for an encoder without a task head.

    Published weights do not name their task, but each encoder layout has heads for only one.

    Args:
        path: checkpoint or state dict.
        model: encoder of published weights; None infers it.

    Raises:
        CheckpointError: the file cannot be read, or contains published weights of an unknown encoder.
    """
    path = find_weights(path, model=model)
    payload = load_checkpoint(path)
    with checkpoint_errors(path):
        if "point_encoder" in payload:
            return payload["kind"] if payload.get("kind") in TASKS else None
        state = published_state(payload, path, quiet=True)
        name = guess_encoder(state, path) if model is None else resolve_encoder_name(model)
        if all(map(_is_projection, split_published_state(state, name)[1])):
            return None
        return next((kind for kind, task in TASKS.items() if ENCODERS[name] in task.heads), None)


def crossnet_from_checkpoint(path: str | os.PathLike[str]) -> tuple[CrossNet, dict[str, Any]]:
    """Rebuild the complete pretraining model, with projection heads and image encoders, and load it strictly.

    Args:
        path: checkpoint of ``train_crossnet_con.py``.

    Returns:
        The model, in training mode, on the CPU; and the content of the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is not from pretraining, or has tensors that do not fit.
    """
    path = find_weights(path)
    payload = load_checkpoint(path)
    if "heads_and_image_encoders" not in payload:
        raise CheckpointError(
            f"{path} contains no projection heads and image encoders; give a last.pth of train_crossnet_con.py"
        )
    with checkpoint_errors(path):
        (encoder, _), flags = _encoder_from_payload(payload, path), payload["arguments"]
        model = CrossNet(
            encoder,
            **{name: flags[name] for name in ("image_model", "image_modality", "objective", "alpha", "temperature")},
            mask_same_object=flags.get("mask_same_object", False),
            intra_weight=flags.get("intra_weight", 1.0),
        )
        state = {f"point_encoder.{key}": value for key, value in payload["point_encoder"].items()}
        load_strictly(model, {**state, **payload["heads_and_image_encoders"]}, path=path, what="the pretraining model")
    return model, payload


def encoder_and_point_head(path: str | os.PathLike[str]) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Rebuild a pretrained point encoder with its projection head, from any checkpoint of ``train_crossnet_con.py``.

    Returns:
        Encoder and head, in training mode, on the CPU; and the content of the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, has no point head, or has tensors that do not fit.
    """
    path = find_weights(path)
    payload = load_checkpoint(path)
    with checkpoint_errors(path):
        encoder, _ = _encoder_from_payload(payload, path)
        kept = payload.get("heads_and_image_encoders", {})
        prefix = "point_head."
        state = payload.get("point_head") or {
            name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)
        }
        if not state:
            raise CheckpointError(
                f"{path} holds no point head; give a last.pth or step_<n>.pth of train_crossnet_con.py"
            )
        head = point_projection(encoder.feature_dim, getattr(encoder, "emb_dims", HIDDEN_DIM))
        load_strictly(head, state, path=path, what="the point head")
    return encoder, head, payload


def encoders_for(task: type[FineTuned]) -> list[str]:
    """Return the names of the encoders that have a head for a task, the usual one first."""
    return [name for name, kind in ENCODERS.items() if kind in task.heads]


def describe_fine_tuned(model: FineTuned) -> dict[str, Any]:
    """Return the checkpoint entries from which ``fine_tuned_from_checkpoint`` rebuilds a model."""
    return {
        "kind": model.kind,
        "encoder": describe_encoder(model.encoder),
        "point_encoder": model.encoder.state_dict(),
        "head_name": model.head_name,
        "head_sizes": dict(model.sizes),
        "head": model.head.state_dict(),
    }


def fine_tuned_from_checkpoint(
    path: str | os.PathLike[str], task: type[FineTuned], *, model: str | None = None, k: int | None = None
) -> tuple[FineTuned, dict[str, Any]]:
    """Rebuild an encoder with its head and load both strictly.

    Published state dicts are supported too (names with or without ``module.``, batch norms registered twice): encoder
    and sizes are inferred from their tensors, and k defaults to that of the task's released script, with a warning.

    Args:
        path: checkpoint of a fine-tuning run, state dict, or another source of ``find_weights``.
        task: class of the model to rebuild.
        model: encoder name; must agree with the checkpoint.
        k: number of neighbors; overrides the checkpoint's with a warning.

    Returns:
        The model, in training mode, on the CPU; and the content of the checkpoint, empty for a published state dict.

    Raises:
        CheckpointError: the file cannot be read, is of another task, has no head, or has tensors that do not fit.
    """
    path = find_weights(path, model=model or encoders_for(task)[0])
    payload = load_checkpoint(path)
    with checkpoint_errors(path):
        return _fine_tuned_from_payload(payload, path, task, model=model, k=k)


def _fine_tuned_from_payload(
    payload: Mapping[str, Any], path: str | os.PathLike[str], task: type[FineTuned], *, model: str | None, k: int | None
) -> tuple[FineTuned, dict[str, Any]]:
    """Rebuild a model as ``fine_tuned_from_checkpoint``, from the content of a file."""
    kind = payload.get("kind")
    if isinstance(kind, str) and kind != task.kind:
        holds = f"a model for {kind}" if kind in TASKS else "an encoder without a head (--pretrain_path takes that)"
        raise CheckpointError(f"{path} holds {holds}; expected a model for {task.kind}")
    encoder, heads = _encoder_from_payload(payload, path, model=model, k=k, released_k=task.released_k)
    name = payload.get("head_name", "published")  # the only one in earlier versions
    if type(encoder) not in task.heads:
        raise CheckpointError(f"{path} holds a {describe_encoder(encoder)['name']}, which has no head for {task.kind}")
    head_kind = task.head_class(type(encoder), name)
    if kind is not None:
        sizes, state = dict(payload["head_sizes"]), payload["head"]
        if name == "linear" and "norm_pooled.running_mean" not in state:
            sizes["batch_norm"] = False  # of an earlier version
    else:
        payload, state = {}, {key: tensor for key, tensor in heads.items() if not _is_projection(key)}
        _log_left_out(path, heads.keys() - state.keys())
        try:
            sizes = head_kind.sizes(state, encoder)
        except KeyError as error:
            raise CheckpointError(f"{path} contains no head for {task.kind}: the tensor {error} is missing") from error
    with torch.device("meta"):
        shapes = head_kind(encoder, **sizes)
    what = f"the head for {task.kind}"
    _check_fit(shapes, state, path=path, what=what)
    fine_tuned = task(encoder, head=name, **sizes)
    load_strictly(fine_tuned.head, state, path=path, what=what)
    return fine_tuned, payload
