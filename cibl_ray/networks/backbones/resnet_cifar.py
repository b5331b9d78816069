"""ResNet-20 and ResNet-32 for 32x32 images (He et al. 2016, section 4.2), with the parameter-free shortcut A."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.extra or self.stride > 1:
            # Shortcut A: every second pixel, zeros for the new channels.
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y, inplace=True)


def resnet20(width: int = 16) -> tuple[nn.Module, int]:
    """ResNet-20, 0.27 million parameters with 16 base channels, and how many features it has."""
    return CifarResNet(20, width), 4 * width


def resnet32(width: int = 16) -> tuple[nn.Module, int]:
    """ResNet-32, 0.46 million parameters with 16 base channels, and how many features it has."""
    return CifarResNet(32, width), 4 * width


class CifarResNet(nn.Module):
    """Images (M, 3, S, S) to features (M, 4·base); depth 6n + 2."""

    def __init__(self, depth: int, base: int = 16) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0
        self.conv = nn.Conv2d(3, base, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(base)
        blocks: list[nn.Module] = []
        width_in = base
        for width, first_stride in ((base, 1), (2 * base, 2), (4 * base, 2)):
            for number in range((depth - 2) // 6):
                blocks.append(_Block(width_in, width, first_stride if number == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (M, d_h) of images (M, 3, S, S)."""
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = self.blocks(x)
        return x.mean((2, 3))
