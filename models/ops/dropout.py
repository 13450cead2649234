"""Dropout that does not depend on how samples are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The seeds of a layer's first, second, ... call are this far apart (an odd number near 2^64 / golden ratio: the
# differences never repeat, and change the low 32 bits, all that PyTorch's CPU generator takes of a seed).
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 62) - 1


class SampleDropout(nn.Dropout):
    """Dropout whose mask for a sample follows from a seed of that sample alone.

    PyTorch's generators give one stream per device: with them a sample's mask would depend on its place in the batch,
    and processes would share masks. Has no parameters, like ``nn.Dropout``.

    Each call after ``reseed`` draws from a stream that is independent of the calls before it, so a layer that is
    called twice in a forward pass does not repeat its mask. Different layers need different seeds.
    """

    _seeds: Sequence[int] | None = None  # one for each sample of the batch
    _calls = 0

    def reseed(self, seeds: Sequence[int] | None) -> None:
        """Start a forward pass: one seed for each sample of the batch; None draws from PyTorch's generator."""
        self._seeds, self._calls = seeds, 0

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B * n, ...) rows, those of a sample together -> the same."""
        if not self.training or self.p == 0 or self._seeds is None:
            return super().forward(x)
        offset = self._calls * _GOLDEN
        self._calls += 1
        generator = torch.Generator(x.device)
        keep = torch.empty_like(x, requires_grad=False)
        for rows, seed in zip(keep.chunk(len(self._seeds)), self._seeds, strict=True):
            rows.bernoulli_(1 - self.p, generator=generator.manual_seed((seed + offset) & _MASK))
        return x * keep / (1 - self.p)

    @classmethod
    def convert(cls, module: nn.Module) -> list[SampleDropout]:
        """Turn every dropout inside ``module`` into this class, in place; returns them."""
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.__class__ = cls
        return [child for child in module.modules() if isinstance(child, cls)]
