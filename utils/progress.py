"""Show progress of long jobs: a bar on a terminal, one line per minute in a log file."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0


class _Lines(tqdm):
    """Write whole lines, the first after a minute, so that a short job writes none.

    A thread writes during items that take longer than that; tqdm itself only writes between items.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = Event()
        if not self.disable:
            Thread(target=_write_when_due, args=(weakref.ref(self), self._ended, self.mininterval), daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        """Count every item, where tqdm counts only now and then."""
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        """Stop writing."""
        if hasattr(self, "_ended"):
            self._ended.set()
        super().close()

    def write_if_due(self) -> None:
        """Write a line if the last one is old."""
        now = self._time()
        if now - self.last_print_t >= self.mininterval:
            self.last_print_t = now
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line instead of redrawing the bar."""
        started = self.format_dict["elapsed"] >= self.mininterval
        if started and not self.disable:
            self.fp.write(f"{str(self) if msg is None else msg}\n".replace("\r", ""))
            self.fp.flush()

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: written lines stay."""


def _write_when_due(bar: weakref.ref[_Lines], ended: Event, seconds: float) -> None:
    while not ended.wait(seconds):
        lines = bar()
        if lines is None:
            return
        lines.write_if_due()
        del lines  # else a bar that nobody closed would live, and write, forever


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
    plain = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left"
    return _Lines(items, mininterval=LINE_SECONDS, miniters=1, bar_format=plain, leave=False, **settings)
