"""The names of tensors in files that DGCNN repositories, CrossPoint and CrossNet published."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import ENCODERS, build_encoder, encoder_arguments
from utils.errors import CheckpointError

logger = logging.getLogger("crossnet")

# What published files hold besides the encoder: batch norms registered a second time under the block that owns them,
# projection heads, classifiers and segmentation heads.
ALIASES = {
    "dgcnn": re.compile(r"^(bn\d+|transform_net\.bn[12]|transform_net\.conv3\.1)\."),
    "pointnet": re.compile(r"^$"),
}
_HEADS = {
    "dgcnn_cls": re.compile(r"^(inv_head|linear\d|bn[67])\b"),
    "dgcnn_partseg": re.compile(r"^(inv_head|conv([7-9]|1[01])|linear\d)\b"),
    "dgcnn_semseg": re.compile(r"^(inv_head|conv[7-9]|linear\d)\b"),
    "pointnet_cls": re.compile(r"^(inv_head|linear\d|bn6)\b"),
    "pointnet_partseg": re.compile(r"^(inv_head|convs\d|bns\d)\b"),
}
# The tensor whose first dimension is the width of the embedding.
EMBEDDING = {
    "dgcnn_cls": "conv5.0.weight",
    "dgcnn_partseg": "conv6.0.weight",
    "dgcnn_semseg": "conv6.0.weight",
    "pointnet_cls": "conv5.weight",
    "pointnet_partseg": "conv5.weight",
}


def published_state(payload: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A published file's tensors: wrappers opened, the prefix ``module.`` of DataParallel stripped.

    Raises:
        CheckpointError: no state dict inside.
    """
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(payload.get(wrapper), Mapping):
            payload = payload[wrapper]
    state = {str(name).removeprefix("module."): tensor for name, tensor in payload.items()}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds neither one of our checkpoints nor a state dict of tensors")
    return state


def published_encoder_state(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Split published tensors into the encoder's and the names of aliases and heads, which are left out."""
    aliases = ALIASES[name.split("_")[0]]
    known = build_encoder(name).state_dict().keys()
    left_out = [key for key in state if key not in known and (aliases.match(key) or _HEADS[name].match(key))]
    return {key: tensor for key, tensor in state.items() if key not in left_out}, left_out


def published_arguments(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of an encoder: those that its published tensors imply, the released values otherwise."""
    kwargs = encoder_arguments(name)
    if EMBEDDING[name] in state:
        kwargs["emb_dims"] = len(state[EMBEDDING[name]])
    if name == "dgcnn_semseg" and "conv1.0.weight" in state:
        kwargs["in_channels"] = state["conv1.0.weight"].shape[1] // 2
    return kwargs


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether published tensors are those of an encoder, all of them, beside heads and aliases."""
    state, _ = published_encoder_state(state, name)
    try:
        with torch.device("meta"):
            shapes = build_encoder(name, **published_arguments(state, name)).state_dict()
    except (TypeError, ValueError, RuntimeError, IndexError):  # sizes that no encoder has
        return False
    return {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in shapes.items()}


def guess_encoder(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """Name the encoder that bare weights are of, by the names and shapes of their tensors, with a notice.

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
    logger.warning("%s does not say which encoder it is of; by its tensors it is a %s", path, fitting[0])
    return fitting[0]


def published_head_state(payload: Mapping[str, Any], path: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    """A published file's tensors beside the encoder's, without those of the projection head."""
    state = published_state(payload, path)
    left_out = published_encoder_state(state, name)[1]
    return {key: state[key] for key in left_out if not key.startswith("inv_head.")}
