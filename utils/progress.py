"""Show progress of long jobs: a bar on a terminal, one line per minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0


class _Lines(tqdm):
    """Write whole lines, the first after a minute, so that a short job writes none."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line instead of redrawing the bar."""
        started = self.format_dict["elapsed"] >= self.mininterval
        if started and not self.disable:
            self.fp.write(f"{str(self) if msg is None else msg}\n".replace("\r", ""))
            self.fp.flush()

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: written lines stay."""


def progress(
    items: Iterable[Any] | None = None,
    *,
    text: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    hidden: bool = False,
) -> tqdm:
    """Show progress on standard error.

    Args:
        items: iterable to wrap; None if the caller calls ``update``.
        text: description.
        unit: name of one item.
        total: number of items; None uses the length of ``items``.
        initial: number of items already done.
        leave: whether the finished bar stays on a terminal.
        hidden: show nothing.
    """
    settings: dict[str, Any] = {"desc": text, "unit": unit, "total": total, "initial": initial, "disable": hidden}
    settings["file"] = sys.stderr
    if sys.stderr.isatty():
        return tqdm(items, leave=leave, **settings)
    # maxinterval: tqdm's monitor thread also writes when one item takes longer than a minute.
    plain = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left"
    return _Lines(
        items, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, miniters=1, bar_format=plain, leave=False, **settings
    )
