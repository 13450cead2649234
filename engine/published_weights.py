"""Recognize encoders in weights published by DGCNN repositories, CrossPoint and CrossNet."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import ENCODERS, build_encoder, encoder_arguments
from utils.errors import CheckpointError

logger = logging.getLogger("crossnet")


class FoundState(NamedTuple):
    """Tensors of a file that are most likely those of an encoder."""

    entry: str  # entry of the file, "" for the file itself
    prefix: str  # prefix of their names in the entry
    tensors: dict[str, Tensor]  # by name without the prefix
    left_out: int  # number of tensors in the entry that lack the prefix
    elsewhere: list[str]  # other entries with tensors of an encoder

    def describe(self) -> str:
        """Describe where the tensors are, for a message."""
        return (
            f"{len(self.tensors)} tensors of {f'the entry {self.entry!r}' if self.entry else 'the file'}"
            + (f", below {self.prefix!r} ({self.left_out} others are left out)" if self.prefix else "")
            + (f"; weights in {', '.join(map(repr, self.elsewhere))} are not used" if self.elsewhere else "")
        )


def find_state(payload: Mapping[str, Any]) -> FoundState | None:
    """Find the entry and prefix under which most names are those of an encoder; return None if there are no tensors."""
    found = {entry: tensors for entry, tensors in _state_dicts(payload) if tensors}
    if not found:
        return None
    candidates = [(entry, *_common_prefix(tensors)) for entry, tensors in found.items()]
    entry, prefix, _ = max(candidates, key=lambda candidate: (candidate[2], -_rank(candidate[0])))
    state = {name.removeprefix(prefix): value for name, value in found[entry].items() if name.startswith(prefix)}
    elsewhere = sorted(other for other, _, count in candidates if other != entry and count)
    return FoundState(entry, prefix, state, len(found[entry]) - len(state), elsewhere)


def published_state(
    payload: Mapping[str, Any], path: str | os.PathLike[str], *, quiet: bool = False
) -> dict[str, Tensor]:
    """Find an encoder's tensors in a file of any origin.

    The weights may be nested in an entry (``state_dict``, ``model``, ``net``, ``encoder``, ``model_state``, ...) and
    have any prefix (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.``, ``encoder.``, ...). The
    entry and prefix are chosen under which most names are those of an encoder.

    Args:
        payload: content of the file.
        path: path of the file, for messages.
        quiet: whether to skip logging where the tensors are.

    Returns:
        The tensors with that prefix, which is removed from their names.

    Raises:
        CheckpointError: the file has no state dict; the message lists its entries.
    """
    found = find_state(payload)
    if found is None or "format" in payload:  # one of our checkpoints, with entries missing
        raise CheckpointError(
            f"{path} contains neither one of our checkpoints nor a state dict of tensors; it holds {_entries(payload)}"
        )
    if not quiet and (found.entry or found.prefix.removeprefix("module.")):
        logger.info("%s: %s", path, found.describe())
    return found.tensors


MOST_PARTS = 20  # nesting depth of names; bounds the work on hostile files
_ENTRIES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "encoder", "")


def _rank(entry: str) -> int:
    """Return the rank of an entry among those that usually contain the weights; other names come last."""
    name = entry.rpartition(".")[2]
    return _ENTRIES.index(name) if name in _ENTRIES else len(_ENTRIES)


def _state_dicts(payload: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name and tensors of each entry of a file, two levels deep, beginning with the file itself (no name)."""
    level: list[tuple[str, Mapping[str, Any]]] = [("", payload)]
    seen: set[int] = set()  # files may contain cycles
    for _ in range(3):
        below = []
        for entry, content in level:
            if id(content) in seen:
                continue
            seen.add(id(content))
            yield entry, {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
            start = f"{entry}." if entry else ""
            below += [(f"{start}{name}", value) for name, value in content.items() if isinstance(value, Mapping)]
        level = below


def _common_prefix(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the prefix under which most tensors have names of an encoder, and the number of these tensors.

    Ties go to the prefix with the fewest parts, then to the first in alphabetical order.
    """
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".", MOST_PARTS)
        for i in range(len(parts)):
            if ".".join(parts[i:]) in _known_names():
                counts[".".join([*parts[:i], ""]) if i else ""] += 1
    if not counts:
        return ("module." if all(name.startswith("module.") for name in state) else ""), 0
    prefix = min(counts, key=lambda prefix: (-counts[prefix], prefix.count("."), prefix))
    return prefix, counts[prefix]


@functools.cache
def _known_names() -> frozenset[str]:
    """Return the tensor names of all encoders."""
    with torch.device("meta"):
        return frozenset(name for encoder in ENCODERS for name in build_encoder(encoder).state_dict())


def _entries(payload: Mapping[str, Any], most: int = 8) -> str:
    """Describe the entries of a file, for a message."""
    found = [f"{str(name)[:40]!r} ({type(value).__name__})" for name, value in itertools.islice(payload.items(), most)]
    return (", ".join(found) or "nothing") + (f" and {len(payload) - most} more" if len(payload) > most else "")


def split_published_state(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split published tensors into those of the encoder and of heads; drop names that repeat a tensor."""
    kind, known = ENCODERS[name], build_encoder(name).state_dict().keys()
    heads = {key: tensor for key, tensor in state.items() if key not in known and kind.published_heads.match(key)}
    repeated = [key for key in state if key not in known and kind.published_aliases.match(key)]
    return {key: tensor for key, tensor in state.items() if key not in heads and key not in repeated}, heads


def published_arguments(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return the arguments of an encoder, inferred from published tensors where possible, else the released values."""
    kwargs = encoder_arguments(name)
    if ENCODERS[name].embedding in state:
        kwargs["emb_dims"] = len(state[ENCODERS[name].embedding])
    if name == "dgcnn_semseg" and "conv1.0.weight" in state:
        kwargs["in_channels"] = state["conv1.0.weight"].shape[1] // 2
    return kwargs


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Return whether published tensors, apart from heads and aliases, are exactly those of an encoder."""
    state, _ = split_published_state(state, name)
    try:
        with torch.device("meta"):
            shapes = build_encoder(name, **published_arguments(state, name)).state_dict()
    except (TypeError, ValueError, RuntimeError, IndexError):  # sizes that the encoder does not support
        return False
    return {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in shapes.items()}


def guess_encoder(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """Infer the encoder of bare weights from the names and shapes of their tensors.

    Args:
        state: tensors from ``published_state``.
        path: path of the file, for messages.

    Raises:
        CheckpointError: the tensors are not exactly those of one encoder.
    """
    fitting = [name for name in ENCODERS if _fits(state, name)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{path} holds bare weights that are not exactly those of one encoder: name it with --model (and --k) to "
            "see which tensors do not fit"
        )
    return fitting[0]
