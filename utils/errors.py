"""Errors the user can fix, shown as one message without a traceback."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

logger = logging.getLogger("crossnet")


def _printable(message: str) -> str:
    """Escape unprintable characters and shorten very long words."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    return re.sub(r"(\S{200})\S{200,}(\S{200})", r"\1...\2", text)


class UserError(Exception):
    """A wrong setting or input. The message says what was expected and what helps.

    Messages quote names from untrusted files, so unprintable characters (control codes, broken Unicode) are escaped and
    very long words are shortened.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))


class DataError(UserError):
    """A data file or folder that is missing or not what was expected.

    Args:
        problem: what is wrong; names the file.
        fix: a sentence saying how to fix it, such as the command that gets the file.
    """

    def __init__(self, problem: str = "", *, fix: str = "") -> None:
        super().__init__(f"{problem}. {fix}" if fix else problem)
        self.problem = _printable(problem)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit. The message names the file."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose file is truncated or modified; another checkpoint of the run may still load."""


def plain_message(error: UserError) -> str:
    """Return the error's message, without the traceback text that a DataLoader worker wraps around it."""
    kind = type(error)
    text = str(error)
    if text.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        text = text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
    return text


@contextlib.contextmanager
def malformed(problem: str, more: str = "", *, fix: str = "") -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into a :class:`DataError`; libraries raise many types.

    Our own errors pass.

    Args:
        problem: what is wrong; the library's reason follows it in parentheses.
        more: end of the sentence.
        fix: as for :class:`DataError`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{problem} ({reason}){more}", fix=fix) from error


@contextlib.contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turn an exception in the block into a warning, for figures and other extras that must not abort a run.

    Args:
        what: name of the output that is skipped, for the warning.
    """
    try:
        yield
    except Exception as error:  # no failure here is worth losing the run
        reason = (str(error).splitlines() or [""])[0]
        logger.warning("%s is left out (%s: %s); the results are not affected", what, type(error).__name__, reason)
