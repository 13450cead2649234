"""An image network of a few thousand weights, for runs that do not depend on the image network."""

from __future__ import annotations

from torch import Tensor, nn


class TinyImageNet(nn.Module):
    """One convolution with the parts of a ResNet that ``models.image`` replaces."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10), or (B, 64) without the classifier."""
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))
