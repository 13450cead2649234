"""Stand-ins for harmless objects in foreign checkpoints: NumPy numbers, bytes, options, paths.

``torch.load(weights_only=True)`` calls only registered globals. This module registers its own functions and classes
under the names that pickles use for those of NumPy, argparse and pathlib, so none of theirs is ever called.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

_NUMBER = re.compile(r"[biufc?]\d{0,2}")  # booleans, integers, real and complex numbers


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __new__(cls, code: Any = None, *_: Any) -> _Dtype:
        if not isinstance(code, str):
            raise ValueError("a NumPy type in it is described by something else than its name")
        self = super().__new__(cls)
        self.code, self.order = code, "="
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


class _Unread:
    """Stand-in for an array, options or a path, whose content is dropped."""

    def __new__(cls, *_: Any) -> _Unread:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__}>"


def _scalar(dtype: Any, data: Any = b"") -> bool | int | float | complex:
    """Return a NumPy number as a Python number."""
    if not (isinstance(dtype, _Dtype) and _NUMBER.fullmatch(dtype.code) and isinstance(data, bytes)):
        raise ValueError("a NumPy scalar in it is not a number")
    (value,) = np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))
    return value.item()


def _reconstruct(*_: Any) -> Any:
    """Return the stand-in of an array; pickle then sets its state."""
    return _STAND_INS["numpy.ndarray"]()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes that pickle's protocol 2 holds as text; newer versions of PyTorch allow the original."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in it are not stored as Latin-1")
    return text.encode("latin1")


def _under_the_name(name: str, original: Any) -> Any:
    """Return a copy of a function or class that PyTorch registers under another name."""
    if isinstance(original, type):
        copy = type(original.__name__, (original,), {})
    else:

        def copy(*args: Any) -> Any:
            return original(*args)

    copy.__module__, _, copy.__qualname__ = name.rpartition(".")
    copy.__name__ = copy.__qualname__
    return copy


_STAND_INS = {
    name: _under_the_name(name, original)
    for original, names in {
        _Dtype: ("numpy.dtype",),
        _scalar: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        _encode: ("_codecs.encode",),
        _reconstruct: ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        _Unread: (
            "numpy.ndarray",
            "argparse.Namespace",
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "pathlib._local.PosixPath",
            "pathlib._local.WindowsPath",
        ),
    }.items()
    for name in names
}


@contextlib.contextmanager
def plain_objects() -> Iterator[None]:
    """Register the stand-ins, and only these, for ``torch.load(weights_only=True)`` inside the block."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(list(_STAND_INS.values()))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)
