"""Find data files among system files, read text in any usual encoding, write files atomically, and their checksums."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from utils.errors import DataError, UserError

# Left in folders by macOS, Windows and network disks. Names with a leading dot (.DS_Store, ._00.png, .nfs0001) are
# skipped anyway.
_SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "system volume information")
) | {"@eadir", "lost+found"}

# Longer marks first: the UTF-16 mark is a prefix of the UTF-32 mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_data_name(name: str) -> bool:
    """Return whether a file or folder of this name can be data: neither hidden nor left by an operating system."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_NAMES


def data_files(folder: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """List the matches of a pattern below a folder, sorted, without files that operating systems leave there.

    Use this instead of ``Path.glob`` for all user data. Links to folders are followed.

    Args:
        folder: where to search; its name is not checked.
        pattern: as for ``Path.glob``; ``**`` only as the first part of two.
    """
    return sorted(_matches(Path(folder), pattern))


def has_data_files(folder: str | os.PathLike[str], pattern: str = "*") -> bool:
    """Return whether :func:`data_files` would find anything; stops at the first match."""
    return next(_matches(Path(folder), pattern), None) is not None


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    below, name = os.path.split(pattern)
    if below == "**":
        return (path for path in _below(folder) if path.match(name))
    depth = len(folder.parts)
    return (path for path in folder.glob(pattern) if all(map(is_data_name, path.parts[depth:])))


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files and folders below a folder; ``Path.glob("**")`` does not follow links.

    A folder that can be reached by several ways counts once, so links that form a loop are harmless. Links are followed
    last: a folder below ``folder`` keeps its path if a link leads to it too.
    """
    seen: set[str] = set()
    folders, links = [folder], deque[Path]()
    while folders or links:
        here = folders.pop() if folders else links.popleft()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            names = sorted(filter(is_data_name, os.listdir(here)))
        except OSError:  # as Path.glob: what cannot be listed has no files
            continue
        for path in (here / name for name in names):
            yield path
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)


def check_name(name: str, path: str | os.PathLike[str]) -> None:
    """Check that a name can be hashed and written into tables; archives from other systems hold names that cannot.

    Args:
        name: what is used of the path.
        path: for the message.

    Raises:
        DataError: the name is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: its name is not UTF-8", fix="Rename it") from error


def decode_text(data: bytes) -> str:
    """Decode text in any encoding that editors write, and convert line ends to line feeds.

    A byte-order mark selects UTF-8, UTF-16 or UTF-32; UTF-16 without a mark is recognized by its zero bytes. Everything
    else is read as UTF-8, or as Latin-1 if it is not valid UTF-8.

    Raises:
        ValueError: the data has zero bytes, or is invalid in the encoding that its mark names.
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
        raise ValueError("it has zero bytes, so it is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file, decoded by :func:`decode_text`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text.
    """
    return decode_text(Path(path).read_bytes())


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the non-empty lines of a text file, stripped, decoded by :func:`decode_text`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file in the error of a write in the block.

    Raises:
        UserError: in place of the write's error.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError if the disk is full when a file is closed
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def is_special(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a pipe or a device, such as /dev/stdout, which can be written but not replaced."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path next to it, which becomes the file when the block ends.

    After an error the temporary file is removed, and a file that was there before is unchanged. A link stays a link. A
    pipe or a device is written directly: as root, replacing it would break the system.

    Args:
        path: the file.
        shared: several processes may write the file at once; each gets another temporary path.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    if is_special(path):
        with writing(path):
            yield path
        return
    if os.path.islink(path):
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        with writing(path):
            if path.is_dir():  # now: the block may take hours
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
