"""Image encoders: torchvision's ResNets with random start, for colour (3 channels) and gray (1 channel) renders."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101

IMAGE_ENCODERS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101}


def build_image_encoder(name: str, *, in_channels: int) -> nn.Module:
    """A ResNet (arXiv:1512.03385) without its classifier, randomly initialised as in the paper's released code.

    Args:
        name: one of ``IMAGE_ENCODERS``.
        in_channels: 3 for colour, 1 for gray.

    Returns:
        Module (B, in_channels, H, W) -> (B, feature_dim), with the attribute ``feature_dim``.

    Raises:
        ValueError: unknown name.
    """
    if name not in IMAGE_ENCODERS:
        raise ValueError(f"unknown image encoder {name!r}: expected one of {', '.join(IMAGE_ENCODERS)}")
    net = IMAGE_ENCODERS[name](weights=None)
    net.feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    if in_channels != 3:
        net.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net
