"""Image encoders: randomly initialized torchvision ResNets for color (3 channels) and gray (1 channel) renders."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101

IMAGE_ENCODERS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101}


class ImageEncoder(nn.Module):
    """Type of the image encoders: (B, C, H, W) -> (B, feature_dim)."""

    feature_dim: int


def build_image_encoder(name: str, *, in_channels: int) -> ImageEncoder:
    """Build a ResNet (arXiv:1512.03385) without its classifier, initialized as in the released code of the paper.

    As released, the first convolution of the gray branch keeps PyTorch's default initialization (standard deviation
    0.0825); torchvision initializes that of the color branch with standard deviation 0.0255.

    Args:
        name: one of ``IMAGE_ENCODERS``.
        in_channels: 3 for color, 1 for gray.

    Returns:
        Module (B, in_channels, H, W) -> (B, feature_dim), with the attribute ``feature_dim``.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in IMAGE_ENCODERS:
        raise ValueError(f"unknown image encoder {name!r}: expected one of {', '.join(IMAGE_ENCODERS)}")
    net: Any = IMAGE_ENCODERS[name](weights=None)
    net.feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    if in_channels != 3:
        net.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net
