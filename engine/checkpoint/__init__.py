"""Checkpoint files: plain types only, written atomically, loaded with ``weights_only=True``.

``python -m engine.checkpoint`` describes files and exports encoders (``__main__.py``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from engine.plain_objects import plain_objects
from utils.errors import CheckpointError, DamagedCheckpointError, UserError
from utils.weight_files import SUFFIX, read_weights

FORMAT = 1
OURS = {"format", "kind", "point_encoder"}  # entries of our checkpoints, which published files lack
# Types that a checkpoint may contain.
_STORED = (Mapping, Set, list, tuple, str, bytes, int, float, complex, NoneType, Tensor)
logger = logging.getLogger("crossnet")


def save_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Write a checkpoint atomically: readers see either the old file or the complete new one.

    Args:
        path: file to write.
        payload: plain types and tensors.
        keep: file to move the old checkpoint to, replacing what is there.

    Raises:
        UserError: the file cannot be written; the old one is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    moved = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            moved = _keep(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if moved:
            with contextlib.suppress(OSError):
                os.replace(keep, path)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "unexpected pos" in reason:  # PyTorch's words for a file that could not be written in full
            reason = "is the disk full?"
        raise UserError(f"cannot write the checkpoint {path} ({reason}); an earlier one is unchanged") from error


def _keep(path: Path, keep: Path) -> bool:
    """Hard-link ``path`` to ``keep``, or rename it on file systems without hard links.

    Returns:
        Whether the file was renamed, so that ``path`` no longer exists.
    """
    second = keep.with_name(keep.name + ".tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        os.replace(path, keep)
        return True
    os.replace(second, keep)
    second.unlink(missing_ok=True)  # rename does nothing if both names are links to one file
    return False


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint or a published state dict to the CPU, without running any code it may contain.

    Files that end in ``.safetensors`` are read as such, all others as what torch.save writes.

    Raises:
        DamagedCheckpointError: the file is damaged or not a checkpoint.
        CheckpointError: the file is missing, has another format number, or holds objects other than tensors and plain
            types.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint in it, such as {path / 'last.pth'}")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist; a pretraining run writes checkpoints/<exp_name>/last.pth")
    payload = _from_safetensors(path) if path.suffix == SUFFIX else _from_torch(path)
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a checkpoint or a state dict")
    if "point_encoder" in payload and payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {payload.get('format')}; this version reads {FORMAT}")
    return payload


def _from_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file; return the form of a checkpoint if this version wrote it."""
    tensors, about = read_weights(path)
    return {**about, "point_encoder": tensors} if about else dict(tensors)


def _from_torch(path: Path) -> Any:
    """Read a file that torch.save wrote, and check it."""
    try:
        _check_zip_sizes(path)
        payload = _load(path)
        # torch.load does not verify the checksums that torch.save writes; published files may lack them.
        damaged = _wrong_checksum(path) if isinstance(payload, dict) and not OURS.isdisjoint(payload) else None
        _check_tensors(payload)
    except Exception as error:  # torch raises many kinds for damaged files
        if "GLOBAL" in str(error) and not _wrong_checksum(path):  # pickle's opcode for a name to import
            raise CheckpointError(_refusal(path, str(error))) from error
        if _is_torchscript(path):
            raise CheckpointError(
                f"{path} is a TorchScript program. Save its weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            ) from error
        known = isinstance(error, (RuntimeError, EOFError, ValueError)) and str(error)
        reason = str(error).split(". ")[0].splitlines()[0] if known else "not what torch.save writes"
        again = "train or copy it again"
        raise DamagedCheckpointError(f"{path} is damaged or not a checkpoint ({reason}); {again}") from error
    if damaged:
        raise DamagedCheckpointError(f"{path} is damaged (wrong checksum of {damaged}); train or copy it again")
    return payload


def _refusal(path: Path, error: str) -> str:
    """Return the message for a file with objects that could run code: which ones, and how to save the weights alone."""
    found = re.search(r"GLOBAL ([\w.]+)", error)
    name = f" ({found[1]})" if found else ""
    return (
        f"{path} is refused: it holds objects other than tensors and plain types{name}, which could run code. If you "
        "trust it, save its weights alone where its code is installed: torch.save(torch.load(FILE, "
        "weights_only=False).state_dict(), NEW_FILE), or [ENTRY] instead of .state_dict() if an entry holds them"
    )


class _Bounded(io.BufferedReader):
    """File whose reads never exceed its size: a damaged length field would otherwise be allocated first."""

    def read(self, size: int | None = -1) -> bytes:
        """Read at most what is left of the file."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _load(path: Path) -> Any:
    """Load a checkpoint in PyTorch's zip format or its legacy format."""
    if zipfile.is_zipfile(path):
        with plain_objects():
            return torch.load(path, map_location="cpu", weights_only=True)
    with _Bounded(io.FileIO(path)) as file, plain_objects():
        return torch.load(file, map_location="cpu", weights_only=True)


def _wrong_checksum(path: Path) -> str | None:
    """Return the first zip member with a wrong checksum, or the file name if the archive is truncated."""
    try:
        return zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception:  # zipfile raises many kinds too
        return path.name


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a program that torch.jit.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many kinds for damaged files
        return False


def _check_zip_sizes(path: Path) -> None:
    """Check that zip members are uncompressed, as torch.save writes them: compressed ones could unpack to any size.

    Raises:
        ValueError: members are compressed, or together larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return  # PyTorch's legacy format
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are larger than itself")


def _check_tensors(payload: Any) -> None:
    """Check that all tensors of a payload are dense, on the CPU and fully stored.

    Raises:
        ValueError: a tensor is not.
    """
    left, seen = [payload], set()
    while left:  # iterative, each object once: files may nest deeply, or in cycles
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)
        elif isinstance(item, Tensor):
            if item.layout is not torch.strided or item.is_quantized or item.device.type != "cpu":
                raise ValueError("a tensor in it is sparse, quantized or not on the CPU")
            if item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor in it claims {item.nbytes:,} bytes that are not stored")


@contextlib.contextmanager
def checkpoint_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors about the content of a checkpoint into ones that name the file.

    Raises:
        CheckpointError: an entry is missing, or has the wrong type or an impossible size.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, _STORED):
            raise  # not an object from a checkpoint: a bug of ours
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} does not hold what this version writes ({type(error).__name__}: {reason}); train or copy it again"
        ) from error
