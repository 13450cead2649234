"""Errors that are a user's to mend: shown as one message, without a traceback."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

logger = logging.getLogger("crossnet")


def _printable(message: str) -> str:
    """Show what cannot be printed as its escape, and shorten endless words."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    return re.sub(r"(\S{200})\S{200,}(\S{200})", r"\1...\2", text)


class UserError(Exception):
    """A wrong setting or input. The message says what was expected and what helps.

    Names come into messages from files of any origin, so what cannot be printed (control codes, broken Unicode) is
    shown as its escape, and words of endless length are shortened.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))


class DataError(UserError):
    """A data file or folder that is missing or not what was expected.

    Args:
        problem: what is wrong, with the name of the file.
        fix: a sentence about what helps, such as the command that gets the file.
    """

    def __init__(self, problem: str = "", *, fix: str = "") -> None:
        super().__init__(f"{problem}. {fix}" if fix else problem)
        self.problem = _printable(problem)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit. The message names the file."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose file is cut off or changed: another one may do."""


def plain_message(error: UserError) -> str:
    """The error's own message, also where a data worker's error comes wrapped in the text of its traceback."""
    kind = type(error)
    text = str(error)
    if text.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        text = text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
    return text


@contextlib.contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turn a failure inside into a warning: for pictures and other extras, which must not cost a result.

    Args:
        what: what is lost, for the warning.
    """
    try:
        yield
    except Exception as error:  # whatever it is, it is worth less than the run
        reason = (str(error).splitlines() or [""])[0]
        logger.warning("%s is left out (%s: %s); the results are not affected", what, type(error).__name__, reason)
