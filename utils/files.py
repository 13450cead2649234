"""Files as users have them: what counts as data in a folder, and text in any usual encoding."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

# What macOS, Windows and network disks leave in folders. Names that begin with a dot (.DS_Store, ._00.png, .nfs0001)
# are left out by the dot alone.
_SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "system volume information")
) | {"@eadir", "lost+found"}

# The longer marks come first: the mark of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_data_name(name: str) -> bool:
    """Return whether a file or folder of this name can hold data: not hidden, not left there by an operating system."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_NAMES


def data_files(folder: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """List what matches a pattern below a folder, sorted, without what operating systems leave there.

    Every glob of the project over a user's data goes through here.

    Args:
        folder: where to look; its own name may be any.
        pattern: as of ``Path.glob``.
    """
    return sorted(_matches(Path(folder), pattern))


def has_data_files(folder: str | os.PathLike[str], pattern: str = "*") -> bool:
    """Return whether :func:`data_files` would find anything; stops at the first match."""
    return next(_matches(Path(folder), pattern), None) is not None


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    depth = len(folder.parts)
    return (path for path in folder.glob(pattern) if all(map(is_data_name, path.parts[depth:])))


def decode_text(data: bytes) -> str:
    """Decode a text as editors write it; every line ends with a line feed.

    A byte-order mark decides between UTF-8, UTF-16 and UTF-32; UTF-16 without one is known by its zero bytes. Anything
    else is UTF-8 or, where it is not, Latin-1.

    Raises:
        ValueError: not a text: it has zero bytes, or is not valid in the encoding that its mark names.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            text = data.decode(encoding)
            break
    else:
        sample = data[:256]
        if sample and sample[1::2].count(0) > len(sample) // 4:
            text = data.decode("utf-16-le")
        elif sample and sample[::2].count(0) > len(sample) // 4:
            text = data.decode("utf-16-be")
        else:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                text = data.decode("latin-1")
    if "\0" in text:
        raise ValueError("it has zero bytes, so it is not a text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file; see :func:`decode_text`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a text.
    """
    return decode_text(Path(path).read_bytes())


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a text file, without blanks around them and without empty ones; see :func:`decode_text`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a text.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]
