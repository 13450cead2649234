"""Files that tests write, damage and compare."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its bytes, every folder with None; locks of runs do not count."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def write_h5(path: Path, **arrays: Any) -> Path:
    """Write an HDF5 file and the folders above it; an array that is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.update({name: value for name, value in arrays.items() if value is not None})
    return path


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def cut(path: Path, keep: float = 0.5) -> None:
    """Truncate a file to a fraction of its size."""
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
