"""One random stream per sample, drawn for a whole batch at once on any device.

PyTorch's generators give one stream per device, so what a sample gets would depend on its neighbors in the batch, on
the worker and on the process. Here every number is a hash (SplitMix64, Steele et al., OOPSLA 2014) of the seed, the
epoch, the sample's index and a counter: the same on every machine and with any number of workers or processes.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Two's complement of a 64-bit constant: torch has no unsigned 64-bit arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: the sign bit does not spread."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, elementwise on int64."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


class Stream(IntEnum):
    """What a sample's random numbers are for. Resumed runs depend on the values: never change one."""

    READING = 0  # the choice of the view and of the subset of points
    AUGMENTATION = 1  # pretraining: the clouds
    RENDERING = 2  # pretraining: the renderings
    FINE_TUNING = 2  # its augmentation; no run has both
    VOTES = 3
    DROPOUT = 16  # and those that follow, one for each layer


class SampleStreams:
    """Random numbers of a batch of samples; sample b's numbers depend on (seed, epoch, index[b]) alone.

    Args:
        seed: of the run.
        epoch: epoch number.
        index: (B,) int64 indices of the samples in their data set; draws happen on its device.
        purpose: a ``Stream``: what reads a sample and what augments it draw independent numbers.
    """

    def __init__(self, *, seed: int, epoch: int, index: Tensor, purpose: int = Stream.READING) -> None:
        state = _mix(torch.full_like(index, seed) + _GOLDEN)
        for value in (purpose, epoch):
            state = _mix(state ^ torch.full_like(index, value) * _GOLDEN)
        self.state = _mix(state ^ index * _GOLDEN)  # (B,)
        self.drawn = 0

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        counter = torch.arange(self.drawn + 1, self.drawn + 1 + count, device=self.state.device)
        self.drawn += count
        return _mix(self.state[:, None] + counter * _GOLDEN).reshape(-1, *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) float32, uniform in [low, high)."""
        unit = _shift_right(self._bits(shape), 40).to(torch.float32) * 2.0**-24
        return low + (high - low) * unit

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal (Box and Muller, 1958)."""
        radius = torch.sqrt(-2 * torch.log(1 - self.uniform(*shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(*shape))

    def seeds(self) -> list[int]:
        """One seed per sample for libraries with a generator of their own; draws nothing."""
        return (_mix(self.state ^ _MULTIPLIERS[0]) & ((1 << 62) - 1)).tolist()
