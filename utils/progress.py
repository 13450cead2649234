"""Progress of long jobs: a bar on a terminal, else (a log file, a batch system) a line a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0


class _Lines(tqdm):
    """Writes whole lines, the first one after a minute: a short job writes none."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line instead of drawing a bar over the last one."""
        started = self.format_dict["elapsed"] >= self.mininterval
        if started and not self.disable:
            self.fp.write(f"{str(self) if msg is None else msg}\n".replace("\r", ""))
            self.fp.flush()

    def clear(self, *_: Any, **__: Any) -> None:
        """Lines stay."""


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
    """Count what is done on standard error.

    Args:
        items: to iterate over; None: the caller calls ``update``.
        text: what is being done.
        unit: what is counted.
        total: how many there are; None takes the length of ``items``.
        initial: how many were done before.
        leave: whether the finished bar stays on a terminal.
        hidden: show nothing.
    """
    settings: dict[str, Any] = {"desc": text, "unit": unit, "total": total, "initial": initial, "disable": hidden}
    settings["file"] = sys.stderr
    if sys.stderr.isatty():
        return tqdm(items, leave=leave, **settings)
    # The bar's own clock also writes when an item takes longer than a minute.
    plain = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left"
    return _Lines(
        items, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, miniters=1, bar_format=plain, leave=False, **settings
    )
