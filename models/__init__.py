"""Models and losses of the method, and a registry of point encoders by name."""

from __future__ import annotations

from typing import Any

from models.base import PointEncoder, PointFeatures
from models.crossnet import CrossNet
from models.dgcnn import DGCNNCls, DGCNNPartSeg, DGCNNSemSeg
from models.pointnet import PointNetCls, PointNetPartSeg
from models.pretrained import pretrained_file
from utils.weight_files import read_weights

ENCODERS: dict[str, type[PointEncoder]] = {
    "dgcnn_cls": DGCNNCls,
    "dgcnn_partseg": DGCNNPartSeg,
    "dgcnn_semseg": DGCNNSemSeg,
    "pointnet_cls": PointNetCls,
    "pointnet_partseg": PointNetPartSeg,
}
# Names of the released scripts.
ENCODER_ALIASES = {"dgcnn_seg": "dgcnn_partseg", "pointnet_seg": "pointnet_partseg"}

__all__ = [
    "ENCODERS",
    "ENCODER_ALIASES",
    "CrossNet",
    "PointEncoder",
    "PointFeatures",
    "build_encoder",
    "encoder_arguments",
    "load",
    "resolve_encoder_name",
]


def resolve_encoder_name(name: str) -> str:
    """Return the canonical name of an encoder, given that name or a released alias.

    Raises:
        ValueError: the name is unknown.
    """
    name = ENCODER_ALIASES.get(name, name)
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join([*ENCODERS, *ENCODER_ALIASES])}")
    return name


def encoder_arguments(name: str) -> dict[str, Any]:
    """Return the keyword arguments of an encoder with their defaults (the released values)."""
    return ENCODERS[resolve_encoder_name(name)].arguments()


def build_encoder(name: str, **kwargs: Any) -> PointEncoder:
    """Build a point encoder.

    Args:
        name: one of ``ENCODERS`` or a released alias.
        kwargs: any of ``encoder_arguments(name)``; the defaults are the released values.

    Raises:
        ValueError: the name or a value is not valid.
        TypeError: the encoder has no such argument.
    """
    return ENCODERS[resolve_encoder_name(name)](**kwargs)


def load(name: str) -> PointEncoder:
    """Load a pretrained encoder of this repository, in eval mode, on the CPU.

    Args:
        name: of the weights (``weights/index.json``), or a released alias.

    Raises:
        CheckpointError: no weights of this name; or their file is missing or not the one that was published.
    """
    tensors, about = read_weights(pretrained_file(ENCODER_ALIASES.get(name, name)))
    encoder = build_encoder(about["encoder"]["name"], **about["encoder"]["kwargs"])
    encoder.load_state_dict(tensors)  # float16 becomes float32
    return encoder.eval()
