"""Locks between processes that would write the same files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from utils.errors import UserError
from utils.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(path: Path, use: str) -> Callable[[], None]:
    """Lock a file against other processes, creating it; return the function that unlocks and removes it.

    Without effect on systems and file systems that have no POSIX locks. A killed process leaves the file, unlocked.

    Args:
        path: of the file, whose folder exists.
        use: what the process that holds the lock does and what helps, for the message.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be created.
    """
    if fcntl is None:
        return lambda: None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open until it is unlocked
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return lambda: None  # a file system without locks
        raise UserError(f"another process ({owner}) {use}") from error
    if not _is_at(path, file):  # its last owner removed it after it was opened here: others would lock a new one
        file.close()
        return lock(path, use)
    process = os.getpid()
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {process} on {socket.gethostname()}\n")
        file.flush()

    def unlock() -> None:
        if os.getpid() == process:  # a fork does not hold the lock
            path.unlink(missing_ok=True)
            file.close()

    return unlock


def _is_at(path: Path, file: TextIO) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samefile(path, file.fileno())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a file or an existing folder that the block writes, by a hidden file next to it or in it.

    Raises:
        UserError: another process writes it, or the hidden file cannot be written.
    """
    path = Path(path)
    with writing(path):
        file = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        unlock = lock(file, f"writes {path}: wait until it ends, stop it, or choose another name")
    try:
        yield
    finally:
        unlock()
