"""From the loader's bytes to the network's input, in batch, on the device that trains."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.config import DataConfig


class Normalize(nn.Module):
    """uint8 views (B, V, S, S, 3) to float32 (B*V, 3, S, S), standardised, sample by sample: m = b*V + v.

    The result is channels-last in memory, as the bytes came, so no value is moved but to be converted.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        std = torch.tensor(data.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(data.mean) / std).view(3, 1, 1), persistent=False)
        self.scale: torch.Tensor
        self.shift: torch.Tensor

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        pixels = views.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(self.shift, pixels, self.scale)
