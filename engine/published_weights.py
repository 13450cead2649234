"""The names of tensors in files that DGCNN repositories, CrossPoint and CrossNet published."""

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
    """The tensors of a file that are most likely an encoder's."""

    entry: str  # of the file, "" for the file itself
    prefix: str  # of their names in it
    tensors: dict[str, Tensor]  # without the prefix
    left_out: int  # tensors of the entry without the prefix
    elsewhere: list[str]  # other entries with tensors of an encoder

    def describe(self) -> str:
        """Return where the tensors are, for a message."""
        return (
            f"{len(self.tensors)} tensors of {f'the entry {self.entry!r}' if self.entry else 'the file'}"
            + (f", below {self.prefix!r} ({self.left_out} others are left out)" if self.prefix else "")
            + (f"; weights in {', '.join(map(repr, self.elsewhere))} are not used" if self.elsewhere else "")
        )


def find_state(payload: Mapping[str, Any]) -> FoundState | None:
    """Find the entry and the prefix in a file under which most names are those of an encoder; None without tensors."""
    found = {entry: tensors for entry, tensors in _state_dicts(payload) if tensors}
    if not found:
        return None
    places = [(entry, *_common_prefix(tensors)) for entry, tensors in found.items()]
    entry, prefix, _ = max(places, key=lambda place: (place[2], -_rank(place[0])))
    state = {name.removeprefix(prefix): value for name, value in found[entry].items() if name.startswith(prefix)}
    elsewhere = sorted(other for other, _, count in places if other != entry and count)
    return FoundState(entry, prefix, state, len(found[entry]) - len(state), elsewhere)


def published_state(
    payload: Mapping[str, Any], path: str | os.PathLike[str], *, quiet: bool = False
) -> dict[str, Tensor]:
    """Find an encoder's tensors in a file of any origin.

    The weights may lie in an entry (``state_dict``, ``model``, ``net``, ``encoder``, ``model_state``, ...) and have any
    prefix (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.``, ``encoder.``, ...): the entry and
    the prefix are taken under which most names are those of an encoder.

    Args:
        payload: content of the file.
        path: of the file, for messages.
        quiet: do not log where the tensors are.

    Returns:
        The tensors below the prefix, without it.

    Raises:
        CheckpointError: no state dict inside; the message names the entries found.
    """
    found = find_state(payload)
    if found is None or "format" in payload:  # ours, with entries missing
        raise CheckpointError(
            f"{path} holds neither one of our checkpoints nor a state dict of tensors; it holds {_entries(payload)}"
        )
    if not quiet and (found.entry or found.prefix.removeprefix("module.")):
        logger.info("%s: %s", path, found.describe())
    return found.tensors


MOST_PARTS = 20  # of a name, between dots: no model is nested more deeply
_ENTRIES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "encoder", "")


def _rank(entry: str) -> int:
    """Return the place of an entry among those that usually hold the weights; other names come last."""
    name = entry.rpartition(".")[2]
    return _ENTRIES.index(name) if name in _ENTRIES else len(_ENTRIES)


def _state_dicts(payload: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors that lie side by side in a file, down to its entries' entries, with the name of the entry."""
    level: list[tuple[str, Mapping[str, Any]]] = [("", payload)]
    seen: set[int] = set()  # a file may share entries without end
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
    """Return the prefix under which most tensors have the names of an encoder's, and how many those are.

    Of several, one of the encoder's alone comes before one of another network's, and the shortest first.
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
    """Names of all tensors of all encoders."""
    with torch.device("meta"):
        return frozenset(name for encoder in ENCODERS for name in build_encoder(encoder).state_dict())


def _entries(payload: Mapping[str, Any], most: int = 8) -> str:
    """Describe what a file holds, for a message."""
    found = [f"{str(name)[:40]!r} ({type(value).__name__})" for name, value in itertools.islice(payload.items(), most)]
    return (", ".join(found) or "nothing") + (f" and {len(payload) - most} more" if len(payload) > most else "")


def split_published_state(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split published tensors into the encoder's and those of heads; names that repeat a tensor are dropped."""
    kind, known = ENCODERS[name], build_encoder(name).state_dict().keys()
    heads = {key: tensor for key, tensor in state.items() if key not in known and kind.published_heads.match(key)}
    repeated = [key for key in state if key not in known and kind.published_aliases.match(key)]
    return {key: tensor for key, tensor in state.items() if key not in heads and key not in repeated}, heads


def published_arguments(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of an encoder: those that its published tensors imply, the released values otherwise."""
    kwargs = encoder_arguments(name)
    if ENCODERS[name].embedding in state:
        kwargs["emb_dims"] = len(state[ENCODERS[name].embedding])
    if name == "dgcnn_semseg" and "conv1.0.weight" in state:
        kwargs["in_channels"] = state["conv1.0.weight"].shape[1] // 2
    return kwargs


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether published tensors are those of an encoder, all of them, beside heads and aliases."""
    state, _ = split_published_state(state, name)
    try:
        with torch.device("meta"):
            shapes = build_encoder(name, **published_arguments(state, name)).state_dict()
    except (TypeError, ValueError, RuntimeError, IndexError):  # sizes that no encoder has
        return False
    return {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in shapes.items()}


def guess_encoder(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """Name the encoder that bare weights are of, by the names and shapes of their tensors.

    Args:
        state: what ``published_state`` returns.
        path: of the file, for messages.

    Raises:
        CheckpointError: they are not exactly those of one encoder.
    """
    fitting = [name for name in ENCODERS if _fits(state, name)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{path} holds bare weights, and their tensors are not exactly those of one encoder: say which they are of "
            "with --model (and --k), and the tensors that do not fit are named"
        )
    return fitting[0]
