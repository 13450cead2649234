"""Dropout that does not depend on how samples are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SampleDropout(nn.Dropout):
    """Dropout whose mask for a sample follows from a seed of that sample alone.

    PyTorch's generators give one stream per device: with them a sample's mask would depend on its place in the batch,
    and processes would share masks. Has no parameters, like ``nn.Dropout``.

    Attributes:
        seeds: one for each sample of the batch; None draws from PyTorch's generator.
    """

    seeds: Sequence[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B * n, ...) rows, those of a sample together -> the same."""
        if not self.training or self.p == 0 or self.seeds is None:
            return super().forward(x)
        generator = torch.Generator(x.device)
        keep = torch.empty_like(x, requires_grad=False)
        for rows, seed in zip(keep.chunk(len(self.seeds)), self.seeds, strict=True):
            rows.bernoulli_(1 - self.p, generator=generator.manual_seed(seed))
        return x * keep / (1 - self.p)

    @classmethod
    def convert(cls, module: nn.Module) -> list[SampleDropout]:
        """Turn every dropout inside ``module`` into this class, in place; returns them."""
        found = [child for child in module.modules() if isinstance(child, nn.Dropout)]
        for child in found:
            child.__class__ = cls
        return found
