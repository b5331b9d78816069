"""Heads on a backbone's features: linear and cosine classifiers, and the projection for contrastive losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from cibl_ray.networks.precision import wide


class CosineHead(nn.Module):
    """f_c = s · (w_c/|w_c|) · (h/|h|): features (M, d_h) to logits (M, C). Norms, larger for common classes, play no part.

    s, `scale`, is set from outside as a schedule goes, or learned (as its logarithm, so that it stays positive). Computed in
    float32 under autocast too: s would multiply bf16's rounding of a cosine to an error of .1 in a logit.
    """

    def __init__(self, features: int, classes: int, scale: float, learnable: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.log_scale: torch.Tensor
        if learnable:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        else:
            self.register_buffer("log_scale", torch.tensor(math.log(scale)))

    @property
    def scale(self) -> torch.Tensor:
        return self.log_scale.exp()

    def set_scale(self, scale: float) -> None:
        self.log_scale.fill_(math.log(scale))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(h.device.type):
            with torch.autocast(h.device.type, enabled=False):
                return self.forward(h.float())
        return self.scale * F.linear(F.normalize(h, dim=1), F.normalize(self.weight, dim=1))


class Projection(nn.Module):
    """z = MLP(h)/|MLP(h)|: features (M, d_h) to embeddings (M, d_z) of unit norm, in at least float32."""

    def __init__(self, features: int, hidden: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, size))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.normalize(wide(self.layers(h)), dim=1)


class LearnedPrototypes(nn.Module):
    """One unit vector for each class in the space of the embeddings, (C, d_z), learned directly (Hybrid-PSC)."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, size), dim=1))

    def forward(self, classifier: torch.Tensor) -> torch.Tensor:
        return F.normalize(wide(self.weight), dim=1)


class ProjectedPrototypes(Projection):
    """One unit vector for each class, (C, d_z): an MLP of the classifier's weights (C, d_h) (balanced contrastive learning)."""
