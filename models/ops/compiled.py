"""Fuse element-wise functions with ``torch.compile`` on a GPU: one pass over memory instead of about ten.

The first call compares the compiled function with the plain one on its inputs. If it fails or differs, a warning says
so and the plain one is used from then on. ``CROSSNET_KERNELS=torch`` disables compilation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.ops.backend import wanted
from models.ops.tiles import runs_eagerly

logger = logging.getLogger("crossnet.kernels")
# Tolerated error relative to the largest value, by dtype of the result.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return ``function``, compiled if ``x`` is on a GPU.

    Args:
        function: maps tensors and numbers to a tensor or a tuple of tensors; must be defined at module level.
        x: a tensor on the device where it will run.
    """
    return _fused(function) if x.is_cuda and runs_eagerly() and wanted() != "torch" else function


@functools.cache
def _fused(function: Callable[..., Any]) -> _Checked:
    return _Checked(function)


class _Checked:
    """Compiled function, compared with the plain one at the first call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.chosen: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.chosen is not None:
            return self.chosen(*inputs)
        expected = self.plain(*inputs)
        try:
            compiled = torch.compile(self.plain)
            _compare(compiled(*inputs), expected)
            self.chosen = compiled
        except torch.cuda.OutOfMemoryError:
            raise  # not the fault of the compiler
        except Exception as error:  # compilers raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("%s is not compiled: %s", self.plain.__name__.strip("_"), reason)
            self.chosen = self.plain
        return expected


def _compare(found: Any, expected: Any) -> None:
    for mine, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
        error = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
        if not error.item() <= _TOLERANCE[theirs.dtype]:
            raise RuntimeError(f"the result differs from plain operations by {error.item():.1e} of the largest")
