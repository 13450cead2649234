"""Dropout that does not depend on how samples are distributed over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Offset between the seeds of consecutive calls of a layer: odd and near 2^64 / golden ratio, so that offsets never
# repeat and change the low 32 bits, the only ones of a seed that PyTorch's CPU generator uses.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 62) - 1


class SampleDropout(nn.Dropout):
    """Dropout whose mask for a sample depends only on a seed of that sample.

    With PyTorch's one generator per device, the mask would depend on the position in the batch, and processes would
    draw the same masks.

    Each call after ``reseed`` draws from an independent stream, so that a layer called twice in a forward pass does not
    repeat its mask. Different layers need different seeds.
    """

    _seeds: Sequence[int] | None = None  # one for each sample of the batch
    _calls = 0

    def reseed(self, seeds: Sequence[int] | None) -> None:
        """Set one seed per sample before a forward pass; None uses PyTorch's generator."""
        self._seeds, self._calls = seeds, 0

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of rows (B * n, ...), the n rows of each sample being contiguous."""
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
        """Convert every dropout inside ``module`` to this class in place; return them."""
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.__class__ = cls
        return [child for child in module.modules() if isinstance(child, cls)]
