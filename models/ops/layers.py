"""Blocks of the encoders and heads, and their application to rows (B * N, C), one point per row."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LEAKY_SLOPE = 0.2


def edge_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build an EdgeConv layer: 1x1 convolution over edges, batch norm, leaky ReLU.

    For the first layer of an EdgeConv ``in_channels`` is twice the point channels.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE),
    )


def point_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build a pointwise layer for ``apply_to_rows``: 1x1 convolution, batch norm, leaky ReLU."""
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),  # safe: batch norm saves its input, not its output
    )


def parts_of(block: nn.Sequential) -> tuple[Tensor, _BatchNorm, nn.LeakyReLU]:
    """Return the weight (C_out, C_in) of a block's convolution, its batch norm, and its activation."""
    conv, norm, activation = block
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))  # a tuple: PyTorch 2.4 cannot compile A | B
    assert isinstance(norm, _BatchNorm) and isinstance(activation, nn.LeakyReLU)
    return conv.weight.flatten(1), norm, activation


def max_over_points(x: Tensor) -> Tensor:
    """Take the maximum (B, N, C) -> (B, C); unlike that of ``amax``, its gradient goes to one point per channel."""
    return x.max(dim=1).values


def apply_to_rows(rows: Tensor, *layers: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply layers to rows (P, C): a 1x1 convolution becomes a matrix product, and batch norm is fastest in 2-D."""
    for layer in layers:
        rows = F.linear(rows, layer.weight.flatten(1), layer.bias) if isinstance(layer, nn.Conv1d) else layer(rows)
    return rows
