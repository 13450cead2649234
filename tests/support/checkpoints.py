"""Write checkpoints of encoders and models: ours, and in the names of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import save_checkpoint
from engine.load_model import describe_encoder, describe_fine_tuned
from models.base import PointEncoder


def encoder_payload(encoder: PointEncoder, **more: Any) -> dict[str, Any]:
    """Return what a checkpoint holds of an encoder."""
    return {"encoder": describe_encoder(encoder), "point_encoder": encoder.state_dict(), **more}


def save_encoder(path: Path, encoder: PointEncoder, **more: Any) -> Path:
    """Save an encoder alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, encoder_payload(encoder, **more))
    return path


def save_model(path: Path, model: nn.Module, **more: Any) -> Path:
    """Save a fine-tuned model."""
    save_checkpoint(path, {**describe_fine_tuned(model), **more})
    return path


def save_published(path: Path, model: nn.Module) -> Path:
    """Save a model's weights in the published names, below DataParallel's prefix."""
    torch.save({f"module.{key}": value for key, value in model.published_state_dict().items()}, path)
    return path
