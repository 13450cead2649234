"""Arrays that take long to read, cached next to their files or, if that is not writable, in the temporary folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import replacing


def cache_folders(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the folders of a cache: ``.<name>`` in ``folder``, and this user's in the system's temporary folder."""
    user = os.getuid() if hasattr(os, "getuid") else "all"
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return folder / f".{name}", Path(tempfile.gettempdir()) / f"crossnet_{name}_{user}_{key}"


def write_cache(folders: Sequence[Path], name: str, array: np.ndarray) -> Path:
    """Write an array as an NPY file into the first folder that is writable; return its path.

    Raises:
        UserError: none is; the message says why.
    """
    problems = []
    # Several users may share the data folder; the temporary folder is private.
    for folder, mode in zip(folders, (0o777, 0o700), strict=True):
        try:
            folder.mkdir(mode=mode, exist_ok=True)
            with replacing(folder / name, shared=True) as temporary, open(temporary, "wb") as file:
                np.save(file, array)
            return folder / name
        except OSError as error:
            problems.append(f"{folder}: {error}")
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"no folder is writable ({'; '.join(problems)})")
