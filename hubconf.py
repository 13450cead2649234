"""Encoders for ``torch.hub.load``; weights and settings are those of ``models.load``.

encoder = torch.hub.load("path/to/this/repository", "dgcnn_cls", source="local")
features = encoder(clouds)  # (B, 3, N) -> pooled (B, D) and local (B, C, N)
"""

from __future__ import annotations

import sys as _sys  # entries are the names without an underscore
from pathlib import Path as _Path

# A notebook, or another repository of torch.hub, may have imported its own; imports of parts would then fail.
for _name in ("models", "utils"):
    _file = _Path(getattr(_sys.modules.get(_name), "__file__", None) or "/")
    if _name in _sys.modules and not _file.resolve().is_relative_to(_Path(__file__).resolve().parent):
        raise ImportError(f"another module {_name!r} is imported already ({_file}): load this encoder in a new process")

import models as _models  # noqa: E402

dependencies = ["numpy", "safetensors", "torch", "torchvision"]


def _entry(name: str):
    def entry(pretrained: bool = True, **kwargs: object) -> _models.PointEncoder:
        if not pretrained:
            return _models.build_encoder(name, **kwargs)
        if kwargs:
            raise ValueError(f"{name}: the weights fix {', '.join(kwargs)}; give pretrained=False to choose them")
        return _models.load(name)

    entry.__name__ = name
    entry.__doc__ = f"""{name}: in eval mode with the weights of this repository, or with random ones.

    Args:
        pretrained: load the weights; otherwise start at random, in train mode.
        kwargs: without weights, settings of the encoder (``models.encoder_arguments("{name}")``).
    """
    return entry


dgcnn_cls = _entry("dgcnn_cls")
dgcnn_partseg = _entry("dgcnn_partseg")
dgcnn_semseg = _entry("dgcnn_semseg")
pointnet_cls = _entry("pointnet_cls")
pointnet_partseg = _entry("pointnet_partseg")
