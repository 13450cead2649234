"""One random stream per sample, drawn for a whole batch at once on any device.

A PyTorch generator is one stream per device, so a sample's numbers would depend on the rest of its batch, the worker
and the process. Here every number is a hash (SplitMix64, Steele et al., OOPSLA 2014) of the seed, the epoch, the
sample's index and a counter: the same on every machine and with any number of workers or processes.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return a 64-bit constant in two's complement, since torch has no unsigned 64-bit arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer elementwise to int64."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


class Stream(IntEnum):
    """Purpose of a sample's random numbers. Never change a value: resumed runs depend on them."""

    READING = 0  # the choice of the view and of the subset of points
    AUGMENTATION = 1  # pretraining: the clouds
    RENDERING = 2  # pretraining: the renderings
    FINE_TUNING = 2  # fine-tuning: augmentation; no run has both
    VOTES = 3
    DROPOUT = 16  # and the following values, one per layer


class SampleStreams:
    """Draw random numbers for a batch of samples; those of sample b depend only on (seed, epoch, index[b]).

    Args:
        seed: of the run.
        epoch: epoch number.
        index: (B,) int64 indices of the samples in their data set; draws happen on its device.
        purpose: a ``Stream``, so that reading a sample and augmenting it use independent numbers.
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
        return _mix(self.state[:, None] + counter * _GOLDEN).reshape(-1, *shape)  # (B, count) -> (B, *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (B, *shape) float32, uniform in [low, high)."""
        unit = _shift_right(self._bits(shape), 40).to(torch.float32) * 2.0**-24
        return low + (high - low) * unit

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, standard normal (Box and Muller, 1958)."""
        radius = torch.sqrt(-2 * torch.log(1 - self.uniform(*shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(*shape))

    def seeds(self) -> list[int]:
        """Return one seed per sample, for libraries with their own generator, without advancing the stream."""
        return (_mix(self.state ^ _MULTIPLIERS[0]) & ((1 << 62) - 1)).tolist()
