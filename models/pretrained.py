"""Pretrained weights of this repository: ``weights/index.json`` and the files it lists, with checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError
from utils.files import sha256

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
INDEX = "index.json"


def pretrained_index() -> dict[str, dict[str, Any]]:
    """Return the entries of the index by name of the weights.

    Raises:
        CheckpointError: the index is missing or damaged.
    """
    path = WEIGHTS / INDEX
    fix = "it is part of the repository: git checkout -- weights"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); {fix}") from error
    entries = index.values() if isinstance(index, dict) else [None]
    if not all(isinstance(entry, dict) and {"file", "sha256"} <= entry.keys() for entry in entries):
        raise CheckpointError(f"{path} is not an index of weights; {fix}")
    return index


def pretrained_file(name: str) -> Path:
    """Return the file of pretrained weights, after comparing its checksum with the index.

    Args:
        name: name of the weights, such as ``dgcnn_cls``.

    Raises:
        CheckpointError: there are no weights of this name, or their file is missing or not the published one.
    """
    index = pretrained_index()
    if name not in index:
        raise CheckpointError(
            f"there are no pretrained weights {name!r}: {WEIGHTS / INDEX} names {', '.join(index) or 'none yet'}; "
            "train_crossnet_con.py pretrains an encoder"
        )
    path = WEIGHTS / index[name]["file"]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it is part of the repository: git checkout -- {path}")
    if (found := sha256(path)) != index[name]["sha256"]:
        raise CheckpointError(
            f"{path} is not the file that was published (SHA-256 {found}, expected {index[name]['sha256']}); "
            f"get it again: git checkout -- {path}"
        )
    return path
