"""Weights in safetensors files: tensors by name, and in the header one JSON object that says what they are of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from utils.errors import DamagedCheckpointError
from utils.files import replacing

SUFFIX = ".safetensors"
# The only entry of the header: with two, their order and so the file's checksum would differ from one call to the next.
_ENTRY = "crossnet"


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file; equal arguments give equal bytes.

    Args:
        path: the file.
        tensors: by name.
        about: what they are of; plain types.

    Raises:
        UserError: the file cannot be written.
    """
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    packed = safetensors.torch.save(content, metadata={_ENTRY: json.dumps(about)})
    with replacing(path) as temporary:
        temporary.write_bytes(packed)


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file to the CPU.

    Returns:
        The tensors by name, and what ``write_weights`` was told about them; nothing for a file of another origin.

    Raises:
        DamagedCheckpointError: the file is damaged or not of this format.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if not isinstance(about, dict):
            raise ValueError("its header is of another kind")
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedCheckpointError(
            f"{Path(path)} is damaged or not a safetensors file ({reason}); get it again"
        ) from error
    return tensors, about
