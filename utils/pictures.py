"""Matplotlib for this project: figures are drawn with Agg, whatever MPLBACKEND says.

Import Matplotlib's classes from here. Importing Matplotlib directly fails if MPLBACKEND names a backend that is not
installed, as with `!python ...` in a notebook (Colab, Kaggle, Jupyter), which inherits the notebook's backend.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from utils.files import replacing


def _set_backend_aside() -> None:
    """Import Matplotlib without MPLBACKEND, then restore the backend it names if that is installed."""
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted


_set_backend_aside()

from matplotlib import colormaps  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

__all__ = [
    "Axes",
    "FancyArrowPatch",
    "FancyBboxPatch",
    "Figure",
    "FigureCanvasAgg",
    "LogLocator",
    "Patch",
    "Polygon",
    "Rectangle",
    "colormaps",
    "save_figure",
]


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150, **options: object) -> None:
    """Write a figure atomically: an existing file stays until the new one is complete.

    Args:
        figure: the figure.
        path: the file; its suffix selects the format.
        dpi: pixels per inch.
        options: further arguments of ``Figure.savefig``.

    Raises:
        UserError: the file cannot be written.
    """
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=Path(path).suffix[1:], **options)
