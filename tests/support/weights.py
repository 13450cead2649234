"""Tiny pretrained weights, published by the real command."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks import publish_weights
from models import PointEncoder, build_encoder, pretrained
from tests.support.checkpoints import save_encoder

TINY = {
    "dgcnn_cls": {"k": 4, "emb_dims": 16},
    "dgcnn_partseg": {"k": 4, "emb_dims": 16},
    "dgcnn_semseg": {"k": 4, "emb_dims": 16, "in_channels": 3},
    "pointnet_cls": {"emb_dims": 16},
    "pointnet_partseg": {"emb_dims": 8},
}


def tiny_encoder(name: str) -> PointEncoder:
    """Return a narrow encoder whose batch norms have seen data, with gains of both signs; the same at every call."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **TINY[name])
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            with torch.no_grad():
                module.weight[::3] *= -1
    if name == "dgcnn_partseg":  # its T-Net starts at the identity
        nn.init.normal_(encoder.transform_net.transform.weight, std=0.05)
    return encoder


def save_pretraining(path: Path, encoder: PointEncoder) -> Path:
    """Save an encoder with what a checkpoint of pretraining says beside it."""
    about = {"kind": "crossnet-pretraining", "progress": {"epoch": 3, "step": 120}, "git_commit": "abc"}
    arguments = {"seed": 5, "batch_size": 8, "data_root": "/private/data"}
    return save_encoder(path, encoder, **about, arguments=arguments)


def publish_tiny(folder: Path, names: list[str], *more: str) -> None:
    """Publish ``tiny_encoder`` of each name in ``folder``, which ``models.pretrained.WEIGHTS`` must name."""
    if not (folder / pretrained.INDEX).exists():
        (folder / pretrained.INDEX).write_text("{}")
    for name in names:
        checkpoint = save_pretraining(folder / "source.pth", tiny_encoder(name))
        publish_weights.main([str(checkpoint), "--data", "nothing", "--command", "none", *more])
