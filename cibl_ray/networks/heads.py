"""Heads on a backbone's features: linear and cosine classifiers, and the projection for contrastive losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class CosineHead(nn.Module):
    """f_c = s · (w_c/|w_c|) · (h/|h|): features (M, d_h) to logits (M, C). Norms, larger for common classes, play no part."""

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.scale = scale

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(h, dim=1), F.normalize(self.weight, dim=1))


class Projection(nn.Module):
    """z = MLP(h)/|MLP(h)|: features (M, d_h) to embeddings (M, d_z) of unit norm, in float32."""

    def __init__(self, features: int, hidden: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, size))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.layers(h).float(), dim=1)
