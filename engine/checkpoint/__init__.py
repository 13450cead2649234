"""Checkpoint files: plain types only, written in one step, loaded with ``weights_only=True``.

``python -m engine.checkpoint`` says what is in a file and exports encoders (``__main__.py``).
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
OURS = {"format", "kind", "point_encoder"}  # entries of our checkpoints, none of which published files have
# Types of what a checkpoint holds.
_STORED = (Mapping, Set, list, tuple, str, bytes, int, float, complex, NoneType, Tensor)
logger = logging.getLogger("crossnet")


def save_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Write a checkpoint; whoever looks sees the old file or the whole new one.

    Args:
        path: the file.
        payload: plain types and tensors.
        keep: where the old file stays, in the place of what is there.

    Raises:
        UserError: the file cannot be written; the old one is still there.
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
        raise UserError(f"cannot write the checkpoint {path} ({reason}); an earlier one is unchanged") from error


def _keep(path: Path, keep: Path) -> bool:
    """Give a file a second name, so that it is never without one; where files cannot have two, its other name.

    Returns:
        Whether the file has lost its first name.
    """
    second = keep.with_name(keep.name + ".tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        os.replace(path, keep)
        return True
    os.replace(second, keep)
    second.unlink(missing_ok=True)  # replacing a file by itself leaves both names
    return False


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint or a published state dict to the CPU, without running any code it may contain.

    Files that end in ``.safetensors`` are read as such, all others as what torch.save writes.

    Raises:
        DamagedCheckpointError: damaged, or no checkpoint.
        CheckpointError: missing, of another format number, or it holds objects other than tensors and plain types.
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
    """Content of a safetensors file, in the form of a checkpoint where this version wrote it."""
    tensors, about = read_weights(path)
    return {**about, "point_encoder": tensors} if about else dict(tensors)


def _from_torch(path: Path) -> Any:
    """Content of what torch.save wrote."""
    try:
        _check_zip_sizes(path)
        payload = _load(path)
        # torch does not look at the checksums that it writes; a published file may be written without any.
        damaged = _wrong_checksum(path) if isinstance(payload, dict) and not OURS.isdisjoint(payload) else None
        _check_tensors(payload)
    except Exception as error:  # torch raises many kinds on damaged files
        if "GLOBAL" in str(error) and not _wrong_checksum(path):  # pickle's word for a name to import and call
            raise CheckpointError(_refusal(path, str(error))) from error
        if _is_torchscript(path):
            raise CheckpointError(
                f"{path} is a TorchScript program. Save its weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            ) from error
        known = isinstance(error, (RuntimeError, EOFError, ValueError)) and str(error)
        reason = str(error).split(". ")[0].splitlines()[0] if known else "not what torch.save writes"
        again = "train or copy it again"
        raise DamagedCheckpointError(f"{path} is damaged or no checkpoint ({reason}); {again}") from error
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
    """A file that is never asked for more than is left of it: a length that it claims would be allocated first."""

    def read(self, size: int | None = -1) -> bytes:
        """See ``io.BufferedReader.read``."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _load(path: Path) -> Any:
    """Content of a checkpoint in PyTorch's zip form or its older one."""
    if zipfile.is_zipfile(path):
        with plain_objects():
            return torch.load(path, map_location="cpu", weights_only=True)
    with _Bounded(io.FileIO(path)) as file, plain_objects():
        return torch.load(file, map_location="cpu", weights_only=True)


def _wrong_checksum(path: Path) -> str | None:
    """The first member of a zip file that is not what was written, or the file's name where it is cut off."""
    try:
        return zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception:  # zipfile raises many kinds too
        return path.name


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a program that torch.jit.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many kinds on damaged files
        return False


def _check_zip_sizes(path: Path) -> None:
    """See that a zip file's members are stored as they are, as torch.save does: others could unpack to any size.

    Raises:
        ValueError: they are packed, or together larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return  # PyTorch's older form
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are larger than itself")


def _check_tensors(payload: Any) -> None:
    """See that all tensors of a payload are ordinary ones: dense, on the CPU, each value stored.

    Raises:
        ValueError: there is another one.
    """
    left, seen = [payload], set()
    while left:  # without recursion, and each object once: a file may nest and share them without end
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
                raise ValueError("a tensor in it is sparse, quantised or on no device")
            if item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor in it claims {item.nbytes:,} bytes that are not stored")


@contextlib.contextmanager
def checkpoint_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, whatever is wrong with what a checkpoint holds is an error that names the file.

    Raises:
        CheckpointError: an entry is missing, of another type, or of a size that nothing can have.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, _STORED):
            raise  # of an object that no checkpoint holds: a mistake of this program
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} does not hold what this version writes ({type(error).__name__}: {reason}); train or copy it again"
        ) from error
